"""Which process solves which layers, and how the statistics of all samples come to it.

Every process captures all layers on its share of the samples. Then the moments of each tap go to one process, its
owner, and to nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.run.candidate import LayerFacts, Solved
from onnx_optshift.run.world import ALONE, Job, World
from onnx_optshift.stats.moments import InputMoments

# Of an eigenvalue decomposition, in multiples of d³ multiplications: what a product of d x d matrices takes is 1.
DECOMPOSITION = 9


class Elsewhere(InputMoments):
    """What other processes know of moments that one of them owns: how many rows there were, not what they hold."""

    def __init__(self, groups: int, width: int, rows: int, nonfinite: int) -> None:
        super().__init__(groups, 0)
        self.width = width
        self.rows = rows
        self.nonfinite = nonfinite

    def merge(self, other: InputMoments) -> InputMoments:
        """Counts of both."""
        return Elsewhere(self.groups, self.width, self.rows + other.rows, self.nonfinite + other.nonfinite)

    @property
    def stored_rows(self) -> Never:
        """They are not here.

        Raises:
            AssertionError: Always.
        """
        raise AssertionError("statistics of another process were asked for")

    def gram(self) -> Tensor:
        """It is not here."""
        return self.stored_rows

    def state(self) -> dict[str, Tensor]:
        """It is not here."""
        return self.stored_rows


def owners_of(weights: Sequence[Weight], waves: Sequence[Sequence[Tap]], size: int) -> dict[Tap, int]:
    """The process that owns each tap: the dearest inputs first, each to the one with the least to do in their wave.

    What a weight reads has one owner, and so has what several weights read together.
    """
    number = {tap: wave for wave, taps in enumerate(waves) for tap in taps}
    groups: list[tuple[set[Tap], float]] = []  # of taps, and what their weights cost
    for weight in weights:
        taps = {use.tap for use in weight.uses}
        joined = [group for group in groups if group[0] & taps]
        groups = [group for group in groups if group not in joined]
        cost = sum((cost for _, cost in joined), weight.groups * weight.d**2 * float(weight.m))
        groups.append((taps.union(*(others for others, _ in joined)), cost))
    found: dict[Tap, int] = {}
    total = [0.0] * size
    for wave in range(len(waves)):
        load = [0.0] * size
        costs = {
            tuple(sorted(taps, key=lambda tap: tap.key)): cost + sum(map(_decomposition, taps))
            for taps, cost in groups
            if number[next(iter(taps))] == wave
        }
        for read, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0][0].key)):
            owner = min(range(size), key=lambda rank: (load[rank], total[rank], rank))
            load[owner] += cost
            total[owner] += cost
            found |= dict.fromkeys(read, owner)
    return found


def _decomposition(tap: Tap) -> float:
    return DECOMPOSITION * tap.groups * float(tap.width) ** 3


def _as_it_is(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array


@dataclass(frozen=True)
class Sharing:
    """How layers are shared out; all of them belong to one process unless stated."""

    world: World = ALONE
    owners: Mapping[Tap, int] = field(default_factory=dict)  # the process that has the statistics of a tap
    keep: Callable[[NDArray[np.generic]], NDArray[np.generic]] = _as_it_is  # where contents of initializers go

    def owner(self, weight: Weight) -> int:
        """The process that solves a weight."""
        return self.owners.get(weight.uses[0].tap, 0)

    def owns(self, weight: Weight) -> bool:
        """Whether it is this one."""
        return self.owner(weight) == self.world.rank

    def at_owner(self, weight: Weight, solve: Callable[[], Solved], facts: dict[str, LayerFacts]) -> Solved:
        """What one process makes of a weight, known to all, with what it has in `facts` of it."""
        solved, known = self.world.once(lambda: (solve(), facts.get(weight.name)), self.owner(weight))
        if known is not None:
            facts[weight.name] = known
        if self.owns(weight) or solved.array is None:
            return solved
        return replace(solved, array=self.keep(solved.array))


ALL_HERE = Sharing()


@dataclass(frozen=True)
class _Form:
    """How one process holds moments of its samples."""

    rows: int
    nonfinite: int
    folded: bool

    @classmethod
    def of(cls, moments: InputMoments) -> _Form:
        return cls(moments.rows, moments.nonfinite, moments.stored_rows is None)


def to_owners(world: World, moments: dict[Tap, InputMoments], owners: Mapping[Tap, int]) -> dict[Tap, InputMoments]:
    """Moments of the samples of all processes at the owner of each tap; counts of them elsewhere. Takes them apart."""
    if not isinstance(world, Job):
        return moments
    # All counts first: who has no rows of a tap sends none, and nobody waits for it.
    forms = world.gather([_Form.of(mine) for mine in moments.values()])
    found: dict[Tap, InputMoments] = {}
    for number, tap in enumerate(list(moments)):
        everywhere = [form[number] for form in forms]
        found[tap] = _at_owner(world, moments.pop(tap), everywhere, owners[tap])
    return found


def _at_owner(world: Job, mine: InputMoments, forms: Sequence[_Form], owner: int) -> InputMoments:
    rows, nonfinite = sum(form.rows for form in forms), sum(form.nonfinite for form in forms)
    if all(form.folded for form in forms):
        state = mine.state()
        for name in ("upper", "total"):
            world.total(state[name], owner)
        if world.rank != owner:
            return Elsewhere(mine.groups, mine.width, rows, nonfinite)
        mine.rows, mine.nonfinite = rows, nonfinite
        return mine
    if world.rank != owner:
        if mine.rows:
            for tensor in _content(mine).values():
                world.send(tensor, owner)
        return Elsewhere(mine.groups, mine.width, rows, nonfinite)
    merged = InputMoments(mine.groups, mine.width, mine.device, mine.products)
    # In the order of the samples: rows that are few stay rows, as in one process.
    for rank, form in enumerate(forms):
        if form.rows:
            merged = merged.merge(mine if rank == owner else _received(world, mine, form, rank))
    merged.nonfinite = nonfinite
    return merged


def _content(moments: InputMoments) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in moments.state().items() if name != "counts"}


def _received(world: Job, like: InputMoments, form: _Form, source: int) -> InputMoments:
    """The moments that another process holds, of the same tap."""
    shape = (like.groups, like.width if form.folded else form.rows, like.width)
    wanted = {"total": like.total.new_empty(like.total.shape)}
    wanted["upper" if form.folded else "rows"] = like.total.new_empty(shape)
    state = {name: world.receive(tensor, source) for name, tensor in wanted.items()}
    counts = torch.tensor([form.rows, form.nonfinite])
    return InputMoments.from_state({**state, "counts": counts}, products=like.products)
