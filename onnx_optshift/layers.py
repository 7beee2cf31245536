"""The layers of one model as equations: statistics of what flows in, and shifts computed from them.

Joins the ONNX side (weights, taps) with the numerical side (moments, spectra, shifts); neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.quantize.error import output_error
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.solve.error_ball import BallPath
from onnx_optshift.solve.objective import solve_layer
from onnx_optshift.solve.quant_range import Granularity
from onnx_optshift.solve.shift import Outcome, Shift
from onnx_optshift.solve.spectrum import Spectrum, factor, relative_residual
from onnx_optshift.stats.moments import InputMoments

Arrays = dict[str, NDArray[np.generic]]
Statistics = Mapping[Tap, InputMoments]

# Half the distance from 1 to the next number: the largest relative error of rounding to the dtype.
ROUNDING_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Solved:
    """One layer's shift, and what it becomes in the file.

    Attributes:
        shift: How the solution came about; its matrix is dropped, `array` is what remains of it.
        array: The initializer's new content in its own dtype and shape; None when its bytes stay.
        residual: ||A(W - V)||_F / ||A V||_F of the rounded array; 0 when its bytes stay.
    """

    shift: Shift
    array: NDArray[np.generic] | None
    residual: float

    @property
    def moved(self) -> bool:
        """Whether the initializer's bytes change."""
        return self.array is not None


@dataclass(frozen=True)
class Candidate:
    """A set of shifts that could be written.

    Attributes:
        solved: By initializer name.
        tolerance: The residual that each layer was allowed.
    """

    solved: Mapping[str, Solved]
    tolerance: float

    @property
    def arrays(self) -> Arrays:
        """New contents of the initializers that change."""
        return {name: solved.array for name, solved in self.solved.items() if solved.array is not None}

    def only(self, names: Iterable[str]) -> Candidate:
        """The same shifts, but only of these initializers; the rest keep their bytes."""
        chosen = set(names)
        return Candidate({name: solved for name, solved in self.solved.items() if name in chosen}, self.tolerance)


class Waves(Mapping[Tap, InputMoments]):
    """Statistics of which one wave is held at a time; asking for a tap of another captures that wave anew.

    Args:
        waves: The taps of each wave.
        capture: Captures the taps of one wave.
    """

    def __init__(
        self, waves: Sequence[Sequence[Tap]], capture: Callable[[Sequence[Tap]], Mapping[Tap, InputMoments]]
    ) -> None:
        self._waves = waves
        self._capture = capture
        self._number = {tap: number for number, wave in enumerate(waves) for tap in wave}
        self._held: int | None = None
        self._statistics: Mapping[Tap, InputMoments] = {}

    def __getitem__(self, tap: Tap) -> InputMoments:
        number = self._number[tap]
        if number != self._held:
            self._statistics = {}  # before the next wave is captured, not after
            self._statistics, self._held = self._capture(self._waves[number]), number
        return self._statistics[tap]

    def holds(self, tap: Tap) -> bool:
        """Whether a tap is of the wave that is held now."""
        return self._number[tap] == self._held

    def __iter__(self) -> Iterator[Tap]:
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)


class Layers:
    """All layers of a model with the statistics of their inputs.

    One factorization serves every tolerance and objective, and every layer that reads the same input. It is made
    when first needed and then kept as long as the moments are, because the search for a tolerance comes back for it.

    Args:
        weights: The weights to be solved for.
        statistics: Moments of every tap of those weights.
        content: Reads an initializer by name.
        device: The torch device of the solvers.
        objective: Name in `solve.objective.OBJECTIVES`.
        granularity: Which weights share a scale of the quantizer, for the objective that asks.
    """

    def __init__(
        self,
        weights: Iterable[Weight],
        statistics: Statistics,
        content: Callable[[str], NDArray[np.generic]],
        *,
        device: str = "cpu",
        objective: str = "norm",
        granularity: Granularity | None = None,
    ) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.statistics = statistics
        self._content = content
        self._device = device
        self.objective = objective
        self._granularity = granularity
        # (the moments it was made from, the factorization): moments that were captured anew make it stale.
        self._spectra: dict[tuple[Tap, ...], tuple[InputMoments, Spectrum]] = {}

    def matrix(self, weight: Weight) -> torch.Tensor:
        """V `[g, d, m]` of a weight, float64 on the solvers' device."""
        return self.as_matrix(weight, self._content(weight.name))

    def as_matrix(self, weight: Weight, array: NDArray[np.generic]) -> torch.Tensor:
        """Other content of a weight's initializer as a matrix `[g, d, m]`, float64 on the solvers' device."""
        matrix = np.ascontiguousarray(weight.form.to_matrix(array).astype(np.float64))
        return torch.from_numpy(matrix).to(self._device)

    def moments(self, weight: Weight) -> InputMoments:
        """Moments of all rows that meet a weight: those of its uses, stacked."""
        return reduce(lambda a, b: a.merge(b), (self.statistics[use.tap] for use in weight.uses))

    def spectrum(self, weight: Weight) -> Spectrum:
        """Factorization of the rows that meet a weight."""
        # Uses of one weight at the same tap must count twice: the rows are stacked twice.
        key = tuple(sorted((use.tap for use in weight.uses), key=repr))
        held = self.statistics[key[0]]
        if key not in self._spectra or self._spectra[key][0] is not held:
            if isinstance(self.statistics, Waves):
                self._spectra = {k: v for k, v in self._spectra.items() if self.statistics.holds(k[0])}
            self._spectra[key] = (held, factor(self.moments(weight)))
        return self._spectra[key][1]

    def solve(self, weight: Weight, tolerance: float) -> Solved:
        """The shift of one weight at a residual tolerance, rounded once to the initializer's dtype."""
        moments = self.moments(weight)
        matrix = self.matrix(weight)
        if moments.nonfinite or not bool(torch.isfinite(matrix).all()):
            outcome = Outcome.NONFINITE_ROWS if moments.nonfinite else Outcome.NONFINITE_WEIGHT
            return _unmoved(Shift.unchanged(matrix, outcome))
        if moments.rows == 0:
            return _unmoved(Shift.unchanged(matrix, Outcome.NO_ROWS))
        spectrum = self.spectrum(weight)
        shift = solve_layer(
            spectrum,
            matrix,
            objective=self.objective,
            granularity=self._granularity,
            tolerance=tolerance,
            rounding_unit=ROUNDING_UNIT[weight.dtype],
        )
        if not shift.outcome.moved:
            return _unmoved(shift)
        return self.written(weight, shift)

    def written(self, weight: Weight, shift: Shift) -> Solved:
        """A solution as it would stand in the file: rounded once, its residual measured on what rounding left."""
        array = self.rounded(weight, shift.matrix)
        rounded = self.as_matrix(weight, array)
        written = Shift.unchanged(rounded, shift.outcome)
        # The solution in float64 has done its work; a model's worth of them would be twice its size.
        shift = replace(
            shift,
            matrix=rounded.new_empty(0),
            norm_after=written.norm_before,
            range_after=written.range_before,
        )
        if self.objective == "norm" and not shift.norm_after < shift.norm_before:
            return _unmoved(
                replace(
                    shift,
                    outcome=Outcome.ROUNDED_AWAY,
                    norm_after=shift.norm_before,
                    range_after=shift.range_before,
                    predicted_residual=0.0,
                )
            )
        return Solved(shift, array, relative_residual(self.spectrum(weight), self.matrix(weight), rounded))

    def quantization_errors(
        self, weight: Weight, array: NDArray[np.generic], grids: Sequence[Grid]
    ) -> list[tuple[Grid, float, float]]:
        """(grid, error before, error after) of a weight under round-to-nearest, relative to the original's outputs."""
        if self.moments(weight).nonfinite or self.moments(weight).rows == 0:
            return []
        spectrum, matrix, shifted = self.spectrum(weight), self.matrix(weight), self.as_matrix(weight, array)
        return [
            (grid, output_error(spectrum, matrix, matrix, grid), output_error(spectrum, matrix, shifted, grid))
            for grid in grids
        ]

    def frontier(self, weight: Weight, tolerances: Sequence[float]) -> list[tuple[float, float, float]]:
        """(tolerance, norm ratio, range ratio) of the norm objective, from the one factorization; [] without rows."""
        moments = self.moments(weight)
        if moments.nonfinite or moments.rows == 0:
            return []
        path = BallPath(self.spectrum(weight), self.matrix(weight), ROUNDING_UNIT[weight.dtype])
        return path.frontier(tolerances)

    def rounded(self, weight: Weight, matrix: torch.Tensor) -> NDArray[np.generic]:
        """A matrix `[g, d, m]` as the initializer's content: its shape, its dtype, rounded to nearest once."""
        original = self._content(weight.name)
        return weight.form.from_matrix(matrix.cpu().numpy()).astype(original.dtype)

    def candidate(self, tolerance: float, names: Iterable[str] | None = None) -> Candidate:
        """Shifts of all weights, or of those named, at one residual tolerance per layer."""
        chosen = self.weights if names is None else names
        return Candidate({name: self.solve(self.weights[name], tolerance) for name in chosen}, tolerance)


def _unmoved(shift: Shift) -> Solved:
    return Solved(replace(shift, matrix=shift.matrix.new_empty(0)), None, 0.0)


def merged(*parts: Statistics) -> dict[Tap, InputMoments]:
    """Statistics of several disjoint parts of the data, as those of their union."""
    return {tap: reduce(lambda a, b: a.merge(b), (part[tap] for part in parts)) for tap in parts[0]}
