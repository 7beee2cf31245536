"""What is going to be written, with the verdict that stands for it: nothing is written that was not judged.

Settings are decided on `fit` statistics and judged on held-out data; the candidate that is written is solved again
on `full` statistics, which cover all calibration samples. Where held-out data was given, both are the same.
"""

from __future__ import annotations

import math
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
    """A way to solve several layers that share one tolerance."""

    name: str  # for the report
    full: Callable[[float], Candidate]  # layer residual -> shifts solved on all calibration samples
    fit: Callable[[float], Candidate]  # on those that settings are tried on; the same where none were split off
    separable: bool = True  # whether some layers may be taken without the others


def as_given(candidate: Candidate) -> Way:
    """The way of a candidate that is not solved again."""
    return Way("as given", lambda _: candidate, lambda _: candidate)


@dataclass(frozen=True)
class Grounds:
    """What decisions are made on."""

    bench: Bench  # runs trials
    full: Layers  # with the statistics of all calibration samples
    fit: Layers  # with those of the samples that settings are tried on
    gate: Gate | None  # judges on held-out data; None where there is none
    samples: Samples  # all calibration samples
    tried_on: Samples  # those that settings are tried on
    seed: int  # of random choices
    recapture: str = "auto"  # whether layers are also solved one after the other: auto, always or none

    @property
    def parallel(self) -> Way:
        """Every layer against its original inputs: the way whose layers do not depend on each other."""
        return Way("all layers in parallel, against their original inputs", self.full.candidate, self.fit.candidate)


@dataclass(frozen=True)
class Decision:
    """What to write, and the promise and the verdict that go with it."""

    candidate: Candidate  # shifts to write, and why others are not
    promise: Promise  # what the written file is held to
    way: Way | None = None  # how the candidate was solved, where another may be
    # The trial on held-out data that stands for exactly these layers; None where nothing moves or nothing was held out.
    verdict: Trial | None = None
    rejected: Mapping[str, str] = field(default_factory=dict)  # why shifts were found and not taken, by initializer
    notes: tuple[str, ...] = ()  # sentences for the report


def unbounded(grounds: Grounds) -> Promise:
    """No bound was set: what the written file deviates by is measured on all samples, and reported."""
    return Promise(math.inf, "measured", grounds.samples)


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

    Trials are called `how` in the report. Only layers of these `names` may be taken, where they are given; what a
    decision `before`, which this one replaces, rejected stays rejected.
    """
    rejected, notes = (before.rejected, (*before.notes, *notes)) if before else ({}, tuple(notes))

    def found(pair: _Pair, taken: Sequence[str], verdict: Trial | None, refused: Mapping[str, str]) -> Decision:
        refused = {**rejected, **pair.unjudged, **refused}
        return Decision(pair.written(taken), promise, pair.way, verdict, refused, notes)

    gate = grounds.gate
    tried_before: dict[str, str] = {}
    for halving in range(halvings + 1):
        tried = residual / 2**halving
        what = f"{how} at residual {tried:.3g}" if tried else how
        pair = _pair(grounds, way, tried, names)
        if not pair.moved or gate is None:
            return found(pair, pair.moved, None, tried_before)
        verdict, _ = gate.judge(pair.trial.only(pair.moved).arrays, what, tried)
        if verdict.accepted:
            return found(pair, pair.moved, verdict, {})
        tried_before = dict.fromkeys(pair.moved, f"gate: {verdict.reason}")  # where half of it moves nothing
    assert gate is not None
    # One layer's correction for another makes no sense without that other.
    pair = _pair(grounds, way if way.separable else grounds.parallel, tried, names)
    return found(pair, *_of_groups(gate, pair, what))


@dataclass(frozen=True)
class _Pair:
    """A candidate that could be written, and its twin on the samples that settings are tried on, to be judged."""

    way: Way
    candidate: Candidate  # solved on all calibration samples
    trial: Candidate  # solved on those that settings are tried on
    moved: tuple[str, ...]  # layers that both move
    unjudged: Mapping[str, str]  # reasons for layers that only the candidate moves

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
