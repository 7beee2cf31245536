"""The noise floor: how much a model's outputs differ between runs that should agree, and what a promise makes of it.

Noise: the original model against itself with graph optimizations off, and with one thread, at one batch size.
Rounding: the original model with every weight in question moved by one unit in the last place, which no rewriting of
weights can undercut. An exact shift must stay within `NOISE_FACTOR` times the first or `ROUNDING_FACTOR` times the
second, whichever is more, at every output by that output's own figures, in the whole (`rel`) and for every sample
(`max_rel`), and never beyond a limit that still deserves the word: `MOST_EXACT`. Where the noise alone needs more than
that, exactness cannot be shown. A shift with a tolerance must keep `rel` within the tolerance.

In half precision one rounding of a weight or an activation, of unit u, may exceed `MOST_EXACT`: there the limit is
`MOST_ROUNDINGS` u, and noise may be half of that. With single layers of all kinds an exact shift was seen to move
outputs by at most 2 u, and one unit in every weight moves them by 2 to 11 u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.errors import InputError, ToleranceError
from onnx_optshift.graph.bodies import graphs
from onnx_optshift.prove.compare import Deviation, OutputsDifference
from onnx_optshift.report.model import NoiseFloor, OutputComparison, Verification
from onnx_optshift.run.bench import Bench
from onnx_optshift.solve.problem import ROUNDING_UNIT

# A "small multiple" of the noise: different kernels, summation orders and one more rounding each cost a few units.
NOISE_FACTOR = 10.0
# One unit in the last place is already twice what rounding a solution once may do.
ROUNDING_FACTOR = 4.0
# The floor is a maximum, so more samples can only raise it: few give the stricter bound, sooner. Only a file that
# leaves that bound is held against the one of more.
FEW_SAMPLES, NOISE_SAMPLES = 32, 256
# Samples for the figure at another batch size, which is reported beside the floor and is no part of it.
OTHER_BATCH_SAMPLES = 16
# Largest relative deviation that may be called exact; and in rounding units, where those are larger.
MOST_EXACT = 1e-3
MOST_ROUNDINGS = 16
# Below this a float32 figure does not resolve anything; a shorter dtype shows in the rounding floor.
_LEAST = NOISE_FACTOR * ROUNDING_UNIT["float32"]
_HALVES = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
_CHUNK = 1 << 22  # entries of a weight that are in float64 at the same time


@dataclass(frozen=True)
class Promise:
    """How far outputs of a file may be from the original's, and on which samples."""

    tolerance: float  # relative deviation; 0 for exact, infinite where no bound was set
    kind: str  # where it comes from: "noise" of the runtime for exact, a "tolerance" asked for, or "measured" only
    covered: Samples


@dataclass(frozen=True)
class Floor:
    """What an exact shift of one model may do on given data, by output."""

    max_rel: Mapping[str, float]  # bounds on the largest relative difference of a sample, at most `limit`
    rel: Mapping[str, float]  # bounds on the relative Frobenius difference, at most `limit`
    noisy: Mapping[str, float]  # outputs whose runs differ too much for exactness to be shown, and by how much
    limit: float  # largest bound that still is a promise of exactness
    noise: NoiseFloor  # the figures for the report


def noise_floor(bench: Bench, samples: Samples, names: Collection[str], seed: int) -> Floor:
    """The noise floor and the rounding floor of the original on some samples, for changes of these initializers.

    Raises:
        InputError: The model has no output to compare.
    """
    outputs = bench.outputs
    runs = {
        "graph optimizations off": outputs.deviation(
            samples, {}, partial(bench.sessions.open, optimize=False)
        ).results(),
        "one thread": outputs.deviation(samples, {}, partial(bench.sessions.open, threads=1)).results(),
    }
    rounding = outputs.deviation(samples, _one_ulp_away(bench, names, seed)).results() if names else {}
    if not runs["one thread"]:
        raise InputError("verification: the model has no output, so there is nothing to compare. Give it one.")
    noise = {name: [run[name] for run in runs.values()] for name in runs["one thread"]}
    unit = MOST_ROUNDINGS * _coarsest_unit(bench, names)
    limit, most_noise = max(MOST_EXACT, unit), max(MOST_EXACT / NOISE_FACTOR, unit / 2)

    def bounds(figure: Callable[[Deviation], float]) -> dict[str, float]:
        rounded = {name: ROUNDING_FACTOR * figure(deviation) for name, deviation in rounding.items()}
        return {
            name: min(limit, max(_LEAST, rounded.get(name, 0.0), *(NOISE_FACTOR * figure(run) for run in found)))
            for name, found in noise.items()
        }

    worst = {name: max(max(d.max_rel, _rel(d)) for d in found) for name, found in noise.items()}
    other = _other_batch_size(bench, samples)
    bench.sessions.rest()
    return Floor(
        bounds(_max_rel),
        bounds(_rel),
        {name: most for name, most in worst.items() if not most <= most_noise},
        limit,
        NoiseFloor(
            max_rel=max(d.max_rel for found in noise.values() for d in found),
            rel=max(_rel(d) for found in noise.values() for d in found),
            rounding=max((d.max_rel for d in rounding.values()), default=None),
            runs=tuple(runs),
            samples=len(samples),
            batch_size=bench.batch_size,
            other_batch_size=other,
        ),
    )


def verification(results: Mapping[str, Deviation], floor: Floor, promise: Promise) -> Verification:
    """Holds measured deviations, by output on all data that a promise covers, against the bounds.

    Raises:
        InputError: Nothing was compared, of an output at least.
        ToleranceError: Exactness was promised, and cannot be shown on this model.
    """
    if not results or all(deviation.samples == 0 for deviation in results.values()):
        raise InputError("verification: no output was compared on any sample. Give calibration data.")
    blind = ", ".join(repr(name) for name, found in results.items() if found.samples and not found.compared)
    if blind:
        raise InputError(
            f"verification: NaN or infinity is all that output {blind} has, of the original model too, so that nothing "
            "can be proved. Nothing was written. (a) A weight or the calibration data has NaN: see inspect for the "
            "layers. (b) The model overflows. Repair the model, or give other data with --calib."
        )
    tolerance = promise.tolerance
    if tolerance == 0 and floor.noisy:
        raise ToleranceError(cannot_be_exact(floor))
    outputs = []
    for name, found in results.items():
        bound = max(found.rel if math.isinf(tolerance) else tolerance, floor.rel.get(name, 0.0))
        passed = found.rel <= bound < math.inf and (tolerance > 0 or found.max_rel <= floor.max_rel.get(name, 0.0))
        kind = promise.kind if bound > floor.rel.get(name, 0.0) or tolerance == bound else "noise"
        figures = (found.max_abs, found.max_rel, found.rel, found.top1_agreement, found.samples)
        outputs.append(OutputComparison(name, *figures, bound, passed, kind, found.nonfinite))
    return Verification(passed=all(o.passed for o in outputs), outputs=tuple(outputs), noise_floor=floor.noise)


def missed(proof: Verification) -> str:
    """The message for a file that left its bounds."""
    worst = max((o for o in proof.outputs if not o.passed), key=lambda o: o.rel)
    return (
        f"verification: output {worst.name!r} deviates by {worst.rel:.3g} (relative; largest of a sample "
        f"{worst.max_rel:.3g}), allowed is {worst.bound:.3g}, and backing off did not help. Nothing was written. Give "
        "a larger --tolerance, or exclude layers with --nodes-to-exclude."
    )


def cannot_be_exact(floor: Floor) -> str:
    """The message for a model whose own runs differ too much."""
    worst = sorted(floor.noisy.items(), key=lambda item: -item[1])
    outputs = ", ".join(f"{name!r} (by {most:.2g})" for name, most in worst[:5])
    more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
    return (
        "verification: a shift cannot be shown to be exact on this model: runs of the original that should agree "
        f"differ too much at the outputs {outputs}{more}; exact is {floor.limit:.2g} at most. Nothing was written. "
        "Give a --tolerance, remove random operators (Dropout in training mode, RandomNormal, Multinomial), or give "
        "other calibration data."
    )


def _rel(deviation: Deviation) -> float:
    return deviation.rel if not math.isnan(deviation.rel) else math.inf


def _max_rel(deviation: Deviation) -> float:
    return deviation.max_rel


def _coarsest_unit(bench: Bench, names: Collection[str]) -> float:
    """The largest rounding unit of weights that change and of values that are computed in half precision."""
    main = bench.model.proto.graph
    kinds = {value.type.tensor_type.elem_type for value in main.input}
    nodes = [node for graph in graphs(main) for node in graph.node]
    nodes += [node for function in bench.model.proto.functions for node in function.node]
    kinds |= {attribute.i for node in nodes for attribute in node.attribute if attribute.name in {"to", "dtype"}}
    halves = {name for kind, name in _HALVES.items() if kind in kinds}
    dtypes = halves | {weight.dtype for weight in bench.weights if weight.name in names}
    return max((ROUNDING_UNIT[dtype] for dtype in dtypes), default=0.0)


def _one_ulp_away(bench: Bench, names: Collection[str], seed: int) -> dict[str, NDArray[np.generic]]:
    """The original weights, each entry moved by one unit in the last place in a random direction."""
    generator = np.random.default_rng(seed)
    units = {weight.name: ROUNDING_UNIT[weight.dtype] for weight in bench.weights}
    moved = {}
    for name in sorted(names):
        original = bench.model.initializer(name)
        result = np.empty_like(original, subok=False)
        before, after = original.reshape(-1), result.reshape(-1)
        for start in range(0, before.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            sign = generator.integers(0, 2, before[part].shape) * 2.0 - 1.0
            after[part] = before[part].astype(np.float64) * (1 + 2 * units[name] * sign)
        moved[name] = bench.sessions.keep(result)
    return moved


def _other_batch_size(bench: Bench, samples: Samples) -> float | None:
    """Largest `max_rel` of a few samples run one at a time instead of in batches; None where it means nothing."""
    few = samples.select(np.arange(min(OTHER_BATCH_SAMPLES, len(samples))))
    session, difference = bench.sessions.original(), OutputsDifference()
    together = [session.run(batch.feeds) for batch in few.batches(len(few))]
    alone = [session.run(batch.feeds) for batch in few.batches(1)]
    if any(not np.issubdtype(v.dtype, np.floating) or v.ndim == 0 for run in together for v in run.values()):
        return None
    for name in alone[0]:
        rows = [[row for run in runs for row in run[name]] for runs in (alone, together)]
        for a, b in zip(*rows, strict=False):  # padding has no partner
            if a.shape == b.shape:
                difference.update({name: a}, {name: b}, 1)
    return max((deviation.max_rel for deviation in difference.results().values()), default=0.0)
