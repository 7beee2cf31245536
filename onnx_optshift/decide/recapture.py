"""Layer by layer: each layer is solved for the inputs it really gets once earlier layers have moved.

A layer that is rounded is rounded towards V*, the least-squares solution of `A'W ≈ A V` with a ridge that draws it to
V: so it makes up for the rounding of all layers before it (the idea of GPTAQ, Li et al. 2025, arXiv 2504.02692). At 4
to 2 bits that took a fifth to more than half off the outputs' error of three small models.

Of shifts within a residual: with rows A of the original model, rows A' of the model whose earlier layers are shifted,
and the original target Z = A V, a layer may correct for what came before it:
`min ||W||_F  s.t.  ||A'W - Z||² <= ||A'V* - Z||² + eps² ||Z||²`, around the least-squares solution
`V* = (A'ᵀA')⁺ A'ᵀA V`: see `solve.towards`.

Costs two runs of the data and two products of all rows for each distinct input, so it is tried by itself only where
both are few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.session import Session
from onnx_optshift.capture.stream import stream
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.run.bench import Bench, taps_of
from onnx_optshift.run.candidate import Arrays, Candidate, Solved
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.on_grid import Starts, gathered
from onnx_optshift.run.ownership import to_owners
from onnx_optshift.solve.grid_rounding import LEAST_RIDGE, Start
from onnx_optshift.solve.problem import ROUNDING_UNIT, Problem
from onnx_optshift.solve.shift import Outcome, Shift
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.solve.towards import towards
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import to_rows

# Beyond this many layers the extra passes cost more than the 5 to 10 per cent of norm they have been seen to give.
MOST_LAYERS = 12
# Multiplications of one product of all rows, over all layers: some seconds on a few cores.
MOST_WORK = 2e11
# Rows that are multiplied at the same time.
ROWS_AT_ONCE = 8192
# Rows for each input of the widest layer that are captured again where weights are going to be rounded.
ROWS_PER_INPUT = 4

Pair = tuple[InputMoments, Tensor]
"""Moments of rows A' `[g, n, d]`, and A'ᵀA `[g, d, d]`."""


def worth_it(layers: Layers, wanted: str) -> bool:
    """Whether to solve layers one after the other too: "always", "none", or "auto" where model and data are small."""
    weights = list(layers.weights.values())
    if wanted == "none" or len(weights) < 2:
        return False
    if any(use.tap.inside for weight in weights for use in weight.uses):
        return False  # shifted weights may change which branch runs and how often: there are no pairs of rows then
    if wanted == "always":
        return True
    if len(weights) > MOST_LAYERS:
        return False
    rows = {w.name: sum(layers.store.rows(use.tap) for use in w.uses) for w in weights}
    return sum(rows[w.name] * w.groups * w.d**2 for w in weights) <= MOST_WORK


def layer_by_layer(bench: Bench, layers: Layers, samples: Samples, residual: float) -> Candidate:
    """Shifts of all weights in graph order, each for re-captured inputs and within a residual of its own outputs."""
    solved: dict[str, Solved] = {}
    for weight in layers.weights.values():
        arrays = Candidate(solved, residual).arrays
        layers.factored.moments(weight)  # all processes capture them, before one solves
        held = capture_moved(bench, taps_of([weight]), samples, arrays) if arrays else {}
        solved[weight.name] = layers.at_owner(weight, partial(_solve, layers, weight, residual, held))
    return Candidate(solved, residual, layers.facts)


def _solve(layers: Layers, weight: Weight, residual: float, held: Mapping[Tap, Pair]) -> Solved:
    original = layers.solve(weight, residual)
    if not held:
        return original
    moved, cross = _of_all_uses(held, weight)
    if not _usable(moved.rows, moved.gram(), cross) or layers.blocked(weight) or not original.shift.norm_before:
        return original
    matrix = layers.matrix(weight)
    energy = float((matrix * (layers.factored.moments(weight).gram() @ matrix)).sum())
    shift = towards(factor(moved), cross @ matrix, energy, residual, ROUNDING_UNIT[weight.dtype])
    # Measured against the weight it replaces, not against the centre it was solved around; a path that finds nothing
    # smaller than the centre gives the centre, which still corrects for what moved before.
    before = Shift.unchanged(matrix, Outcome.SHIFTED)
    shift = replace(shift, outcome=Outcome.SHIFTED, norm_before=before.norm_before, range_before=before.range_before)
    return layers.finish(weight, layers.problem(weight), shift, residual)


def rounded_in_order(bench: Bench, layers: Layers, samples: Samples, starts: Starts) -> Candidate:
    """All weights on the quantizer's grid in graph order, each for the inputs it gets once those before it moved."""
    solved: dict[str, Solved] = {}
    few = _enough(layers, samples)
    # One session for all of them: to make it takes as long as a run of some samples. A large model has none to spare.
    session = None if bench.sessions.large else bench.sessions.probe(bench.taps, [w.name for w in bench.weights])
    # Layers that read the same value are captured together: none of them comes before another.
    read: tuple[Tap, ...] = ()
    held: Mapping[Tap, Pair] = {}
    for weight in layers.each("round layer by layer", all_of_them=True):
        arrays, start = Candidate(solved, 0.0).arrays, starts.get(weight.name)
        if start is None:
            solved[weight.name] = layers.at_owner(weight, partial(layers.solve, weight, 0.0))
            continue
        if arrays and (taps := _read(weight)) != read:
            read, held = taps, {}  # before the next ones are captured, not after
            together = [w for w in layers.weights.values() if _read(w) == taps]
            held = capture_moved(bench, taps_of(together), few, arrays, session)
        pairs = held if arrays else {}
        solved[weight.name] = layers.at_owner(weight, partial(_snapped, layers, weight, start, pairs))
    return gathered(layers, starts, solved)


def _snapped(layers: Layers, weight: Weight, start: Start, held: Mapping[Tap, Pair]) -> Solved:
    return layers.snap(weight, start, _corrected(weight, layers.matrix(weight), held) if held else None)


def _read(weight: Weight) -> tuple[Tap, ...]:
    """What a weight reads, however its rows are weighed."""
    return tuple(replace(use.tap, weighed="") for use in weight.uses)


def _corrected(weight: Weight, matrix: Tensor, held: Mapping[Tap, Pair]) -> Problem | None:
    """The problem of V*; None where no rows tell of one."""
    moved, cross = _of_all_uses(held, weight)
    gram = moved.gram()
    if not _usable(moved.rows, gram, cross):
        return None
    ridge = LEAST_RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    if not bool((ridge > 0).all()):
        return None
    gram += ridge * torch.eye(weight.d, dtype=gram.dtype, device=gram.device)
    target = torch.cholesky_solve(cross @ matrix + ridge * matrix, torch.linalg.cholesky(gram))
    return Problem(factor(moved), target, ROUNDING_UNIT[weight.dtype])


def _of_all_uses(held: Mapping[Tap, Pair], weight: Weight) -> Pair:
    return reduce(lambda a, b: (a[0].merge(b[0]), a[1] + b[1]), (held[use.tap] for use in weight.uses))


def _usable(rows: int, gram: Tensor, cross: Tensor) -> bool:
    """Whether there are rows, and numbers in all products: once layers have moved, half precision may overflow."""
    return rows > 0 and bool(torch.isfinite(cross).all() and torch.isfinite(gram).all())


def _enough(layers: Layers, samples: Samples) -> Samples:
    """Of samples as many, evenly spaced, as bring every layer rows enough."""
    shares = [
        ROWS_PER_INPUT * weight.d / max(1, sum(layers.store.rows(use.tap) for use in weight.uses))
        for weight in layers.weights.values()
    ]
    return samples.spread(math.ceil(min(1.0, max(shares)) * len(samples)))


def capture_moved(
    bench: Bench, taps: Sequence[Tap], samples: Samples, arrays: Arrays, session: Session | None = None
) -> dict[Tap, Pair]:
    """By tap: moments of its rows A' once these weights have moved, and A'ᵀA `[g, d, d]` with the original rows A."""
    found: dict[Tap, Pair] = {}
    for tap in taps:
        cross = torch.zeros(tap.groups, tap.width, tap.width, dtype=torch.float64, device=bench.device.solve)
        found[tap] = (InputMoments(tap.groups, tap.width, bench.device.solve, bench.products), cross)
    before: dict[Tap, Tensor] = {}
    session = session or bench.sessions.probe(taps, [w.name for w in bench.weights])

    def keep(tap: Tap, _: Batch, activation: Tensor) -> None:
        before[tap] = to_rows(activation, tap).clone()

    def join(tap: Tap, _: Batch, activation: Tensor) -> None:
        after, original = to_rows(activation, tap), before[tap]
        if (weigh := bench.rules.get(tap.weighed)) is not None:
            roots = weigh(original).sqrt().to(after)[:, None]
            after, original = after * roots, original * roots
        moved, cross = found[tap]
        for start in range(0, after.shape[1], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            moved.update(after[:, part])
            left, right = (rows[:, part].to(cross.device, bench.products) for rows in (after, original))
            cross += left.mT @ right

    mine = bench.outputs.share(samples)
    with bench.progress.stage("capture again", len(mine)) as advance:
        for batch in mine.batches(bench.batch_size):
            stream(session, taps, [batch], keep)
            stream(session, taps, [batch], join, overrides=arrays, done=advance)
    del session
    bench.sessions.rest()
    moments = to_owners(bench.world, {tap: moved for tap, (moved, _) in found.items()}, bench.owners)
    for tap, (_, cross) in found.items():
        bench.world.total(cross, bench.owners[tap])
    return {tap: (moments[tap], cross) for tap, (_, cross) in found.items()}
