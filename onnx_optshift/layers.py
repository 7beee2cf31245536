"""The layers of one model as equations: statistics of what flows in, and shifts computed from them.

Joins the ONNX side (weights, taps) with the numerical side (moments, spectra, shifts); neither knows the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.quantize.error import layer_errors
from onnx_optshift.quantize.rtn import MOST_BITS, Grid
from onnx_optshift.solve.error_ball import BallPath
from onnx_optshift.solve.objective import solve_layer
from onnx_optshift.solve.quant_range import Granularity
from onnx_optshift.solve.shift import Outcome, Shift
from onnx_optshift.solve.spectrum import Spectrum, factor, relative_residual
from onnx_optshift.solve.weighted_norm import Metric, balanced, measure
from onnx_optshift.stats.moments import InputMoments

Arrays = dict[str, NDArray[np.generic]]
Statistics = Mapping[Tap, InputMoments]

# Why the objective "curvature" takes the plain norm for a weight.
UNSEEN = "by the plain norm, as no linear weight before it moves its input"
NO_SLOPES = "by the plain norm, as no sample that was looked at shows how earlier weights move its input"
NONFINITE_SLOPES = "by the plain norm, as its input becomes NaN or infinity where earlier weights move"

# Half the distance from 1 to the next number: the largest relative error of rounding to the dtype.
ROUNDING_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Solved:
    """One layer's shift, and what it becomes in the file.

    Attributes:
        shift: How the solution came about; its matrix is dropped, `array` is what remains of it.
        array: The initializer's new content in its own dtype and shape; None when its bytes stay.
        residual: ||A(W - V)||_F / ||A V||_F of the rounded array; 0 when its bytes stay.
        weighted: tr(WᵀMW) / tr(VᵀMV) of the rounded array, for the objective "curvature"; None where the plain norm
            served instead.
        note: Why another norm was made small than the one asked for; empty where it was not.
    """

    shift: Shift
    array: NDArray[np.generic] | None
    residual: float
    weighted: float | None = None
    note: str = ""

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


# Multiplications that a layer's range at one tolerance may cost, where it is only for the report: a tenth of a second.
MOST_RANGE_WORK = 2e9
# Smaller residuals that a layer is tried at before its shift is given up, where it rounds worse than the original.
SMALLER_RESIDUALS = 3


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
        grids: What the weights are going to be rounded to, for the objective "range": a shift that rounds worse than
            the original weight is made smaller, or given up.
        slopes: Moments of how far earlier weights move the rows of every tap, for the objective "curvature".
        keep: Where new contents of initializers go; as they are, in memory, when not given.
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
        grids: Sequence[Grid] = (),
        slopes: Statistics | None = None,
        keep: Callable[[NDArray[np.generic]], NDArray[np.generic]] = lambda array: array,
    ) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.statistics = statistics
        self._content = content
        self._device = device
        self.objective = objective
        self._granularity = granularity
        self._grids = tuple(grids)
        # Rank by weight and residual, for shifts that are known to round worse: the search for a tolerance comes back.
        self._worse: dict[tuple[str, float], int] = {}
        self._slopes = slopes
        self._keep = keep
        # (the moments it was made from, the factorization): moments that were captured anew make it stale.
        self._spectra: dict[tuple[Tap, ...], tuple[InputMoments, Spectrum]] = {}
        self._metrics: dict[tuple[Tap, ...], tuple[Spectrum, Metric | str]] = {}

    def matrix(self, weight: Weight) -> torch.Tensor:
        """V `[g, d, m]` of a weight, float64 on the solvers' device."""
        return self.as_matrix(weight, self._content(weight.name))

    def as_matrix(self, weight: Weight, array: NDArray[np.generic]) -> torch.Tensor:
        """Other content of a weight's initializer as a matrix `[g, d, m]`, float64 on the solvers' device."""
        matrix = np.ascontiguousarray(weight.form.to_matrix(array).astype(np.float64))
        return torch.from_numpy(matrix).to(self._device)

    def moments(self, weight: Weight) -> InputMoments:
        """Moments of all rows that meet a weight: those of its uses, stacked."""
        return _stacked(self.statistics, weight)

    def spectrum(self, weight: Weight) -> Spectrum:
        """Factorization of the rows that meet a weight."""
        key = _key(weight)
        held = self.statistics[key[0]]
        if key not in self._spectra or self._spectra[key][0] is not held:
            if isinstance(self.statistics, Waves):
                self._spectra = {k: v for k, v in self._spectra.items() if self.statistics.holds(k[0])}
            self._spectra[key] = (held, factor(self.moments(weight)))
        return self._spectra[key][1]

    def metric(self, weight: Weight) -> Metric | str | None:
        """The weighted norm that is made small, or why it is the plain one; None where the objective asks for none."""
        if self._slopes is None:
            return None
        key, spectrum = _key(weight), self.spectrum(weight)
        if key not in self._metrics or self._metrics[key][0] is not spectrum:
            self._metrics = {k: v for k, v in self._metrics.items() if k in self._spectra}
            self._metrics[key] = (spectrum, _metric(spectrum, _stacked(self._slopes, weight)))
        return self._metrics[key][1]

    def solve(self, weight: Weight, tolerance: float) -> Solved:
        """The shift of one weight at a residual tolerance or below, rounded once to the initializer's dtype."""
        if not self._grids:
            return self._solve(weight, tolerance)
        rank = 0
        for residual in _backing_off(tolerance):
            known = self._worse.get((weight.name, residual))
            if known is None:
                solved = self._solve(weight, residual)
                if solved.array is None or not self._rounds_worse(weight, solved.array, residual):
                    return solved
                known = self._worse[weight.name, residual] = solved.shift.rank
            rank = known
        return _unmoved(Shift.unchanged(self.matrix(weight), Outcome.ROUNDS_WORSE, rank=rank))

    def _rounds_worse(self, weight: Weight, array: NDArray[np.generic], tolerance: float) -> bool:
        """Whether a shifted weight is farther from the original outputs than the original weight, both rounded."""
        errors = self.quantization_errors(weight, array, self._grids)
        fewest = min((grid.bits for grid, _, _ in errors), default=0)
        return any(after > allowed_error(before, tolerance, grid, fewest) for grid, before, after in errors)

    def _solve(self, weight: Weight, tolerance: float) -> Solved:
        moments = self.moments(weight)
        matrix = self.matrix(weight)
        if moments.nonfinite or not bool(torch.isfinite(matrix).all()):
            outcome = Outcome.NONFINITE_ROWS if moments.nonfinite else Outcome.NONFINITE_WEIGHT
            return _unmoved(Shift.unchanged(matrix, outcome))
        if moments.rows == 0:
            return _unmoved(Shift.unchanged(matrix, Outcome.NO_ROWS))
        metric = self.metric(weight)
        shift = solve_layer(
            self.spectrum(weight),
            matrix,
            objective=self.objective,
            granularity=self._granularity,
            tolerance=tolerance,
            rounding_unit=ROUNDING_UNIT[weight.dtype],
            metric=metric if isinstance(metric, Metric) else None,
        )
        if not shift.outcome.moved:
            return _unmoved(shift)
        del matrix  # as large as the solution; it is read again when it is needed
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
        before, metric = self.matrix(weight), self.metric(weight)
        weighted = metric.square(rounded) / metric.square(before) if isinstance(metric, Metric) else None
        ratio = shift.norm_after / shift.norm_before if weighted is None else weighted
        if self.objective != "range" and not ratio < 1:
            return _unmoved(
                replace(
                    shift,
                    outcome=Outcome.ROUNDED_AWAY,
                    norm_after=shift.norm_before,
                    range_after=shift.range_before,
                    predicted_residual=0.0,
                )
            )
        residual = relative_residual(self.spectrum(weight), before, rounded)
        return Solved(shift, self._keep(array), residual, weighted, metric if isinstance(metric, str) else "")

    def quantization_errors(
        self, weight: Weight, array: NDArray[np.generic], grids: Sequence[Grid]
    ) -> list[tuple[Grid, float, float]]:
        """(grid, error before, error after) of a weight under round-to-nearest, relative to the original's outputs."""
        if not grids or self.moments(weight).nonfinite or self.moments(weight).rows == 0:
            return []
        spectrum, matrix, shifted = self.spectrum(weight), self.matrix(weight), self.as_matrix(weight, array)
        return layer_errors(spectrum, matrix, shifted, grids)

    def frontier(self, weight: Weight, tolerances: Sequence[float]) -> list[tuple[float, float, float | None]]:
        """(tolerance, norm ratio, range ratio) of the norm objective, from the one factorization; [] without rows.

        For weights of more than `MOST_RANGE_WORK` the range ratio is None.
        """
        moments = self.moments(weight)
        if moments.nonfinite or moments.rows == 0:
            return []
        path = BallPath(self.spectrum(weight), self.matrix(weight), ROUNDING_UNIT[weight.dtype])
        return path.frontier(tolerances, ranges=weight.groups * weight.d**2 * weight.m <= MOST_RANGE_WORK)

    def singular_values(self, weight: Weight, points: int) -> tuple[float, ...]:
        """Singular values of the rows, as shares of the largest, at most `points` of d; root mean square over groups.

        Empty without rows; 0 for directions that no row points to.
        """
        moments = self.moments(weight)
        if moments.nonfinite or moments.rows == 0:
            return ()
        values = self.spectrum(weight).eigenvalues.mean(0).clamp_min(0).sqrt().cpu()
        values = torch.nn.functional.pad(values, (0, weight.d - len(values)))
        places = np.unique(np.linspace(0, weight.d - 1, min(points, weight.d)).round().astype(int))
        largest = float(values[0]) or 1.0
        return tuple(float(values[place]) / largest for place in places)

    def rounded(self, weight: Weight, matrix: torch.Tensor) -> NDArray[np.generic]:
        """A matrix `[g, d, m]` as the initializer's content: its shape, its dtype, rounded to nearest once."""
        original = self._content(weight.name)
        return weight.form.from_matrix(matrix.cpu().numpy()).astype(original.dtype)

    def candidate(self, tolerance: float, names: Iterable[str] | None = None) -> Candidate:
        """Shifts of all weights, or of those named, at one residual tolerance per layer."""
        chosen = self.weights if names is None else names
        return Candidate({name: self.solve(self.weights[name], tolerance) for name in chosen}, tolerance)


def _backing_off(tolerance: float) -> Iterator[float]:
    """The tolerance, and then powers of two below it: the same for tolerances nearby, so that each is tried once."""
    yield tolerance
    if tolerance > 0:
        highest = math.floor(math.log2(0.75 * tolerance))
        yield from (2.0 ** (highest - step) for step in range(SMALLER_RESIDUALS))


def allowed_error(before: float, granted: float, grid: Grid, fewest: int) -> float:
    """The relative error that quantized outputs may have after a shift.

    No more than before. Only where 8 bits are looked at beside fewer, a deviation that was asked for is not held
    against a shift: 8 bits round so finely that any deviation shows, and the run is for the fewer bits.

    Args:
        before: The error of the original weights, quantized.
        granted: Relative deviation that the outputs may show.
        grid: What is rounded to.
        fewest: Bits of the coarsest grid.
    """
    return before if grid.bits == fewest or grid.bits < MOST_BITS else before + granted


def _unmoved(shift: Shift) -> Solved:
    return Solved(replace(shift, matrix=shift.matrix.new_empty(0)), None, 0.0)


def _metric(spectrum: Spectrum, slopes: InputMoments) -> Metric | str:
    if slopes.nonfinite:
        return NONFINITE_SLOPES
    if slopes.rows == 0:
        return NO_SLOPES
    curvature = slopes.gram()
    return measure(spectrum, balanced(curvature)) if bool(curvature.any()) else UNSEEN


def _stacked(statistics: Statistics, weight: Weight) -> InputMoments:
    """Moments of all uses of a weight, as one."""
    return reduce(lambda a, b: a.merge(b), (statistics[use.tap] for use in weight.uses))


def _key(weight: Weight) -> tuple[Tap, ...]:
    """What tells apart the rows of weights. Uses at the same tap must count twice: the rows are stacked twice."""
    return tuple(sorted((use.tap for use in weight.uses), key=repr))


def merged(*parts: Statistics) -> dict[Tap, InputMoments]:
    """Statistics of several disjoint parts of the data, as those of their union."""
    return {tap: reduce(lambda a, b: a.merge(b), (part[tap] for part in parts)) for tap in parts[0]}
