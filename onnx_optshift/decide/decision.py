"""What is going to be written, with the verdict that stands for it: nothing is written that was not judged.

Settings are decided on `fit` statistics and judged on held-out data; the candidate that is written is solved again
on `full` statistics, which cover all calibration samples. Where held-out data was given, both are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.gate import Gate
from onnx_optshift.prove.floor import Promise
from onnx_optshift.report.model import Trial
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import Candidate
from onnx_optshift.run.layers import Layers

# Trials that a search through groups of layers may cost; groups not reached keep their bytes.
MOST_GROUP_TRIALS = 64
UNJUDGED = "without the held-out samples there was no shift of it to be judged"


@dataclass(frozen=True)
class Way:
    """A way to solve several layers that share one tolerance.

    Attributes:
        name: For the report.
        full: Layer residual -> shifts solved on all calibration samples.
        fit: The same on the samples that settings are tried on; the same function where none were split off.
        separable: Whether some layers may be taken without the others.
    """

    name: str
    full: Callable[[float], Candidate]
    fit: Callable[[float], Candidate]
    separable: bool = True


@dataclass(frozen=True)
class Grounds:
    """What decisions are made on.

    Attributes:
        bench: Runs trials.
        full: Layers with the statistics of all calibration samples.
        fit: The same of those that settings are tried on.
        gate: Judges on held-out data; None where there is none.
        samples: All calibration samples.
        tried_on: Those that settings are tried on.
        seed: Of random choices.
    """

    bench: Bench
    full: Layers
    fit: Layers
    gate: Gate | None
    samples: Samples
    tried_on: Samples
    seed: int

    @property
    def parallel(self) -> Way:
        """Every layer against its original inputs: the way whose layers do not depend on each other."""
        return Way("all layers in parallel, against their original inputs", self.full.candidate, self.fit.candidate)


@dataclass(frozen=True)
class Decision:
    """What to write, and the promise and the verdict that go with it.

    Attributes:
        candidate: Shifts to write, and why others are not.
        promise: What the written file is held to.
        way: How the candidate was solved.
        verdict: The trial on held-out data that stands for exactly these layers; None where nothing moves or nothing
            was held out.
        rejected: Reasons, by initializer, for shifts that were found and not taken.
        notes: Sentences for the report.
    """

    candidate: Candidate
    promise: Promise
    way: Way
    verdict: Trial | None = None
    rejected: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measured(grounds: Grounds, candidate: Candidate) -> Promise:
    """The deviation that a candidate shows on all samples, rounded up: the file's outputs are held to it."""
    deviation = grounds.bench.outputs.deviation(grounds.samples, candidate.arrays).largest_rel()
    return Promise(float(f"{1.02 * deviation + 5e-8:.2e}"), "measured", grounds.samples)


def decided(
    grounds: Grounds,
    way: Way,
    residual: float,
    promise: Promise,
    how: str,
    *,
    halvings: int = 0,
    names: Sequence[str] | None = None,
    before: Decision | None = None,
    notes: Sequence[str] = (),
) -> Decision:
    """All layers if held-out data accepts them together, at this layer residual or halves of it; else those it accepts.

    Args:
        grounds: Solves and judges.
        way: How layers are solved.
        residual: That each layer may have.
        promise: What goes with it.
        how: Start of what trials are called in the report.
        halvings: How often the residual is halved before layers are given up.
        names: Layers that may still be taken; all when not given.
        before: The decision that this one replaces; what it rejected stays rejected.
        notes: Sentences for the report.
    """
    rejected, notes = (before.rejected, (*before.notes, *notes)) if before else ({}, tuple(notes))

    def found(pair: _Pair, taken: Sequence[str], verdict: Trial | None, refused: Mapping[str, str]) -> Decision:
        refused = {**rejected, **pair.unjudged, **refused}
        return Decision(pair.written(taken), promise, pair.way, verdict, refused, notes)

    gate = grounds.gate
    for halving in range(halvings + 1):
        tried = residual / 2**halving
        what = f"{how} at residual {tried:.3g}" if tried else how
        pair = _pair(grounds, way, tried, names)
        if not pair.moved or gate is None:
            return found(pair, pair.moved, None, {})
        verdict, _ = gate.judge(pair.trial.only(pair.moved).arrays, what, tried)
        if verdict.accepted:
            return found(pair, pair.moved, verdict, {})
    assert gate is not None
    # One layer's correction for another makes no sense without that other.
    pair = _pair(grounds, way if way.separable else grounds.parallel, tried, names)
    return found(pair, *_of_groups(gate, pair, what))


@dataclass(frozen=True)
class _Pair:
    """A candidate that could be written, and its twin on the samples that settings are tried on, which can be judged.

    Attributes:
        way: How they were solved.
        candidate: Solved on all calibration samples.
        trial: Solved on those that settings are tried on.
        moved: Layers that both move.
        unjudged: Reasons for layers that only the candidate moves.
    """

    way: Way
    candidate: Candidate
    trial: Candidate
    moved: tuple[str, ...]
    unjudged: Mapping[str, str]

    def written(self, names: Sequence[str]) -> Candidate:
        """The candidate with these shifts only, and with all layers that do not move anyway."""
        unmoved = [name for name, solved in self.candidate.solved.items() if not solved.moved]
        return self.candidate.only([*names, *unmoved])


def _pair(grounds: Grounds, way: Way, residual: float, names: Sequence[str] | None) -> _Pair:
    candidate = way.full(residual)
    wanted = [name for name in candidate.arrays if names is None or name in names]
    if len(wanted) < len(candidate.arrays) and not way.separable:
        return _pair(grounds, grounds.parallel, residual, names)
    trial = candidate if way.full == way.fit else way.fit(residual)
    moved = tuple(name for name in wanted if name in trial.arrays)
    unjudged = dict.fromkeys((name for name in wanted if name not in moved), UNJUDGED)
    return _Pair(way, candidate, trial, moved, unjudged)


def _of_groups(gate: Gate, pair: _Pair, how: str) -> tuple[list[str], Trial | None, dict[str, str]]:
    """Layers that the gate accepts, their verdict, and reasons for the others, by halving refused groups.

    Each group is tried on top of those accepted before.
    """
    rejected: dict[str, str] = {}
    accepted: list[str] = []
    verdict: Trial | None = None
    groups: list[Sequence[str]] = [pair.moved] if pair.moved else []
    for _ in range(MOST_GROUP_TRIALS):
        if not groups:
            break
        group = groups.pop()
        what = f"{how}: {group[0]}" if len(group) == 1 else f"{how}: {len(group)} layers from {group[0]}"
        trial, _ = gate.judge(pair.trial.only([*accepted, *group]).arrays, what, pair.trial.tolerance)
        if trial.accepted:
            accepted += group
            verdict = trial
        elif len(group) == 1:
            rejected[group[0]] = f"gate: {trial.reason}"
        else:
            middle = len(group) // 2
            groups += [group[middle:], group[:middle]]
    for group in groups:
        rejected |= dict.fromkeys(group, f"the gate's search ended after {MOST_GROUP_TRIALS} trials")
    return accepted, verdict, rejected
