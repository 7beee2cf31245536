"""What is known of a layer, its solution, and candidates: solutions of all layers at one residual tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.run.world import ALONE, World
from onnx_optshift.solve.objective import Objective, Point
from onnx_optshift.solve.problem import Problem
from onnx_optshift.solve.rounding_error import output_errors
from onnx_optshift.solve.shift import Outcome, Shift

# Places along a layer's spectrum that the report shows, and the tolerances of its frontier.
SPECTRUM_POINTS = 33
FRONTIER = (0.0, 0.003, 0.01, 0.03, 0.1, 0.2)

Arrays = Mapping[str, NDArray[np.generic]]
"""Contents of initializers, by name."""


@dataclass(frozen=True)
class LayerFacts:
    """What a layer's statistics say before anything is solved, of its weight V `[g, d, m]`."""

    rows: int  # calibration rows that met it
    rank: int  # directions of the input that matter, mean over groups, as `Coordinates.rank`
    free: int  # directions that do not, over all groups
    norm: float  # ‖V‖_F
    largest: float  # largest absolute weight
    figure: float  # the objective's headline figure
    frontier: tuple[Point, ...]  # what other tolerances would give, by the objective
    spectrum: tuple[float, ...]  # singular values of the rows as shares of the largest, some of d
    rounding: Mapping[Grid, float]  # relative output error under round-to-nearest


def facts_of(
    problem: Problem, objective: Objective, grids: Sequence[Grid], rows: int, *, representative: bool
) -> LayerFacts:
    """The facts of a layer whose equation is known; what a tolerance would buy only where rows are representative."""
    coordinates, matrix = problem.coordinates, problem.matrix
    original = Shift.unchanged(matrix, Outcome.ALREADY_MINIMAL)
    values = problem.spectrum.eigenvalues.mean(0).clamp_min(0).sqrt().cpu()
    values = torch.nn.functional.pad(values, (0, matrix.shape[1] - len(values)))
    places = np.unique(np.linspace(0, len(values) - 1, min(SPECTRUM_POINTS, len(values))).round().astype(int))
    largest = float(values[0]) or 1.0
    return LayerFacts(
        rows,
        coordinates.rank,
        coordinates.free,
        original.norm_before,
        original.range_before,
        objective.measure(problem, matrix),
        tuple(objective.frontier(problem, FRONTIER)) if representative else (),
        tuple(float(values[place]) / largest for place in places),
        output_errors(problem.spectrum, matrix, matrix, grids),
    )


@dataclass(frozen=True)
class Solved:
    """One layer's shift, and what it becomes in the file."""

    shift: Shift  # how the solution came about; its matrix is dropped, `array` is what remains of it
    array: NDArray[np.generic] | None  # new content in the initializer's dtype and shape; None when its bytes stay
    residual: float  # ‖A(W - V)‖_F / ‖A V‖_F of what stands in the file
    figure: float = 0.0  # the objective's headline figure of what stands in the file
    rounding: Mapping[Grid, float] = field(default_factory=dict)  # relative output error under round-to-nearest
    note: str = ""  # why another norm was made small than the one asked for; empty where it was not
    allowed: float | None = None  # residual of the layer where it has one of its own; None where all share one

    @property
    def moved(self) -> bool:
        """Whether the initializer's bytes change."""
        return self.array is not None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A set of shifts that could be written, by initializer name."""

    solved: Mapping[str, Solved]
    tolerance: float  # the residual that each layer was allowed
    facts: Mapping[str, LayerFacts] = field(default_factory=dict)  # of the layers that were looked at

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """New contents of the initializers that change."""
        return {name: solved.array for name, solved in self.solved.items() if solved.array is not None}

    def only(self, names: Iterable[str]) -> Candidate:
        """The same shifts, but only of these initializers; the rest keep their bytes."""
        chosen = set(names)
        return replace(self, solved={name: solved for name, solved in self.solved.items() if name in chosen})


def while_held(solve: Callable[[float], Candidate], world: World = ALONE) -> Callable[[float], Candidate]:
    """The same, but what somebody still holds is not solved again; in several processes, what all of them hold."""
    alive: WeakValueDictionary[float, Candidate] = WeakValueDictionary()

    def solved(tolerance: float) -> Candidate:
        found = alive.get(tolerance)
        if not world.agree(found is not None) or found is None:
            found = alive[tolerance] = solve(tolerance)
        return found

    return solved
