"""Choosing what to write: one function a mode, each from trials to a decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.by_rounding import by_rounding
from onnx_optshift.decide.decision import Decision, Grounds, Way, decided, unbounded
from onnx_optshift.decide.draws import balanced_batch, batch_sizes, classes_of
from onnx_optshift.decide.gate import NO_INCREASE, paired
from onnx_optshift.decide.recapture import layer_by_layer, worth_it
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
# Refusals in a row that end the walk: one may be noise.
PATIENCE = 2
# Bisections around the best residual of the path.
REFINEMENTS = 2
# Seeded draws for each batch size of the stochastic form.
DRAWS = 3


def choose(grounds: Grounds, settings: Settings, layers_for: Callable[[Samples], Layers]) -> Decision:
    """What to write, by the mode that the settings ask for; `layers_for` gives the layers of a batch that was drawn.

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
        if grounds.gate is None:
            raise InputError(
                "--tolerance auto decides on held-out data, and there is none: give --heldout, or more calibration "
                "samples."
            )
        return by_rounding(grounds, snap=snap) if rounded else automatic(grounds)
    if settings.tolerance == 0:
        return exact(grounds)
    notes: tuple[str, ...] = ()
    if snap:
        decision = by_rounding(grounds, snap=True, most=settings.tolerance)
        arrays = decision.candidate.arrays
        deviation = grounds.bench.outputs.deviation(grounds.samples, arrays).largest_rel() if arrays else 0.0
        if deviation <= settings.tolerance:
            return replace(decision, promise=Promise(settings.tolerance, "tolerance", grounds.samples))
        notes = (
            f"on the quantizer's grid the outputs deviate by {deviation:.2g}, more than the "
            "tolerance: the weights are only made narrow. --tolerance auto puts them on the grid",
        )
    decision = within(grounds, settings.tolerance)
    return replace(decision, notes=(*notes, *decision.notes))


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
    if full.objective.grids or full.objective.needs_slopes or not worth_it(full, grounds.recapture):
        return [grounds.parallel]

    def again(layers: Layers, data: Samples) -> Callable[[float], Candidate]:
        return while_held(lambda residual: layer_by_layer(grounds.bench, layers, data, residual), grounds.bench.world)

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

    Two losses are equal where they differ by no more than rounding. Without labels the only loss is the distance to the
    original, which no shift can make smaller: then only the exact one is taken.
    """
    gate = grounds.gate
    assert gate is not None
    if gate.loss.is_distance:
        note = "auto: without labels no held-out loss can fall, so that only exact shifts are taken"
        return replace(exact(grounds), notes=(note,))
    # That of the original stands for the exact shift until that is accepted: no shift is worth a loss.
    losses = {0.0: float(gate.deciding(gate.before).mean())}
    walked = set(AUTO_PATH)
    refused: dict[str, str] = {}

    def accepted(residual: float) -> bool:
        walked.add(residual)
        arrays = grounds.fit.candidate(residual).arrays
        if not arrays:
            return True  # nothing moves: no harm, and nothing to judge
        verdict, after = gate.judge(arrays, f"all layers at residual {residual:.3g}", residual)
        if verdict.accepted:
            losses[residual] = float(gate.deciding(after).mean())
        for name in arrays:
            refused.setdefault(name, f"gate: {verdict.reason}")
        return verdict.accepted

    def least() -> float:
        best = min(losses.values())
        return min(residual for residual, loss in losses.items() if loss <= best + NO_INCREASE * abs(best))

    in_a_row = 0
    for residual in (0.0, *AUTO_PATH):
        in_a_row = 0 if accepted(residual) else in_a_row + 1
        if in_a_row == PATIENCE:
            break
    for _ in range(REFINEMENTS):
        if best := least():
            below, above = [r for r in walked if 0 < r < best], [r for r in walked if r > best]
            for other in ([max(below)] if below else []) + ([min(above)] if above else []):
                accepted(math.sqrt(best * other))
    if not (chosen := least()):
        decision = exact(grounds)
        reasons = dict.fromkeys(refused, NO_BETTER) if any(losses) else refused
        return replace(decision, rejected={**reasons, **decision.rejected}, notes=("auto chose the exact shift",))
    note = f"auto chose layer residual {chosen:.3g}"
    return decided(grounds, grounds.parallel, chosen, unbounded(grounds), "auto", notes=(note,))


@dataclass(frozen=True)
class _Draw:
    """One batch that the gate accepted."""

    candidate: Candidate
    batch: Samples
    verdict: Trial
    losses: NDArray[np.float64]  # that draws are ranked by, one for each held-out sample


def stochastic(
    grounds: Grounds, size: int, classes: NDArray[np.int64], layers_for: Callable[[Samples], Layers]
) -> Decision:
    """Exact shifts on class-balanced batches of B samples (several sizes for 0); the gate picks one draw, or none.

    Draws are of the samples that settings are tried on, whose classes `[n]` are given.

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
                return _drawn(grounds, candidate, batch, None)
            verdict, after = gate.judge(candidate.arrays, f"SOS, B = {batch_size}, draw {draw + 1}", 0.0)
            if verdict.accepted:
                found.append(_Draw(candidate, batch, verdict, gate.deciding(after)))
    if not found:
        refused = [trial for trial in gate.tried if not trial.accepted] if gate else []
        moved = list(candidate.arrays)
        rejected = dict.fromkeys(moved, f"gate: every draw was rejected ({refused[-1].reason})") if refused else {}
        kept = candidate.only(name for name in candidate.solved if name not in moved)
        return Decision(kept, Promise(0.0, "noise", samples), rejected=rejected)
    best = min(found, key=lambda draw: float(draw.losses.mean()))
    differences = [paired(draw.losses, best.losses) for draw in found]
    good = [draw for draw, (mean, error) in zip(found, differences, strict=True) if draw is best or mean <= error]
    # The smallest batch leaves the most freedom; among its draws the best.
    taken = min(good, key=lambda draw: (len(draw.batch), float(draw.losses.mean())))
    return _drawn(grounds, taken.candidate, taken.batch, taken.verdict)


def _drawn(grounds: Grounds, candidate: Candidate, batch: Samples, verdict: Trial | None) -> Decision:
    deviation = grounds.bench.outputs.deviation(grounds.tried_on, candidate.arrays).largest_rel()
    note = (
        f"stochastic: outputs are kept on {len(batch)} class-balanced samples; over all {len(grounds.tried_on)} that "
        f"they were drawn from they deviate by {deviation:.3g}"
    )
    return Decision(candidate, Promise(0.0, "noise", batch), verdict=verdict, notes=(note,))
