"""Choosing what to write: one function a mode, each from trials to a decision.

Settings are decided on `fit` statistics and judged on held-out data; the candidate that is written is solved again
on `full` statistics, which cover all calibration samples. Where held-out data was given, both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.draws import balanced_batch, batch_sizes
from onnx_optshift.decide.gate import Gate, Judged, paired
from onnx_optshift.decide.recapture import affordable, layer_by_layer
from onnx_optshift.decide.share import Shared, share_out
from onnx_optshift.errors import InputError
from onnx_optshift.layers import Arrays, Candidate, Layers
from onnx_optshift.report.model import Trial
from onnx_optshift.workbench import Workbench

# Backing off halves the layer residual this often before layers are given up one group at a time.
HALVINGS = 3
# Trials that a search through groups of layers may cost; groups not reached keep their bytes.
MOST_GROUP_TRIALS = 64
# Layer residuals that `--tolerance auto` walks along before it refines.
AUTO_PATH = tuple(float(f"{x:.4g}") for x in np.geomspace(0.003, 0.5, 12))
# Refusals in a row that end the walk: one may be noise; and rounding to few bits is a lottery, where a little deviation
# gains nothing for certain and a larger one much.
PATIENCE, PATIENCE_ROUNDED = 2, 6
# Seeded draws for each batch size of the stochastic form.
DRAWS = 3


@dataclass(frozen=True)
class Decision:
    """What to write, and the promise that goes with it.

    Attributes:
        candidate: Shifts to write.
        tolerance: Relative deviation of the model outputs that is promised on `covered`; 0 for exact.
        covered: The samples that the promise covers.
        rejected: Reasons, by initializer, for shifts that were found and not taken.
        notes: Sentences for the report.
        judged: The trial that stood for this decision before the gate; None when nothing was judged or accepted.
    """

    candidate: Candidate
    tolerance: float
    covered: Samples
    rejected: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    judged: Trial | None = None


def exact(full: Layers, fit: Layers, gate: Gate | None, samples: Samples) -> Decision:
    """The exact shift of every layer that the gate lets through."""
    candidate = full.candidate(0.0)
    return _exact(candidate, candidate if fit is full else fit.candidate(0.0), gate, samples)


def _exact(candidate: Candidate, trial: Candidate, gate: Gate | None, samples: Samples) -> Decision:
    moved = list(candidate.arrays)
    if not moved or gate is None:
        return Decision(candidate, 0.0, samples)
    names, rejected = _groups(gate, moved, lambda group: trial.only(group).arrays, 0.0, "exact")
    chosen = candidate.only([*names, *_unmoved(candidate)])
    return Decision(chosen, 0.0, samples, rejected, judged=_last_accepted(gate) if names else None)


@dataclass(frozen=True)
class Strategy:
    """A way to solve several layers that share one tolerance.

    Attributes:
        name: For the report.
        full: Layer residual -> shifts solved on all calibration samples.
        fit: The same on the samples that settings are tried on; the same function where none were split off.
    """

    name: str
    full: Callable[[float], Candidate]
    fit: Callable[[float], Candidate]


def strategies(
    bench: Workbench, full: Layers, samples: Samples, fit: Layers, fit_samples: Samples
) -> tuple[Strategy, ...]:
    """All layers against their original inputs; and, where it costs little, layer by layer against re-captured ones."""
    parallel = Strategy("all layers in parallel, against their original inputs", full.candidate, fit.candidate)
    if full.objective != "norm" or not affordable(full):
        return (parallel,)

    def again(layers: Layers, data: Samples) -> Callable[[float], Candidate]:
        return lambda residual: layer_by_layer(bench, layers, data, residual)

    on_all = again(full, samples)
    on_fit = on_all if fit is full else again(fit, fit_samples)
    return (parallel, Strategy("layer by layer, against re-captured inputs", on_all, on_fit))


def within(
    tolerance: float,
    bench: Workbench,
    ways: Sequence[Strategy],
    gate: Gate | None,
    samples: Samples,
) -> Decision:
    """The largest shift whose outputs stay within the tolerance, backed off as far as the gate demands.

    Every strategy uses the tolerance up. The one of least loss on held-out data is taken; without such data, the one
    that leaves the smaller weights.
    """
    found = [(way, share_out(bench, samples, way.full, tolerance)) for way in ways]
    way, candidate, verdict = _taken(found, gate)
    notes = [
        f"{other.name}: layer residual {s.candidate.tolerance:.3g}, model deviation {s.deviation:.3g}, "
        f"squared norm {_squared_norm(s.candidate):.4f} of the original"
        for other, s in found
    ]
    notes.append(f"taken: {way.name}")
    if gate is None:
        return Decision(candidate, tolerance, samples, notes=tuple(notes))
    residual = candidate.tolerance
    for halving in range(HALVINGS + 1):
        if verdict is None:
            trial = way.fit(residual)
            if not trial.arrays:
                break
            verdict, _ = gate.judge(trial.arrays, f"all layers at residual {residual:.3g}", residual)
        if verdict.accepted:
            chosen = candidate if halving == 0 else way.full(residual)
            return Decision(chosen, tolerance, samples, notes=tuple(notes), judged=verdict)
        residual, verdict = residual / 2, None
    # One layer's correction for another makes no sense without that other: groups are solved in parallel.
    chosen, trial = ways[0].full(residual), ways[0].fit(residual)
    names, rejected = _groups(
        gate, list(trial.arrays), lambda group: trial.only(group).arrays, residual, f"at residual {residual:.3g}"
    )
    if not names:
        notes.append("no layer may use any of the tolerance: exact shifts only")
        return replace(_exact(ways[0].full(0.0), ways[0].fit(0.0), gate, samples), notes=tuple(notes))
    chosen = chosen.only([*names, *_unmoved(chosen)])
    return Decision(chosen, tolerance, samples, rejected, tuple(notes), _last_accepted(gate))


def _taken(found: Sequence[tuple[Strategy, Shared]], gate: Gate | None) -> tuple[Strategy, Candidate, Trial | None]:
    """The way to go, its candidate, and that candidate's trial where ways were compared on held-out data."""
    if gate is not None and len(found) > 1:
        fits = [way.fit(shared.candidate.tolerance) for way, shared in found]
        if all(fit.arrays for fit in fits):
            # Smaller weights are a means: at equal deviation they were seen to serve held-out data better, and worse.
            trials = [
                gate.judge(fit.arrays, f"{way.name}, at residual {fit.tolerance:.3g}", fit.tolerance)
                for (way, _), fit in zip(found, fits, strict=True)
            ]
            least = min(range(len(found)), key=lambda k: float(gate.deciding(trials[k][1]).mean()))
            return found[least][0], found[least][1].candidate, trials[least][0]
    way, shared = min(found, key=lambda entry: _squared_norm(entry[1].candidate))
    return way, shared.candidate, None


def _squared_norm(candidate: Candidate) -> float:
    """Mean over layers of ||W||^2 / ||V||^2: every layer counts alike, however large its numbers are."""
    ratios = [
        (solved.shift.norm_after / solved.shift.norm_before) ** 2 if solved.moved else 1.0
        for solved in candidate.solved.values()
        if solved.shift.norm_before > 0
    ]
    return sum(ratios) / len(ratios) if ratios else 1.0


def automatic(bench: Workbench, full: Layers, fit: Layers, gate: Gate | None, samples: Samples) -> Decision:
    """The largest layer residual on the path that held-out data accepts.

    Among the residuals that the gate lets through, the one of least loss is the best guess of where the data's
    support ends; every residual whose paired loss is within one standard error of it is as good as far as the data
    can tell, and the largest of those is taken (one-standard-error rule). A bisection towards the next residual on
    the path refines it.

    Raises:
        InputError: There is no held-out data to decide on.
    """
    if gate is None:
        raise InputError(
            "--tolerance auto decides on held-out data, and there is none: give --heldout, or more calibration samples."
        )
    judged: dict[float, Judged] = {}
    verdicts: dict[float, Trial] = {}

    def accepted(residual: float) -> bool:
        arrays = fit.candidate(residual).arrays
        verdict, after = gate.judge(arrays, f"all layers at residual {residual:.3g}", residual)
        if verdict.accepted:
            judged[residual] = after
            verdicts[residual] = verdict
        return verdict.accepted

    refused_in_a_row = 0
    for residual in AUTO_PATH:
        refused_in_a_row = 0 if accepted(residual) else refused_in_a_row + 1
        if refused_in_a_row == (PATIENCE_ROUNDED if gate.rounds else PATIENCE):
            break
    if not judged:
        return exact(full, fit, gate, samples)
    chosen = _largest_as_good(judged, gate)
    beyond = next((r for r in AUTO_PATH if r > chosen), None)
    for _ in range(2):
        if beyond is None:
            break
        middle = math.sqrt(chosen * beyond)
        if accepted(middle) and _largest_as_good(judged, gate) >= middle:
            chosen = middle
        else:
            beyond = middle
    candidate = full.candidate(chosen)
    deviation = bench.deviation(samples, candidate.arrays).largest_rel()
    # The promise is the measured deviation, rounded up: the file's outputs are compared with it.
    promise = float(f"{1.02 * deviation + 5e-8:.2e}")
    note = f"auto chose layer residual {chosen:.3g}"
    return Decision(candidate, promise, samples, notes=(note,), judged=verdicts[chosen])


def stochastic(
    size: int,
    bench: Workbench,
    samples: Samples,
    classes: NDArray[np.int64],
    layers_for: Callable[[Samples], Layers],
    gate: Gate | None,
    seed: int,
) -> Decision:
    """Exact shifts on class-balanced batches; the gate picks one draw, or none.

    Args:
        size: B; 0 tries several sizes.
        bench: The model.
        samples: The samples to draw from.
        classes: Class of each of them, from labels or from the model's own argmax, `[n]`.
        layers_for: Captures a batch and gives its layers.
        gate: Judges the draws; None takes the first.
        seed: Of the draws.

    Raises:
        InputError: B is out of range.
    """
    present = len(np.unique(classes))
    widest = max(weight.d for weight in bench.weights)
    sizes = [size] if size else batch_sizes(present, len(samples), widest)
    generator = np.random.default_rng(seed)
    found: list[_Draw] = []
    for batch_size in sizes:
        for draw in range(DRAWS):
            batch = samples.select(balanced_batch(classes, batch_size, generator))
            candidate = layers_for(batch).candidate(0.0)
            if not candidate.arrays:
                break
            if gate is None:
                return _stochastic(bench, samples, candidate, batch, None)
            verdict, after = gate.judge(candidate.arrays, f"SOS, B = {batch_size}, draw {draw + 1}", 0.0)
            if verdict.accepted:
                found.append(_Draw(batch_size, candidate, batch, verdict, after))
    if not found:
        unchanged = Candidate({}, 0.0)
        names = [weight.name for weight in bench.weights]
        return Decision(unchanged, 0.0, samples, dict.fromkeys(names, "the gate refused every draw"))
    best = min(found, key=lambda draw: draw.verdict.loss)
    good = [draw for draw in found if _as_good(gate, draw.judged, best.judged)] if gate else found
    # The smallest batch leaves the most freedom; among its draws the best.
    taken = min(good, key=lambda draw: (draw.size, draw.verdict.loss))
    return _stochastic(bench, samples, taken.candidate, taken.batch, taken.verdict)


def _stochastic(
    bench: Workbench, samples: Samples, candidate: Candidate, batch: Samples, verdict: Trial | None
) -> Decision:
    deviation = bench.deviation(samples, candidate.arrays).largest_rel()
    note = (
        f"stochastic: outputs are kept on {len(batch)} class-balanced samples; over all {len(samples)} that they were "
        f"drawn from they deviate by {deviation:.3g}"
    )
    return Decision(candidate, 0.0, batch, notes=(note,), judged=verdict)


@dataclass(frozen=True)
class _Draw:
    """One batch that the gate let through."""

    size: int
    candidate: Candidate
    batch: Samples
    verdict: Trial
    judged: Judged


def _last_accepted(gate: Gate) -> Trial | None:
    return next((trial for trial in reversed(gate.tried) if trial.accepted), None)


def _unmoved(candidate: Candidate) -> list[str]:
    return [name for name, solved in candidate.solved.items() if not solved.moved]


def _as_good(gate: Gate, judged: Judged, best: Judged) -> bool:
    mean, error = paired(gate.deciding(judged), gate.deciding(best))
    return judged is best or mean <= error


def _largest_as_good(judged: dict[float, Judged], gate: Gate) -> float:
    if gate.loss.is_distance and not gate.rounds:
        return max(judged)  # the distance always grows with the residual; the gate has already bounded it
    best = min(judged.values(), key=lambda after: float(gate.deciding(after).mean()))
    if gate.rounds:
        # That error is what the shift is for: more deviation at nearly the same error is no gain.
        return next(residual for residual, after in judged.items() if after is best)
    return max(residual for residual, after in judged.items() if _as_good(gate, after, best))


def _groups(
    gate: Gate, names: Sequence[str], arrays_of: Callable[[Sequence[str]], Arrays], residual: float, how: str
) -> tuple[list[str], dict[str, str]]:
    """Layers that the gate accepts, found by halving refused groups; each is tried on top of those accepted before."""
    accepted: list[str] = []
    rejected: dict[str, str] = {}
    groups: list[Sequence[str]] = [list(names)]
    trials = 0
    while groups:
        group = groups.pop()
        if trials >= MOST_GROUP_TRIALS:
            rejected.update(dict.fromkeys(group, f"the gate's search ended after {MOST_GROUP_TRIALS} trials"))
            continue
        trials += 1
        what = f"{how}: {group[0]}" if len(group) == 1 else f"{how}: {len(group)} layers from {group[0]}"
        verdict, _ = gate.judge(arrays_of([*accepted, *group]), what, residual)
        if verdict.accepted:
            accepted += group
        elif len(group) == 1:
            rejected[group[0]] = f"gate: {verdict.reason}"
        else:
            middle = len(group) // 2
            groups += [group[middle:], group[:middle]]
    return accepted, rejected
