"""Neural collapse at the input of the last linear layer, and how many directions every layer's input uses.

Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training" (PNAS 117,
2020). With features h, class means μ_c, their mean μ_G (every class counts the same), centred means m_c = μ_c - μ_G as
columns of M, classifier columns w_c as columns of W, and K classes:

- NC1, variability collapse: `tr(Σ_W Σ_B⁺) / K`, Σ_W the covariance of features around their own class mean,
  `Σ_B = M Mᵀ / K`;
- NC2, simplex of equal norms and angles: `std ‖m_c‖ / mean ‖m_c‖` (the same for w_c), and the mean over pairs of
  `|cos(m_c, m_c') + 1/(K-1)|`;
- NC3, self-duality: `‖ W/‖W‖_F - M/‖M‖_F ‖_F²`;
- NC4, nearest class centre: the share of samples where the model's answer differs from `argmin_c ‖h - μ_c‖`.

A stochastic shift keeps outputs on B samples alone: the rest of a class is kept as far as NC1 is small.

Nothing is kept but sums for each class and the features' second moment; NC4 takes a second pass. In float64 Σ_W, a
difference of moments, is exact to 1e-16 of ‖h‖².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.stream import stream
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.report.diagnosis import Collapse, LayerRank
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve.spectrum import Spectrum
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import to_rows


@dataclass(frozen=True)
class Features:
    """Moments of features `[n, d]` with classes.

    Attributes:
        labels: The K classes present, ascending.
        counts: Samples of each, `[K]`.
        sums: Sum of each class's features, `[K, d]`.
        gram: Second moment of all, `[d, d]`, not divided by n.
    """

    labels: NDArray[np.int64]
    counts: Tensor
    sums: Tensor
    gram: Tensor

    @property
    def means(self) -> Tensor:
        """μ_c `[K, d]`."""
        return self.sums / self.counts[:, None]

    @property
    def centred(self) -> Tensor:
        """μ_c - μ_G `[K, d]`."""
        return self.means - self.means.mean(dim=0)


class FeatureMoments:
    """Accumulates features class by class.

    Args:
        width: d.
        device: Where the sums live.
    """

    def __init__(self, width: int, device: str = "cpu") -> None:
        self._moments = InputMoments(1, width, device)
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def update(self, features: Tensor, classes: NDArray[np.int64]) -> None:
        """Adds features `[n, d]` with their classes `[n]`."""
        rows = features.to(self._moments.device, torch.float64)
        self._moments.update(rows[None])
        for label in np.unique(classes):
            chosen = rows[torch.from_numpy(classes == label).to(rows.device)]
            self._sums[int(label)] = self._sums.get(int(label), 0) + chosen.sum(dim=0)
            self._counts[int(label)] = self._counts.get(int(label), 0) + len(chosen)

    def features(self) -> Features:
        """What has been seen."""
        labels = sorted(self._sums)
        sums = [self._sums[label] for label in labels]
        empty = self._moments.total.new_empty(0, self._moments.width)
        counts = torch.tensor([self._counts[label] for label in labels], dtype=torch.float64)
        gram = self._moments.gram()[0]
        stacked = torch.stack(sums) if sums else empty
        return Features(np.array(labels, dtype=np.int64), counts.to(gram.device), stacked, gram)


def variability(features: Features) -> float:
    """NC1. Infinite where class means coincide although features vary."""
    n = float(features.counts.sum())
    centred = features.centred
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    # Threshold of numpy.linalg.matrix_rank; one direction is always lost to the centring.
    kept = singular > singular.max() * max(centred.shape) * torch.finfo(torch.float64).eps
    if not bool(kept.any()):
        return math.inf
    directions, singular = directions[kept], singular[kept]
    projected = features.means @ directions.mT
    total = (directions @ features.gram * directions).sum(dim=1)
    within = (total - (features.counts[:, None] * projected.square()).sum(dim=0)).clamp(min=0) / n
    # Σ_B⁺ = K U S⁻² Uᵀ, and the K of NC1's denominator takes this K away.
    return float((within / singular.square()).sum())


def norm_spread(columns: Tensor) -> float:
    """Standard deviation of the norms of the rows of `[K, d]`, relative to their mean."""
    norms = torch.linalg.vector_norm(columns, dim=1)
    mean = float(norms.mean())
    return float(norms.std(correction=0)) / mean if mean else math.inf


def angle_spread(centred: Tensor) -> float:
    """Mean over pairs of rows of `[K, d]` of the distance of their cosine from -1/(K-1)."""
    count = len(centred)
    unit = torch.nn.functional.normalize(centred, dim=1)
    pairs = torch.triu_indices(count, count, 1)
    cosines = (unit @ unit.mT)[pairs[0], pairs[1]]
    return float((cosines + 1 / (count - 1)).abs().mean())


def duality_gap(classifier: Tensor, centred: Tensor) -> float:
    """NC3 of columns w_c and centred class means, both as rows of `[K, d]`."""
    scaled = [t / torch.linalg.matrix_norm(t) for t in (classifier, centred)]
    return float((scaled[0] - scaled[1]).square().sum())


def nearest(features: Tensor, means: Tensor) -> Tensor:
    """Number of the nearest of the means `[K, d]` for each of the features `[n, d]`."""
    return torch.cdist(features.to(means), means).argmin(dim=1)


def collapse(
    bench: Bench, samples: Samples, classes: NDArray[np.int64], weight: Weight, logits: str | None
) -> Collapse | None:
    """NC1 to NC4 at the input of one weight.

    Args:
        bench: Runs the original model.
        samples: The data.
        classes: Class of each sample, `[n]`.
        weight: The last linear layer.
        logits: The model output whose argmax is the answer and whose classes are the weight's columns; None when the
            weight is no classifier.

    Returns:
        The figures; None where the layer does not read one row for each sample, or fewer than two classes are there.
    """
    if weight.groups != 1 or len(weight.uses) != 1 or len(np.unique(classes)) < 2:
        return None
    tap = weight.uses[0].tap
    moments = FeatureMoments(weight.d, bench.device.solve)
    session = bench.sessions.probe([tap])
    one_each = True

    def add(_: Tap, batch: Batch, activation: Tensor) -> None:
        nonlocal one_each
        rows = to_rows(activation, tap)[0]
        one_each = one_each and len(rows) == len(batch.indices)
        if one_each and bool(torch.isfinite(rows).all()):
            moments.update(rows, classes[batch.indices])

    with bench.progress.stage("neural collapse", len(samples)) as advance:
        stream(session, [tap], samples.batches(bench.batch_size), add, done=advance)
    features = moments.features()
    if not one_each or len(features.labels) < 2:
        return None
    centred = features.centred
    columns = _columns(bench, weight, features.labels) if logits is not None else None
    return Collapse(
        layer=weight.name,
        classes=len(features.labels),
        samples=int(features.counts.sum()),
        counts={str(label): int(n) for label, n in zip(features.labels, features.counts, strict=True)},
        nc1=variability(features),
        nc2_norms=norm_spread(centred),
        nc2_angles=angle_spread(centred),
        nc2_weight_norms=None if columns is None else norm_spread(columns),
        nc3=None if columns is None else duality_gap(columns, centred),
        nc4=None if logits is None else _disagreement(bench, samples, tap, features, logits),
    )


def _columns(bench: Bench, weight: Weight, labels: NDArray[np.int64]) -> Tensor:
    """Classifier columns of the classes that are present, as rows `[K, d]`, float64."""
    matrix = weight.form.to_matrix(bench.model.initializer(weight.name))[0].astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(matrix.T[labels])).to(bench.device.solve)


def _disagreement(bench: Bench, samples: Samples, tap: Tap, features: Features, logits: str) -> float:
    """NC4: share of samples whose answer, among the classes present, is not the nearest class mean."""
    session = bench.sessions.probe([tap])
    means, wrong, seen = features.means, 0, 0
    for batch, outputs in bench.outputs.reference(samples):
        count = len(batch.indices)
        scores = outputs[logits].reshape(outputs[logits].shape[0], -1)[:count]
        answers = scores[:, features.labels].argmax(axis=1)

        def judge(_: Tap, __: Batch, activation: Tensor, answers: NDArray[np.int64] = answers) -> None:
            nonlocal wrong
            found = nearest(to_rows(activation, tap)[0][: len(answers)], means).cpu().numpy()
            wrong += int((found != answers).sum())

        stream(session, [tap], [batch], judge)
        seen += count
    return wrong / seen


def layer_rank(weight: Weight, layers: Layers) -> LayerRank | None:
    """Directions that a layer's input uses; None without finite rows."""
    if weight.name not in layers.facts:
        return None
    spectrum = layers.spectrum(weight)
    return LayerRank(
        name=weight.name,
        d=weight.d,
        rows=layers.facts[weight.name].rows,
        rank=int((spectrum.eigenvalues > 0).sum(-1).min()),
        needed=layers.facts[weight.name].rank,
        effective=effective_rank(spectrum),
        stable=stable_rank(spectrum),
    )


def effective_rank(spectrum: Spectrum) -> float:
    """`exp(-Σ pᵢ log pᵢ)` of the singular values' shares p, mean over groups.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    singular = spectrum.eigenvalues.sqrt()
    shares = singular / singular.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum(-1).exp().mean())


def stable_rank(spectrum: Spectrum) -> float:
    """`‖A‖_F² / ‖A‖_2²`, mean over groups; 0 for a group of zeros."""
    largest = spectrum.eigenvalues[..., :1].clamp(min=torch.finfo(torch.float64).tiny)
    return float((spectrum.eigenvalues / largest).sum(-1).mean())
