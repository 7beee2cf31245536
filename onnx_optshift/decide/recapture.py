"""Layer by layer: each layer is solved for the inputs it really gets once earlier layers have moved.

With rows A of the original model, rows A' of the model whose earlier layers are shifted, and the original target
Z = A V, a layer may correct for what came before it: `min ||W||_F  s.t.  ||A'W - Z||² <= ||A'V* - Z||² + eps² ||Z||²`,
around the least-squares solution `V* = (A'ᵀA')⁺ A'ᵀA V`: the ball of `solve.error_ball` around V*.

Costs two runs of the data and two products of all rows for each layer, so it is tried only where both are few.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.stream import stream
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.run.bench import Bench, taps_of
from onnx_optshift.run.candidate import Arrays, Candidate, Solved
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve.error_ball import BallPath
from onnx_optshift.solve.problem import ROUNDING_UNIT
from onnx_optshift.solve.shift import Outcome, Shift
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import to_rows

# Beyond this many layers the extra passes cost more than the 5 to 10 per cent of norm they have been seen to give.
MOST_LAYERS = 12
# Multiplications of one product of all rows, over all layers: some seconds on a few cores.
MOST_WORK = 2e11
# Rows that are in float64 at the same time where two captures are multiplied.
ROWS_AT_ONCE = 8192


def affordable(layers: Layers) -> bool:
    """Whether a model is small enough, with its data, to be solved layer by layer."""
    weights = list(layers.weights.values())
    if not 1 < len(weights) <= MOST_LAYERS:
        return False
    if any(use.tap.inside for weight in weights for use in weight.uses):
        return False  # shifted weights may change which branch runs and how often: there are no pairs of rows then
    rows = {w.name: sum(layers.store.rows(use.tap) for use in w.uses) for w in weights}
    return sum(rows[w.name] * w.groups * w.d**2 for w in weights) <= MOST_WORK


def layer_by_layer(bench: Bench, layers: Layers, samples: Samples, residual: float) -> Candidate:
    """Shifts of all weights in graph order, each for re-captured inputs and within a residual of its own outputs."""
    solved: dict[str, Solved] = {}
    for weight in layers.weights.values():
        arrays = Candidate(solved, residual).arrays
        if not arrays:
            solved[weight.name] = layers.solve(weight, residual)
            continue
        solved[weight.name] = _solve(bench, layers, samples, weight, residual, arrays)
    return Candidate(solved, residual, layers.facts)


def _solve(bench: Bench, layers: Layers, samples: Samples, weight: Weight, residual: float, arrays: Arrays) -> Solved:
    moved, cross = _capture_moved(bench, weight, samples, arrays)
    original = layers.solve(weight, residual)
    if moved.nonfinite or moved.rows == 0 or layers.blocked(weight) or not original.shift.norm_before:
        return original
    matrix = layers.matrix(weight)
    spectrum = factor(moved)
    inverse = torch.where(spectrum.eigenvalues > 0, 1 / spectrum.eigenvalues, 0.0)
    # V* within the span of the new rows; beyond it the equation says nothing, and the smallest solution has nothing.
    center = spectrum.basis @ (inverse[..., None] * spectrum.coordinates(cross @ matrix))
    target = float((matrix * (layers.moments(weight).gram() @ matrix)).sum())
    reached = float((spectrum.eigenvalues[..., None] * spectrum.coordinates(center).square()).sum())
    scale = math.sqrt(max(target, 0.0))
    floor = math.sqrt(max(target - reached, 0.0)) / scale if scale else 0.0
    path = BallPath(spectrum, center, ROUNDING_UNIT[weight.dtype], floor=floor, scale=scale)
    # What cannot be reached at all is not the layer's to answer for: it gets its residual on top of that. Otherwise a
    # layer with a floor above its residual would be solved by V* itself, which noise in A' can make arbitrarily large.
    shift = path.at(math.hypot(residual, floor))
    # Measured against the weight it replaces, not against the centre it was solved around; a path that finds nothing
    # smaller than the centre gives the centre, which still corrects for what moved before.
    before = Shift.unchanged(matrix, Outcome.SHIFTED)
    shift = replace(shift, outcome=Outcome.SHIFTED, norm_before=before.norm_before, range_before=before.range_before)
    return layers.finish(weight, layers.problem(weight), shift, residual)


def _capture_moved(bench: Bench, weight: Weight, samples: Samples, arrays: Arrays) -> tuple[InputMoments, torch.Tensor]:
    """Moments of the rows A' that meet a weight once others have moved, and A'ᵀA `[g, d, d]` with the original A."""
    taps = taps_of([weight])
    copies = {tap: sum(use.tap == tap for use in weight.uses) for tap in taps}
    moved = InputMoments(weight.groups, weight.d, bench.device.solve)
    cross = torch.zeros(weight.groups, weight.d, weight.d, dtype=torch.float64, device=bench.device.solve)
    before: dict[Tap, torch.Tensor] = {}
    session = bench.sessions.probe(taps, [w.name for w in bench.weights])

    def keep(tap: Tap, _: Batch, activation: torch.Tensor) -> None:
        before[tap] = to_rows(activation, tap).clone()

    def join(tap: Tap, _: Batch, activation: torch.Tensor) -> None:
        after, original = to_rows(activation, tap), before[tap]
        if (weigh := bench.rules.get(tap.weighed)) is not None:
            roots = weigh(original).sqrt().to(after)[:, None]
            after, original = after * roots, original * roots
        for start in range(0, after.shape[1], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            for _copy in range(copies[tap]):
                moved.update(after[:, part])
                cross.baddbmm_(after[:, part].mT.to(cross), original[:, part].to(cross))

    with bench.progress.stage(f"capture again for {weight.name}", len(samples)) as advance:
        for batch in samples.batches(bench.batch_size):
            stream(session, taps, [batch], keep)
            stream(session, taps, [batch], join, overrides=arrays, done=advance)
    return moved, cross
