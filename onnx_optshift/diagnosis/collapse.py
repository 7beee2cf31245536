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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.stream import Sink, stream
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.report.diagnosis import Collapse, LayerRank
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import LayerFacts
from onnx_optshift.run.outputs import Outputs
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.solve.spectrum import Spectrum
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import to_rows

_TINY = torch.finfo(torch.float64).tiny


class Features:
    """Sums over features `[n, d]` of K classes `[K]`, given by their labels in ascending order."""

    def __init__(self, labels: NDArray[np.int64], width: int, device: str = "cpu") -> None:
        self.labels = labels
        self.moments = InputMoments(1, width, device)
        self.sums = self.moments.total.new_zeros(len(labels), width)
        self.counts = self.sums.new_zeros(len(labels))

    def update(self, features: Tensor, classes: NDArray[np.int64]) -> None:
        """Adds features `[n, d]` with their labels `[n]`."""
        rows = features.to(self.sums)
        numbers = torch.from_numpy(np.searchsorted(self.labels, classes)).to(rows.device)
        self.moments.update(rows[None])
        self.sums.index_add_(0, numbers, rows)
        self.counts += torch.bincount(numbers, minlength=len(self.labels))

    @property
    def means(self) -> Tensor:
        """μ_c `[K, d]`."""
        return self.sums / self.counts[:, None]

    @property
    def centred(self) -> Tensor:
        """μ_c - μ_G `[K, d]`."""
        return self.means - self.means.mean(dim=0)


def variability(features: Features) -> float:
    """NC1. Infinite where class means coincide although features vary."""
    centred = features.centred
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    # Threshold of numpy.linalg.matrix_rank; one direction is always lost to the centring.
    kept = singular > singular.max() * max(centred.shape) * torch.finfo(torch.float64).eps
    if not bool(kept.any()):
        return math.inf
    directions, singular = directions[kept], singular[kept]
    total = (directions @ features.moments.gram()[0] * directions).sum(dim=1)
    between = (features.counts[:, None] * (features.means @ directions.mT).square()).sum(dim=0)
    within = (total - between).clamp(min=0) / features.counts.sum()
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
    """NC1 to NC4 at the input of the last weight, of samples with these classes `[n]`.

    `logits` is the model output whose argmax is the answer and whose classes are the weight's columns; None when the
    weight is no classifier. No figures where the layer does not read one finite row for each sample, or there are
    fewer than two classes.
    """
    labels, counts = np.unique(classes, return_counts=True)
    if weight.groups != 1 or len(weight.uses) != 1 or len(labels) < 2:
        return None
    tap = weight.uses[0].tap
    features = Features(labels, weight.d, bench.device.solve)
    answered = None if logits is None else answers(bench.outputs, samples, logits, labels)
    fits, wrong = True, 0
    session = bench.sessions.probe([tap])

    def add(_: Tap, batch: Batch, activation: Tensor) -> None:
        nonlocal fits
        rows = to_rows(activation, tap)[0]
        fits = fits and len(rows) == batch.rows and bool(torch.isfinite(rows).all())
        if fits:
            features.update(rows, classes[batch.indices])

    def compare(_: Tap, batch: Batch, activation: Tensor) -> None:
        nonlocal wrong
        assert answered is not None
        found = nearest(to_rows(activation, tap)[0], features.means).cpu().numpy()
        wrong += int((found != answered[batch.indices]).sum())

    def run(sink: Sink) -> None:
        with bench.progress.stage("neural collapse", len(samples)) as advance:
            stream(session, [tap], samples.batches(bench.batch_size), sink, done=advance)

    run(add)
    if not fits:
        return None
    columns = None
    if answered is not None:
        run(compare)
        columns = as_matrix(bench.model.initializer(weight.name), weight.form, bench.device.solve)[0].mT[labels]
    return Collapse(
        layer=weight.name,
        classes=len(labels),
        samples=len(samples),
        counts={str(label): int(count) for label, count in zip(labels, counts, strict=True)},
        nc1=variability(features),
        nc2_norms=norm_spread(features.centred),
        nc2_angles=angle_spread(features.centred),
        nc2_weight_norms=None if columns is None else norm_spread(columns),
        nc3=None if columns is None else duality_gap(columns, features.centred),
        nc4=None if answered is None else wrong / len(samples),
    )


def answers(
    outputs: Outputs, samples: Samples, logits: str, labels: NDArray[np.int64] | slice = slice(None)
) -> NDArray[np.int64]:
    """The model's answer for each sample `[n]`: where the largest score is, among those of the labels."""
    scores = [values[logits].reshape(batch.rows, -1) for batch, values in outputs.reference(samples)]
    return np.concatenate([part[:, labels].argmax(axis=1) for part in scores])


def layer_rank(weight: Weight, facts: LayerFacts, spectrum: Spectrum) -> LayerRank:
    """Directions that a layer's input uses."""
    met = int((spectrum.eigenvalues > 0).sum())
    return LayerRank(
        name=weight.name,
        d=weight.d,
        rows=facts.rows,
        rank=max(met // weight.groups, min(met, 1)),
        needed=facts.rank,
        free=facts.free,
        effective=effective_rank(spectrum),
        stable=stable_rank(spectrum),
    )


def effective_rank(spectrum: Spectrum) -> float:
    """`exp(-Σ pᵢ log pᵢ)` of the singular values' shares p, mean over groups.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    singular = spectrum.eigenvalues.sqrt()
    shares = singular / singular.sum(-1, keepdim=True).clamp(min=_TINY)
    return float(torch.special.entr(shares).sum(-1).exp().mean())


def stable_rank(spectrum: Spectrum) -> float:
    """`‖A‖_F² / ‖A‖_2²`, mean over groups; 0 for a group of zeros."""
    largest = spectrum.eigenvalues[..., :1].clamp(min=_TINY)
    return float((spectrum.eigenvalues / largest).sum(-1).mean())
