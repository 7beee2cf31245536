"""Choosing what to write: one function a mode, each from trials to a decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.by_rounding import by_rounding
from onnx_optshift.decide.decision import Decision, Grounds, Way, decided, measured
from onnx_optshift.decide.draws import balanced_batch, batch_sizes, classes_of
from onnx_optshift.decide.gate import NO_INCREASE, Gate, Judged, paired
from onnx_optshift.decide.recapture import affordable, layer_by_layer
from onnx_optshift.decide.share import share_out
from onnx_optshift.errors import InputError
from onnx_optshift.prove.floor import Promise
from onnx_optshift.report.model import Trial
from onnx_optshift.run.candidate import Candidate, while_held
from onnx_optshift.run.layers import Layers
from onnx_optshift.settings import Settings

# Backing off halves the layer residual this often before layers are given up one group at a time.
HALVINGS = 3
# Layer residuals that `--tolerance auto` walks along before it refines.
AUTO_PATH = tuple(float(f"{x:.4g}") for x in np.geomspace(0.003, 0.5, 12))
NO_BETTER = "gate: no residual that was tried serves held-out data better than the exact shift"
# Refusals in a row that end the walk: one may be noise; and rounding to few bits is a lottery, where a little deviation
# gains nothing for certain and a larger one much.
PATIENCE, PATIENCE_ROUNDED = 2, 6
# Bisections around the best residual of the path.
REFINEMENTS = 2
# Seeded draws for each batch size of the stochastic form.
DRAWS = 3


def choose(grounds: Grounds, settings: Settings, layers_for: Callable[[Samples], Layers]) -> Decision:
    """What to write, by the mode that the settings ask for.

    Args:
        grounds: Solves and judges.
        settings: `stochastic` and `tolerance` name the mode.
        layers_for: Captures a batch and gives its layers, for the stochastic form.

    Raises:
        InputError: The data does not suffice for the mode.
    """
    if settings.stochastic is not None:
        classes = classes_of(grounds.bench.outputs, grounds.tried_on)
        return stochastic(grounds, settings.stochastic, classes, layers_for)
    rounded = bool(grounds.full.objective.grids)
    # One file lies on one grid: what several widths are asked for stays narrow for all of them.
    snap = rounded and settings.snap and len(settings.quantization_bits) == 1
    if settings.tolerance == "auto":
        return by_rounding(_judged(grounds), snap=snap) if rounded else automatic(_judged(grounds))
    if settings.tolerance == 0:
        return exact(grounds)
    notes: tuple[str, ...] = ()
    if snap:
        decision = by_rounding(grounds, snap=True, most=settings.tolerance)
        if decision.promise.tolerance <= settings.tolerance:
            return replace(decision, promise=Promise(settings.tolerance, "tolerance", grounds.samples))
        notes = (
            f"on the quantizer's grid the outputs deviate by {decision.promise.tolerance:.2g}, more than the "
            "tolerance: the weights are only made narrow. --tolerance auto puts them on the grid",
        )
    decision = within(grounds, settings.tolerance)
    return replace(decision, notes=(*notes, *decision.notes))


def _judged(grounds: Grounds) -> Grounds:
    """The same.

    Raises:
        InputError: There is no held-out data to decide on.
    """
    if grounds.gate is None:
        raise InputError(
            "--tolerance auto decides on held-out data, and there is none: give --heldout, or more calibration samples."
        )
    return grounds


def exact(grounds: Grounds) -> Decision:
    """The exact shift of every layer that the gate accepts."""
    return decided(grounds, grounds.parallel, 0.0, Promise(0.0, "noise", grounds.samples), "exact")


def within(grounds: Grounds, tolerance: float) -> Decision:
    """The largest shift whose outputs stay within the tolerance, backed off as far as the gate demands.

    Every way uses the tolerance up. The one of least loss on held-out data is taken; without such data, the one that
    leaves the smaller weights.
    """
    promise = Promise(tolerance, "tolerance", grounds.samples)
    outputs, samples = grounds.bench.outputs, grounds.samples
    # All candidates are held until one is taken, so that none of them is solved twice.
    found = [(way, share_out(outputs, samples, way.full, tolerance, grounds.seed)) for way in _ways(grounds)]
    fits = [way.fit(shared.candidate.tolerance) for way, shared in found]
    notes = [
        f"{way.name}: layer residual {s.candidate.tolerance:.3g}, model deviation {s.deviation:.3g}, "
        f"squared norm {_squared_norm(s.candidate):.4f} of the original"
        for way, s in found
    ]
    taken = _least_loss(grounds, [way.name for way, _ in found], fits)
    way, residual = found[taken][0], fits[taken].tolerance
    notes.append(f"taken: {way.name}")
    decision = decided(grounds, way, residual, promise, "all layers", halvings=HALVINGS, notes=notes)
    if decision.candidate.arrays:
        return decision
    notes.append("no layer may use any of the tolerance: exact shifts only")
    fallback = exact(grounds)
    # Why a layer moved at no residual says more than why it has no exact shift.
    stuck = {name: solved for name, solved in decision.candidate.solved.items() if not solved.moved}
    moved = {name: solved for name, solved in fallback.candidate.solved.items() if solved.moved}
    candidate = replace(fallback.candidate, solved={**fallback.candidate.solved, **stuck, **moved})
    rejected = {**decision.rejected, **fallback.rejected}
    return replace(fallback, candidate=candidate, notes=tuple(notes), rejected=rejected)


def _ways(grounds: Grounds) -> list[Way]:
    """All layers in parallel; and, where it costs little, layer by layer against re-captured inputs."""
    full, fit = grounds.full, grounds.fit
    if full.objective.grids or full.objective.needs_slopes or not affordable(full):
        return [grounds.parallel]

    def again(layers: Layers, data: Samples) -> Callable[[float], Candidate]:
        return while_held(lambda residual: layer_by_layer(grounds.bench, layers, data, residual))

    on_all = again(full, grounds.samples)
    on_fit = on_all if fit is full else again(fit, grounds.tried_on)
    return [grounds.parallel, Way("layer by layer, against re-captured inputs", on_all, on_fit, separable=False)]


def _least_loss(grounds: Grounds, names: Sequence[str], fits: Sequence[Candidate]) -> int:
    """Which of some candidates to take: of least loss on held-out data, else of smallest weights."""
    gate = grounds.gate
    if gate is None or len(fits) == 1 or not all(fit.arrays for fit in fits):
        return min(range(len(fits)), key=lambda k: _squared_norm(fits[k]))
    # Smaller weights are a means: at equal deviation they were seen to serve held-out data better, and worse.
    judged = [
        gate.judge(fit.arrays, f"{name}, at residual {fit.tolerance:.3g}", fit.tolerance)[1]
        for name, fit in zip(names, fits, strict=True)
    ]
    return min(range(len(fits)), key=lambda k: float(gate.deciding(judged[k]).mean()))


def _squared_norm(candidate: Candidate) -> float:
    """Mean over layers of ||W||^2 / ||V||^2: every layer counts alike, however large its numbers are."""
    ratios = [
        (solved.shift.norm_after / solved.shift.norm_before) ** 2 if solved.moved else 1.0
        for solved in candidate.solved.values()
        if solved.shift.norm_before > 0
    ]
    return sum(ratios) / len(ratios) if ratios else 1.0


def automatic(grounds: Grounds) -> Decision:
    """The layer residual, exact among them, of least loss on held-out data; among equals the smallest.

    The loss is that of the model as it is, or the quantized model's error where weights are going to be rounded. Two
    are equal where they differ by no more than rounding. Without labels the only loss is the distance to the original,
    which no shift can make smaller: then only the exact one is taken.
    """
    gate = grounds.gate
    assert gate is not None
    if gate.loss.is_distance and not gate.rounds:
        note = "auto: without labels no held-out loss can fall, so that only exact shifts are taken"
        return replace(exact(grounds), notes=(note,))
    tried: dict[float, Judged] = {0.0: gate.before}  # until the exact shift is accepted: no shift is worth a loss
    walked: set[float] = set()
    refused: dict[str, str] = {}

    def accepted(residual: float) -> bool:
        walked.add(residual)
        arrays = grounds.fit.candidate(residual).arrays
        if not arrays:
            return True  # nothing moves: no harm, and nothing to judge
        verdict, after = gate.judge(arrays, f"all layers at residual {residual:.3g}", residual)
        if verdict.accepted:
            tried[residual] = after
        reason = f"gate: {verdict.reason}" if not any(tried) else NO_BETTER
        refused.update({name: reason for name in arrays if reason is NO_BETTER or name not in refused})
        return verdict.accepted

    refused_in_a_row = 0
    for residual in (0.0, *AUTO_PATH):
        refused_in_a_row = 0 if accepted(residual) else refused_in_a_row + 1
        if refused_in_a_row == (PATIENCE_ROUNDED if gate.rounds else PATIENCE):
            break
    for _ in range(REFINEMENTS):
        best = _least(tried, gate)
        for other in _neighbours(best, [*AUTO_PATH, *walked]):
            accepted(math.sqrt(best * other))
    chosen = _least(tried, gate)
    note = f"auto chose layer residual {chosen:.3g}" if chosen else "auto chose the exact shift"
    if not chosen:
        decision = exact(grounds)
        return replace(decision, rejected={**refused, **decision.rejected}, notes=(note,))
    candidate = grounds.full.candidate(chosen)  # held, so that it is not solved again
    promise = measured(grounds, candidate)
    return decided(grounds, grounds.parallel, chosen, promise, "auto", notes=(note,))


def _least(tried: dict[float, Judged], gate: Gate) -> float:
    losses = {residual: float(gate.deciding(judged).mean()) for residual, judged in tried.items()}
    best = min(losses.values())
    return min(residual for residual, loss in losses.items() if loss <= best + NO_INCREASE * abs(best))


def _neighbours(residual: float, path: Sequence[float]) -> list[float]:
    below = max((r for r in path if 0 < r < residual), default=None)
    above = min((r for r in path if r > residual), default=None)
    return [r for r in (below, above) if r is not None and residual > 0]


@dataclass(frozen=True)
class _Draw:
    """One batch that the gate accepted."""

    size: int
    candidate: Candidate
    batch: Samples
    verdict: Trial | None
    judged: Judged | None


def stochastic(
    grounds: Grounds, size: int, classes: NDArray[np.int64], layers_for: Callable[[Samples], Layers]
) -> Decision:
    """Exact shifts on class-balanced batches; the gate picks one draw, or none.

    Args:
        grounds: Runs and judges; draws are of the samples that settings are tried on.
        size: B; 0 tries several sizes.
        classes: Class of each of these samples, from labels or from the model's own argmax, `[n]`.
        layers_for: Captures a batch and gives its layers.

    Raises:
        InputError: B is out of range.
    """
    gate, samples = grounds.gate, grounds.tried_on
    widest = max(weight.d for weight in grounds.bench.weights)
    sizes = [size] if size else batch_sizes(len(np.unique(classes)), len(samples), widest)
    generator = np.random.default_rng(grounds.seed)
    found: list[_Draw] = []
    candidate = Candidate({}, 0.0)
    for batch_size in sizes:
        for draw in range(DRAWS):
            batch = samples.select(balanced_batch(classes, batch_size, generator))
            candidate = layers_for(batch).candidate(0.0)
            if not candidate.arrays:
                break
            if gate is None:
                return _drawn(grounds, _Draw(batch_size, candidate, batch, None, None))
            verdict, after = gate.judge(candidate.arrays, f"SOS, B = {batch_size}, draw {draw + 1}", 0.0)
            if verdict.accepted:
                found.append(_Draw(batch_size, candidate, batch, verdict, after))
    if not found or gate is None:
        refused = [trial for trial in gate.tried if not trial.accepted] if gate else []
        moved = list(candidate.arrays)
        rejected = dict.fromkeys(moved, f"gate: every draw was rejected ({refused[-1].reason})") if refused else {}
        kept = candidate.only(name for name in candidate.solved if name not in moved)
        return Decision(kept, Promise(0.0, "noise", samples), grounds.parallel, rejected=rejected)
    best = min(found, key=_loss)
    good = [draw for draw in found if draw is best or _as_good(gate, draw, best)]
    # The smallest batch leaves the most freedom; among its draws the best.
    return _drawn(grounds, min(good, key=lambda draw: (draw.size, _loss(draw))))


def _loss(draw: _Draw) -> float:
    return draw.verdict.loss if draw.verdict else 0.0


def _as_good(gate: Gate, draw: _Draw, best: _Draw) -> bool:
    assert draw.judged is not None
    assert best.judged is not None
    mean, error = paired(gate.deciding(draw.judged), gate.deciding(best.judged))
    return mean <= error


def _drawn(grounds: Grounds, draw: _Draw) -> Decision:
    deviation = grounds.bench.outputs.deviation(grounds.tried_on, draw.candidate.arrays).largest_rel()
    note = (
        f"stochastic: outputs are kept on {len(draw.batch)} class-balanced samples; over all {len(grounds.tried_on)} "
        f"that they were drawn from they deviate by {deviation:.3g}"
    )
    way = Way(f"stochastic, B = {draw.size}", lambda _: draw.candidate, lambda _: draw.candidate)
    return Decision(draw.candidate, Promise(0.0, "noise", draw.batch), way, draw.verdict, notes=(note,))
