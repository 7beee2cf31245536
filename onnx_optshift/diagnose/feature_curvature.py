"""How far the weights before a layer move its input: `M = E[Σ_θ (∂h/∂θ)(∂h/∂θ)ᵀ]`, the metric of `solve.weighted_norm`.

For independent signs z on all weights, `E[(dh)(dh)ᵀ] = M` for the derivative dh of the input along z: every probe is
one central difference of the activations, whatever the network between is. Behind one linear layer with an elementwise
activation M is diagonal, `E[activation'² ‖its input row‖²]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.stream import stream
from onnx_optshift.diagnose.landscape import FEWEST_UNITS, FIRST_STEP
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.probes import probe_model
from onnx_optshift.graph.weights import Weight
from onnx_optshift.layers import ROUNDING_UNIT, Arrays
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import to_rows
from onnx_optshift.workbench import Workbench

# Measured on a 256-wide layer: with 8 the held-out loss is 1 per cent higher than with 48, and with 96 the same.
PROBES = 48


def feature_curvature(
    bench: Workbench, samples: Samples, sources: Sequence[Weight], *, probes: int = PROBES, seed: int = 0
) -> dict[str, Tensor]:
    """M `[g, d, d]` of every weight of the bench, float64; 0 where no source lies before it.

    Args:
        bench: Runs the model; its weights are those to be solved for.
        samples: What the mean is over; a few hundred are enough.
        sources: The weights θ that move: all weights of the model, whether they are to be solved for or not.
        probes: Random directions.
        seed: Of the directions.
    """
    centers = {weight.name: bench.model.initializer(weight.name) for weight in sources}
    step = _step(sources, centers)
    taps = bench.taps
    session = bench.session(probe_model(bench.model, list(dict.fromkeys(tap.value for tap in taps)), list(centers)))
    moments = {tap: InputMoments(tap.groups, tap.width, bench.device.solve) for tap in taps}
    above: dict[Tap, Tensor] = {}

    def keep(tap: Tap, _: Batch, activation: Tensor) -> None:
        above[tap] = to_rows(activation, tap).to(torch.float64, copy=True)

    def join(tap: Tap, _: Batch, activation: Tensor) -> None:
        slopes = (above[tap] - to_rows(activation, tap)) / (2 * step)
        if bool(torch.isfinite(slopes).all()):
            moments[tap].update(slopes)

    with bench.progress.stage("curvature", probes * len(samples)) as advance:
        for probe in range(probes):
            generator = np.random.default_rng([seed, probe])
            signs = {name: generator.choice(np.array([-1.0, 1.0]), array.shape) for name, array in centers.items()}
            up, down = (_moved(centers, signs, sign * step) for sign in (1, -1))
            for batch in samples.batches(bench.batch_size):
                stream(session, taps, [batch], keep, overrides=up)
                stream(session, taps, [batch], join, overrides=down, done=advance)
    return {weight.name: _mean(weight, moments) for weight in bench.weights}


def _step(sources: Sequence[Weight], centers: Arrays) -> float:
    """One step for all weights: M is a sum over parameters as they are, not relative to their size."""
    scales = [float(np.sqrt(np.square(array, dtype=np.float64).mean())) for array in centers.values() if array.size]
    if not scales:
        return FIRST_STEP
    unit = max(ROUNDING_UNIT[weight.dtype] for weight in sources)
    return max(FIRST_STEP * float(np.median(scales)), FEWEST_UNITS * unit * max(scales)) or FIRST_STEP


def _moved(centers: Arrays, signs: Mapping[str, NDArray[np.float64]], step: float) -> Arrays:
    return {
        name: (array.astype(np.float64) + step * signs[name]).astype(array.dtype) for name, array in centers.items()
    }


def _mean(weight: Weight, moments: dict[Tap, InputMoments]) -> Tensor:
    stacked = reduce(lambda a, b: a.merge(b), (moments[use.tap] for use in weight.uses))
    return stacked.gram() / max(1, stacked.rows)
