"""Layers whose solutions a checkpoint keeps: what was solved before, of the same statistics, is not solved again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.graph.weights import Weight
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.run.candidate import LayerFacts, Solved
from onnx_optshift.run.checkpoint import Checkpoint, Entry, content, digest
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve.grid_rounding import Start
from onnx_optshift.solve.problem import Problem
from onnx_optshift.solve.shift import Outcome, Shift


class KeptLayers(Layers):
    """See `Layers`, and `checkpoint` for what is kept where.

    A solution belongs to the content of all that it is made from, so that whatever led to these statistics counts.
    """

    def __init__(self, *args: Any, checkpoint: Checkpoint, **options: Any) -> None:
        super().__init__(*args, **options)
        self._checkpoint = checkpoint

    def solve(self, weight: Weight, tolerance: float) -> Solved:
        """See `Layers.solve`."""
        solve = super().solve
        return self._once(weight, f"within {tolerance!r}", lambda: solve(weight, tolerance))

    def snap(self, weight: Weight, start: Start, instead: Problem | None = None) -> Solved:
        """See `Layers.snap`."""
        snap, what = super().snap, f"on the grid from {start!r}"
        if instead is not None:
            what += f" towards {content(instead.matrix, instead.spectrum.eigenvalues, instead.spectrum.basis)}"
        return self._once(weight, what, lambda: snap(weight, start, instead))

    def start(self, weight: Weight, most: float, *, snap: bool) -> Start:
        """See `Layers.start`."""
        choose = super().start
        return self._checkpoint.once(
            "start",
            lambda: self._origin(weight, f"start within {most!r}, snap {snap}, by {content(self.judging(weight))}"),
            lambda: choose(weight, most, snap=snap),
            lambda start: Entry(facts=asdict(start)),
            lambda entry: Start(**entry.facts),
        )

    def _once(self, weight: Weight, what: str, solve: Callable[[], Solved]) -> Solved:
        """A solution, and the facts of the layer, which are noted."""
        if self.blocked(weight) is not None:
            return solve()
        dtype = self._content(weight.name).dtype
        solved, facts = self._checkpoint.once(
            "solution",
            lambda: self._origin(weight, what),
            lambda: (solve(), self.facts[weight.name]),
            _packed,
            lambda entry: _unpacked(entry, dtype, self.sharing.keep),
        )
        self.facts.setdefault(weight.name, facts)
        return solved

    def _origin(self, weight: Weight, what: str) -> str:
        """All that a solution of a weight is made from besides the model."""
        objective = f"{type(self.objective).__name__} {vars(self.objective)!r}, errors at {self._grids!r}"
        return digest(weight.name, what, objective, f"{torch.get_num_threads()} threads", *self.factored.hashes(weight))


def _packed(found: tuple[Solved, LayerFacts]) -> Entry:
    solved, facts = found
    shift = _values(solved.shift, without=("matrix",)) | {"outcome": solved.shift.outcome.name}
    values = _values(solved, without=("array", "shift"))
    arrays: dict[str, NDArray[Any]] = {} if solved.array is None else {"weight": solved.array}
    return Entry(arrays, {"solved": values, "shift": shift, "facts": _values(facts)})


def _unpacked(
    entry: Entry, dtype: np.dtype[Any], keep: Callable[[NDArray[Any]], NDArray[Any]]
) -> tuple[Solved, LayerFacts]:
    solved, shift, facts = (dict(entry.facts[part]) for part in ("solved", "shift", "facts"))
    array = entry.arrays.get("weight")
    shift |= {"matrix": torch.empty(0), "outcome": Outcome[shift["outcome"]]}
    # bfloat16 comes back as two bytes; a copy of its own lets go of the file's content.
    solved |= {"array": None if array is None else keep(array.view(dtype).copy()), "shift": Shift(**shift)}
    for values in (solved, facts):
        values["rounding"] = {Grid(**grid): error for grid, error in values["rounding"]}
    facts |= {"frontier": tuple(map(tuple, facts["frontier"])), "spectrum": tuple(facts["spectrum"])}
    return Solved(**solved), LayerFacts(**facts)


def _values(found: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fields of a dataclass as JSON has them."""
    values = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in without}
    if isinstance(rounding := values.get("rounding"), Mapping):
        values["rounding"] = [(asdict(grid), error) for grid, error in rounding.items()]
    return values
