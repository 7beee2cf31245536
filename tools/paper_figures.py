"""The figures of `paper.py`: accuracy, loss, curvature and neural collapse of a network with a linear classifier.

Relative flatness and trace of the last layer's block are exact. With features h, logits `W h + b`, probabilities p:
`H_st = mean (p_s [s = t] - p_s p_t) h hᵀ`, so the trace is `mean ‖h‖² Σ p_s (1 - p_s)` and relative flatness (Petzka et
al., NeurIPS 2021, definition 3) `mean ‖h‖² (Σ p_s ‖w_s‖² - ‖Σ p_s w_s‖²)`. Neural collapse is that of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from paper_networks import Network
from paper_training import Data, Part
from torch import Tensor
from torch.nn import functional as F

from onnx_optshift.diagnosis.collapse import Features, angle_spread, duality_gap, nearest, norm_spread, variability

TRACE_IMAGES, PROBES = 300, 4
CHUNK = 500


@dataclass(frozen=True)
class Seen:
    """Features `[n, d]` and labels `[n]`."""

    features: Tensor
    labels: Tensor


@torch.no_grad()
def seen(net: Network, part: Part) -> Seen:
    """What reaches the classifier, in eval mode."""
    device = net.classifier.weight.device
    rows = torch.cat([net.body(chunk.to(device)).cpu() for chunk in part.images.split(CHUNK)])
    return Seen(rows, part.labels)


@torch.no_grad()
def last_layer(net: Network, some: Seen) -> tuple[float, float, float, float]:
    """Accuracy and loss, and exact trace and relative flatness of the last layer's weight."""
    weight, bias = (p.cpu().double() for p in (net.classifier.weight, net.classifier.bias))
    rows = some.features.double()
    logits = rows @ weight.mT + bias
    shares, sizes = logits.softmax(dim=1), rows.square().sum(dim=1)
    accuracy = (logits.argmax(dim=1) == some.labels).double().mean()
    trace = (sizes * (shares * (1 - shares)).sum(dim=1)).mean()
    spread = shares @ weight.square().sum(dim=1) - (shares @ weight).square().sum(dim=1)
    return float(accuracy), float(F.cross_entropy(logits, some.labels)), float(trace), float((sizes * spread).mean())


def hessian_trace(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], probes: int, seed: int = 0
) -> tuple[float, float]:
    """Hutchinson's estimate of the trace over all parameters, and its standard error; a seed is a set of directions."""
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(probes):
        signs = [(torch.randint(2, p.shape, generator=generator) * 2.0 - 1).to(p.device, p.dtype) for p in parameters]
        products = torch.autograd.grad(gradients, parameters, signs, retain_graph=True)
        found.append(float(sum((a * b).sum() for a, b in zip(products, signs, strict=True))))
    return float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(probes)


def collapse(net: Network, some: Seen) -> dict[str, float]:
    """NC1 to NC4 (Papyan, Han and Donoho 2020)."""
    labels, classes = np.unique(some.labels.numpy()), some.labels.numpy()
    sums = Features(labels, some.features.shape[1])
    sums.update(some.features, classes)
    with torch.no_grad():
        weight = net.classifier.weight.cpu().double()[torch.from_numpy(labels)]
        bias = net.classifier.bias.cpu().double()[torch.from_numpy(labels)]
        answers = (some.features.double() @ weight.mT + bias).argmax(dim=1)
    return {
        "nc1": variability(sums),
        "nc2": angle_spread(sums.centred),
        "nc2_norms": norm_spread(sums.centred),
        "nc3": duality_gap(weight, sums.centred),
        "nc4": float((nearest(some.features, sums.means) != answers).double().mean()),
    }


def figures(net: Network, data: Data, train: Seen, test: Seen) -> dict[str, float]:
    """All of a row's figures. Curvature and collapse are of the training images, with the labels they were given."""
    train_accuracy, train_loss, last_trace, relative = last_layer(net, train)
    test_accuracy, test_loss, _, _ = last_layer(net, test)
    device = net.classifier.weight.device
    images, labels = (t[:TRACE_IMAGES].to(device) for t in (data.train.images, data.train.labels))
    trace, error = hessian_trace(lambda: F.cross_entropy(net(images), labels), list(net.parameters()), PROBES)
    return {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "train_accuracy": train_accuracy,
        "train_loss": train_loss,
        "trace": trace,
        "trace_error": error,
        "last_trace": last_trace,
        "relative_flatness": relative,
        "norm": float(torch.linalg.matrix_norm(net.classifier.weight.detach())),
        **collapse(net, train),
    }
