"""The proof: how much a model's outputs differ between runs that should agree, and whether a shifted file stays within.

Noise floor: the original model against itself with graph optimizations off, and with one thread, at one batch size.
Rounding floor: the original model with every weight in question moved by one unit in the last place, which no rewriting
of weights can undercut. An exact shift must stay within `NOISE_FACTOR` times the first or `ROUNDING_FACTOR` times the
second, whichever is more, at every output, in the whole (`rel`) and for every sample (`max_rel`). A shift with a
tolerance must keep `rel` within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.session import Session
from onnx_optshift.errors import InputError, ToleranceError
from onnx_optshift.layers import ROUNDING_UNIT
from onnx_optshift.report.model import NoiseFloor, OutputComparison, Verification
from onnx_optshift.verify.compare import Deviation
from onnx_optshift.workbench import Workbench

# A "small multiple" of the noise: different kernels, summation orders and one more rounding each cost a few units.
NOISE_FACTOR = 10.0
# One unit in the last place is already twice what rounding a solution once may do.
ROUNDING_FACTOR = 4.0
# The floor is a maximum, so more samples can only raise it: a part of the data gives the stricter bound, sooner.
NOISE_SAMPLES = 256
# Samples for the figure at another batch size, which is reported beside the floor and is no part of it.
OTHER_BATCH_SAMPLES = 16
# A model whose own runs differ by more than this is random or chaotic: equality cannot be shown.
MOST_NOISE = 0.05
_CHUNK = 1 << 22  # entries of a weight that are in float64 at the same time


@dataclass(frozen=True)
class Floor:
    """What an exact shift of one model may do on given data, per output.

    Attributes:
        max_rel: Bound on the largest relative difference of a sample, by output.
        rel: Bound on the relative Frobenius difference, by output.
        noise: The figures for the report.
    """

    max_rel: Mapping[str, float]
    rel: Mapping[str, float]
    noise: NoiseFloor


def noise_floor(bench: Workbench, samples: Samples, arrays: Mapping[str, NDArray[np.generic]], seed: int) -> Floor:
    """Measures the noise floor and the rounding floor of the original model.

    Args:
        bench: The model.
        samples: Calibration data; the first `NOISE_SAMPLES` are used.
        arrays: The initializers that will change (their new content is not looked at, only their names).
        seed: Of the rounding directions.

    Raises:
        InputError: The model has no output to compare.
        ToleranceError: The model's own runs differ so much that nothing can be proved.
    """
    part = samples.select(np.arange(min(NOISE_SAMPLES, len(samples))))
    runs = {
        "graph optimizations off": bench.deviation(part, {}, partial(bench.session, optimize=False)).results(),
        "one thread": bench.deviation(part, {}, partial(bench.session, threads=1)).results(),
    }
    rounding = bench.deviation(part, _one_ulp_away(bench, arrays, seed)).results() if arrays else {}
    names = list(runs["one thread"])
    if not names:
        raise InputError("verification: the model has no output, so there is nothing to compare. Give it one.")
    noise = {name: [run[name] for run in runs.values()] for name in names}
    largest = max(_rel(d) for found in noise.values() for d in found)
    if arrays and not largest <= MOST_NOISE:
        raise ToleranceError(
            f"verification: two runs of the original model on the same data differ by {largest:.2g} (relative), more "
            f"than {MOST_NOISE}: its outputs are random or chaotic, and equality cannot be shown. Remove random "
            "operators (Dropout in training mode, RandomNormal, Multinomial), or give other calibration data."
        )
    # Below this a float32 figure does not resolve anything; a shorter dtype shows in the rounding floor.
    least = NOISE_FACTOR * ROUNDING_UNIT["float32"]

    def bound(figure: Callable[[Deviation], float], name: str) -> float:
        rounded = ROUNDING_FACTOR * figure(rounding[name]) if rounding else 0.0
        return max(least, rounded, *(NOISE_FACTOR * figure(deviation) for deviation in noise[name]))

    other = _other_batch_size(bench, part)
    bench.rest()
    return Floor(
        {name: bound(lambda deviation: deviation.max_rel, name) for name in names},
        {name: bound(_rel, name) for name in names},
        NoiseFloor(
            max_rel=max(d.max_rel for found in noise.values() for d in found),
            rel=largest,
            rounding=max((d.max_rel for d in rounding.values()), default=None),
            runs=tuple(runs),
            samples=len(part),
            batch_size=bench.batch_size,
            other_batch_size=other,
        ),
    )


def verification(
    results: Mapping[str, Deviation], floor: Floor, tolerance: float, *, attempts: int, reverted: tuple[str, ...]
) -> Verification:
    """Holds measured deviations against the bounds.

    Args:
        results: Deviation by output, of the written file on all data that the promise covers.
        floor: Noise of the original.
        tolerance: Relative deviation that the outputs may show; 0 for exact.
        attempts: How many candidates were written and compared.
        reverted: Initializers that were put back on the way.

    Raises:
        InputError: Nothing was compared.
    """
    if not results or all(deviation.samples == 0 for deviation in results.values()):
        raise InputError("verification: no output was compared on any sample. Give calibration data.")
    outputs = []
    for name, deviation in results.items():
        bound = max(tolerance, floor.rel.get(name, 0.0))
        passed = deviation.rel <= bound
        if tolerance == 0:
            passed = passed and deviation.max_rel <= floor.max_rel.get(name, 0.0)
        outputs.append(
            OutputComparison(
                name=name,
                max_abs=deviation.max_abs,
                max_rel=deviation.max_rel,
                rel=deviation.rel,
                top1_agreement=deviation.top1_agreement,
                samples=deviation.samples,
                bound=bound,
                passed=passed,
            )
        )
    return Verification(
        passed=all(output.passed for output in outputs),
        outputs=tuple(outputs),
        noise_floor=floor.noise,
        attempts=attempts,
        reverted=reverted,
    )


def _rel(deviation: Deviation) -> float:
    return deviation.rel if not math.isnan(deviation.rel) else math.inf


def _one_ulp_away(
    bench: Workbench, arrays: Mapping[str, NDArray[np.generic]], seed: int
) -> dict[str, NDArray[np.generic]]:
    """The original weights, each entry moved by one unit in the last place in a random direction."""
    generator = np.random.default_rng(seed)
    units = {weight.name: ROUNDING_UNIT[weight.dtype] for weight in bench.weights}
    moved = {}
    for name in arrays:
        original = bench.model.initializer(name)
        result = np.empty_like(original, subok=False)
        before, after = original.reshape(-1), result.reshape(-1)
        for start in range(0, before.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            sign = generator.integers(0, 2, before[part].shape) * 2.0 - 1.0
            after[part] = before[part].astype(np.float64) * (1 + 2 * units[name] * sign)
        moved[name] = bench.keep(result)
    return moved


def _other_batch_size(bench: Workbench, samples: Samples) -> float | None:
    """Largest `max_rel` of a few samples run one at a time instead of in batches; None where batches are fixed."""
    few = samples.select(np.arange(min(OTHER_BATCH_SAMPLES, len(samples))))
    session: Session = bench.original
    together: dict[str, list[NDArray[np.float64]]] = {}
    alone: dict[str, list[NDArray[np.float64]]] = {}
    for into, size in ((together, len(few)), (alone, 1)):
        for batch in few.batches(size):
            for name, value in session.run(batch.feeds).items():
                if not np.issubdtype(value.dtype, np.floating) or value.ndim == 0:
                    return None
                into.setdefault(name, []).extend(value.astype(np.float64))
    largest = 0.0
    for name, rows in together.items():
        for a, b in zip(alone[name], rows, strict=False):
            if a.shape == b.shape and np.abs(b).max(initial=0.0) > 0:
                largest = max(largest, float(np.abs(a - b).max(initial=0.0) / np.abs(b).max(initial=0.0)))
    return largest
