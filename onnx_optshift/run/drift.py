"""Does the model still see data like the calibration data? What a shift changes for each new sample tells.

For an input row a, a shift from V to W moves the layer's output by exactly `aᵀ(W - V)`. On the calibration data that is
next to nothing, by construction; a sample for which it is a large share of `aᵀV` excites directions that calibration
never showed. The share of a sample is `||A(W - V)||_F / ||A V||_F` over its own rows A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.stream import sample_axis, stream
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.report.diagnosis import Drift, LayerDrift
from onnx_optshift.run.bench import Bench
from onnx_optshift.stats.rows import to_rows

QUANTILES = (0.5, 0.9, 0.99, 1.0)
# The drift of a layer: high enough to see a change in a part of the data, low enough not to hang on one sample.
JUDGED_QUANTILE = 0.9
WORST_SAMPLES = 5


def layer_drifts(
    bench: Bench, changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]], samples: Samples
) -> tuple[LayerDrift, ...]:
    """The shares of every sample in every changed layer, of (V, W) `[g, d, m]` by name, in one streaming pass."""
    weights = [weight for weight in bench.weights if weight.name in changes]
    shares: dict[str, NDArray[np.float64]] = {weight.name: np.zeros((2, len(samples))) for weight in weights}

    def sink(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
        for weight in _readers(weights, tap):
            before, after = changes[weight.name]
            for position, number in enumerate(batch.indices):
                one = _own(activation, tap, position, len(batch.indices))
                rows = to_rows(one, tap).to(before)
                shares[weight.name][0, number] += float((rows @ (after - before)).square().sum())
                shares[weight.name][1, number] += float((rows @ before).square().sum())

    taps = tuple(dict.fromkeys(use.tap for weight in weights for use in weight.uses))
    with bench.progress.stage("drift", len(samples)) as advance:
        stream(
            bench.sessions.probe(taps), taps, samples.batches(bench.batch_size), sink, done=advance, drop_masked=False
        )
    return tuple(_summary(weight.name, *shares[weight.name]) for weight in weights)


def drift(data: Sequence[LayerDrift], baseline: Sequence[LayerDrift] | None, limit: float | None) -> Drift:
    """The worst layer's figure, which may be at most `limit`; the layers of the data, and of the calibration data."""
    figure = _figure(data)
    return Drift(
        figure=figure,
        quantile=JUDGED_QUANTILE,
        limit=limit,
        passed=limit is None or figure <= limit,
        baseline_figure=None if baseline is None else _figure(baseline),
        layers=tuple(data),
        baseline=None if baseline is None else tuple(baseline),
    )


def _figure(layers: Sequence[LayerDrift]) -> float:
    return max((layer.quantiles[str(JUDGED_QUANTILE)] for layer in layers), default=0.0)


def _readers(weights: Sequence[Weight], tap: Tap) -> list[Weight]:
    return [weight for weight in weights for use in weight.uses if use.tap == tap]


def _own(activation: torch.Tensor, tap: Tap, position: int, samples: int) -> torch.Tensor:
    """One sample's part of a batch's activation; all of it where no axis numbers the samples."""
    axis = sample_axis(activation.shape, samples, tap.inside.loops if tap.inside else 0)
    if axis is None:
        return activation
    share = activation.shape[axis] // samples
    return activation.narrow(axis, position * share, share)


def _summary(name: str, moved: NDArray[np.float64], total: NDArray[np.float64]) -> LayerDrift:
    share = np.sqrt(np.divide(moved, total, out=np.where(moved > 0, np.inf, 0.0), where=total > 0))
    order = np.argsort(-share, kind="stable")[:WORST_SAMPLES]
    return LayerDrift(
        name,
        len(share),
        # No interpolation: it would make NaN of two infinite shares.
        {str(q): float(np.quantile(share, q, method="higher")) for q in QUANTILES},
        tuple((int(number), float(share[number])) for number in order),
    )
