"""The layers of one model as problems, solved one by one or all at one residual tolerance.

Joins the ONNX side (weights, taps) with the numerical side (moments, spectra, shifts); neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.capture.statistics import StatisticsStore
from onnx_optshift.graph.weights import Weight
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.candidate import Candidate, LayerFacts, Solved, facts_of, while_held
from onnx_optshift.run.factored import Factored, stacked
from onnx_optshift.run.ownership import ALL_HERE, Sharing
from onnx_optshift.run.spanning import Spanning
from onnx_optshift.run.threads import threads_for
from onnx_optshift.solve.finish import as_matrix, finished
from onnx_optshift.solve.grid_choice import choose, choose_residual
from onnx_optshift.solve.grid_rounding import Start, on_grid
from onnx_optshift.solve.objective import Norm, Objective
from onnx_optshift.solve.problem import ROUNDING_UNIT, Problem
from onnx_optshift.solve.rounding_error import output_errors
from onnx_optshift.solve.shift import Outcome, Shift, obstacle

# Directions, as a share of all, that a rank rises by from a part of the samples to all of them while it still grows.
MORE_RANK = 0.01


class Layers:
    """All layers of a model with the statistics of their inputs.

    One factorization serves every tolerance, and every layer that reads the same input. It is kept as long as the
    moments are, because the search for a tolerance comes back for it.

    Args:
        weights: The weights to be solved for, in graph order.
        store: Moments of every tap of those weights.
        content: Reads an initializer by name.
        objective: What is made small.
        device: The torch device of the solvers.
        slopes: Moments of how far earlier weights move the rows of every tap, for objectives that need them.
        judge: Moments of rows that did not fit the layers; None where there are none.
        grids: What the report shows rounding errors for.
        sharing: Which process solves which layers, and where new contents of initializers go.
        spanning: Factorizations of taps that needed no more rows, where captures looked for these.

    Attributes:
        factored: Rows of every weight, and their factorizations.
        candidate: Shifts of all weights at one residual tolerance per layer, wave by wave.
        facts: What is known of each layer that was looked at, by initializer name.
        part: The same layers by a part of the same samples; None where there are none.
    """

    def __init__(
        self,
        weights: Iterable[Weight],
        store: StatisticsStore,
        content: Callable[[str], NDArray[np.generic]],
        objective: Objective | None = None,
        *,
        device: str = "cpu",
        slopes: StatisticsStore | None = None,
        judge: StatisticsStore | None = None,
        grids: Sequence[Grid] = (),
        sharing: Sharing = ALL_HERE,
        progress: Progress = SILENT,
        spanning: Spanning | None = None,
    ) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.store = store
        self.factored = Factored(store, slopes, spanning)
        self.objective: Objective = objective or Norm()
        self.facts: dict[str, LayerFacts] = {}
        self.part: Layers | None = None
        self._content = content
        self._device = device
        self._judge = judge
        self._grids = tuple(grids)
        self.sharing = sharing
        self._progress = progress
        self._last: tuple[str, Problem] | None = None  # a layer is looked at and solved in a row
        self._finite: dict[str, bool] = {}  # whether all entries of a weight are
        self.candidate = while_held(self._candidate, sharing.world)
        # Solutions that had an objection: the search for a tolerance comes back to the same residuals.
        self._objections: dict[tuple[str, float], Solved] = {}

    def _candidate(self, tolerance: float) -> Candidate:
        solved = {weight.name: self.solve(weight, tolerance) for weight in self.each("solve")}
        return Candidate(self.together(solved), tolerance, self.facts)

    def at_owner(self, weight: Weight, solve: Callable[[], Solved]) -> Solved:
        """What a weight's owner makes of it, and its facts, known to all processes."""
        return self.sharing.at_owner(weight, solve, self.facts)

    def together(self, solved: Mapping[str, Solved]) -> dict[str, Solved]:
        """What the processes have made of their own weights, as one, in graph order."""
        return {w.name: self.at_owner(w, partial(solved.__getitem__, w.name)) for w in self.weights.values()}

    def each(self, stage: str, *, judged: bool = False, all_of_them: bool = False) -> Iterator[Weight]:
        """This process's weights, or all of them, wave by wave, as one stage; `judged` if it asks for judging rows."""
        with self._progress.stage(stage, len(self.weights)) as advance:
            for weight in sorted(self.weights.values(), key=self.factored.wave):
                self.factored.load(weight)
                if judged and self.blocked(weight) is None:
                    (self._judge or self.store).load(self.factored.wave(weight))
                if all_of_them or self.sharing.owns(weight):
                    with threads_for(weight.groups * weight.d * weight.m, self.factored.threads):
                        yield weight
                advance(1)

    def survey(self) -> Mapping[str, LayerFacts]:
        """Looks at every layer, wave by wave, without solving; what it finds is in `facts`."""
        for weight in sorted(self.weights.values(), key=self.factored.wave):
            if weight.name not in self.facts and self.blocked(weight) is None:
                self.problem(weight)
        return self.facts

    def solve(self, weight: Weight, tolerance: float) -> Solved:
        """The shift of one weight at a residual tolerance or below, as it would stand in the file."""
        blocked = self.blocked(weight)
        if blocked is not None:
            return _unmoved(Shift.unchanged(self.matrix(weight), blocked))
        problem = self.problem(weight)
        solved: Solved | None = None
        for residual in self.objective.residuals(tolerance):
            solved = self._objections.get((weight.name, residual)) or self._solve(weight, problem, residual)
            if solved.moved or (weight.name, residual) not in self._objections:
                return solved
        assert solved is not None
        return solved

    def snap(self, weight: Weight, start: Start, instead: Problem | None = None) -> Solved:
        """One weight on the grid that the objective has; for another problem than its own where one is given."""
        blocked = self.blocked(weight)
        if blocked is not None:
            return _unmoved(Shift.unchanged(self.matrix(weight), blocked))
        original = self.problem(weight)
        problem = instead or original
        coordinates = problem.coordinates
        stuck = obstacle(coordinates)
        if stuck is not None:
            return _unmoved(Shift.unchanged(original.matrix, stuck, rank=coordinates.rank))
        shift = Shift.moved_to(coordinates, on_grid(problem, self.objective.grids[0], start), outcome=Outcome.SNAPPED)
        before = Shift.unchanged(original.matrix, Outcome.SNAPPED)
        shift = replace(shift, norm_before=before.norm_before, range_before=before.range_before)
        array = finished(shift.matrix, weight.form, self._content(weight.name).dtype)
        return replace(self.measured(weight, original, shift, array), allowed=start.residual)

    def growing(self, weight: Weight) -> bool | None:
        """Whether the rank of a layer is low only because samples are few; None where the layer was not looked at.

        It is where a part of them has a lower one, or where there are no more rows than directions.
        """
        facts, part = self.facts.get(weight.name), self.part.facts.get(weight.name) if self.part else None
        if facts is None:
            return None
        if part is None:
            return facts.free > 0 and facts.rows <= facts.rank
        return part.free - facts.free > max(1, MORE_RANK * weight.groups * weight.d)

    def start(self, weight: Weight, most: float, *, snap: bool) -> Start:
        """From where a weight is best rounded, at a residual of so much at most; only narrowed unless `snap`."""
        problem, judge, grids = self.problem(weight), self.judging(weight), self.objective.grids
        return choose(problem, grids[0], judge, most) if snap else Start(choose_residual(problem, grids, judge, most))

    def judging(self, weight: Weight) -> torch.Tensor:
        """AᵀA `[g, d, d]` of rows that did not fit a weight; of those that did where there are no others."""
        store = self._judge or self.store
        return stacked(store.load(self.factored.wave(weight)), weight).gram()

    def finish(self, weight: Weight, problem: Problem, shift: Shift, residual: float) -> Solved:
        """A solution as it would stand in the file; where the objective finds that not worth it, the weight stays."""
        array = finished(shift.matrix, weight.form, self._content(weight.name).dtype)
        written = as_matrix(array, weight.form, self._device)
        objection = self.objective.objection(problem, written, residual)
        if objection is not None:
            return _unmoved(Shift.unchanged(problem.matrix, objection, rank=shift.rank))
        return self.measured(weight, problem, shift, array, written)

    def measured(
        self,
        weight: Weight,
        problem: Problem,
        shift: Shift,
        array: NDArray[np.generic],
        written: torch.Tensor | None = None,
    ) -> Solved:
        """Other content of a weight's initializer (`written` as a matrix), with its figures; the shift says how."""
        written = as_matrix(array, weight.form, self._device) if written is None else written
        now = Shift.unchanged(written, shift.outcome)
        # The solution in float64 has done its work; a model's worth of them would be twice its size.
        shift = replace(shift, matrix=torch.empty(0), norm_after=now.norm_before, range_after=now.range_before)
        return Solved(
            shift,
            self.sharing.keep(array),
            problem.residual(written),
            self.objective.measure(problem, written),
            output_errors(problem.spectrum, problem.matrix, written, self._grids),
            problem.note,
        )

    def problem(self, weight: Weight) -> Problem:
        """The equation of one weight; notes its facts the first time."""
        spectrum = self.factored.spectrum(weight)
        if self._last is not None and self._last[0] == weight.name and self._last[1].spectrum is spectrum:
            return self._last[1]
        metric, note = self.factored.metric(weight)
        problem = Problem(spectrum, self.matrix(weight), ROUNDING_UNIT[weight.dtype], metric, note)
        self._last = (weight.name, problem)
        if weight.name not in self.facts:
            rows, whole = self.factored.moments(weight).rows, self.factored.representative(weight)
            self.facts[weight.name] = facts_of(problem, self.objective, self._grids, rows, representative=whole)
        return problem

    def matrix(self, weight: Weight) -> torch.Tensor:
        """V `[g, d, m]` of a weight, float64 on the solvers' device."""
        if self._last is not None and self._last[0] == weight.name:
            return self._last[1].matrix
        return as_matrix(self._content(weight.name), weight.form, self._device)

    def _solve(self, weight: Weight, problem: Problem, residual: float) -> Solved:
        shift = self.objective.solve(problem, residual)
        if not shift.outcome.moved:
            return _unmoved(shift)
        solved = self.finish(weight, problem, shift, residual)
        if not solved.moved:
            self._objections[weight.name, residual] = solved
        return solved

    def blocked(self, weight: Weight) -> Outcome | None:
        """Why there is no equation to solve."""
        moments = self.factored.moments(weight)
        if moments.nonfinite:
            return Outcome.NONFINITE_ROWS
        if weight.name not in self._finite:
            self._finite[weight.name] = bool(np.isfinite(self._content(weight.name)).all())
        if not self._finite[weight.name]:
            return Outcome.NONFINITE_WEIGHT
        return Outcome.NO_ROWS if moments.rows == 0 else None


def _unmoved(shift: Shift) -> Solved:
    return Solved(replace(shift, matrix=torch.empty(0)), None, 0.0)
