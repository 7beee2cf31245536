"""The smallest weight within a tolerance: `min ‖W‖_F  subject to  ‖A(W - V)‖_F <= ε ‖AV‖_F`.

Stationarity gives `(AᵀA + μI) W = AᵀA V`, in the eigenbasis `W = U diag(λ/(λ+μ)) C`. The multiplier is the root of
the secular equation `Σ (μ/(λᵢ+μ))² λᵢ‖cᵢ‖² = ε² Σ λᵢ‖cᵢ‖²`, its left side increasing in μ. One factorization and one
product UᵀV serve every ε: each costs O(r) for the root and one product for W. ε → 0 is the exact shift.

With t = 1/μ the residual is `h(t) = √(Σ eᵢ/(1+tλᵢ)²)`, and `1/h - 1/radius` is increasing and concave in t: the form in
which a trust-region step is solved for (Conn, Gould, Toint, "Trust-Region Methods", section 7.3; Moré and Sorensen
1983). Newton from the left of the root therefore neither overshoots nor needs a safeguard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from onnx_optshift.solve import min_norm
from onnx_optshift.solve.shift import Outcome, Shift, check_tolerance, least_gain, obstacle
from onnx_optshift.solve.spectrum import Coordinates, Spectrum

_ROOT_ACCURACY = 1e-13  # of the residual, relative to the radius
_MAX_NEWTON = 200  # measured: at most 12 over spectra of 14 decades; the bound only guards against a defect


class BallPath:
    """The solutions around one centre for every tolerance, from one factorization.

    Without `scale` and `floor` the centre is the layer's weight V. They serve a layer whose input has moved: with new
    rows A' and the outputs Z that are wanted, `‖A'W - Z‖² = ‖A'(W - V*)‖² + ‖A'V* - Z‖²` around the least-squares
    solution V*, so that the same ball serves with `scale = ‖Z‖_F` and `floor = ‖A'V* - Z‖_F / ‖Z‖_F`.

    Args:
        coordinates: V (or V*) in the eigenbasis of the rows.
        floor: Residual of the centre itself, relative to `scale`; no solution goes below it.
        scale: What residuals are relative to; ‖A V‖_F when not given.
    """

    def __init__(self, coordinates: Coordinates, *, floor: float = 0.0, scale: float | None = None) -> None:
        self._coordinates = coordinates
        self._floor = floor
        self._scale = math.sqrt(self._coordinates.total) if scale is None else scale
        self._kept = self._coordinates.kept
        self._eigenvalues = coordinates.spectrum.eigenvalues[self._kept]
        self._energies = self._coordinates.energies[self._kept]

    def at(self, tolerance: float) -> Shift:
        """The solution at one tolerance.

        A tolerance that the exact shift already uses up gives the exact shift, bit for bit.

        Args:
            tolerance: ε, the largest residual relative to the scale.
        """
        check_tolerance(tolerance)
        coordinates = self._coordinates
        blocked = obstacle(coordinates)
        if blocked is not None:
            return Shift.unchanged(coordinates.matrix, blocked, rank=coordinates.rank, residual=self._floor)
        solution = self._factors(tolerance)
        if solution is None:
            return min_norm.solve_in(coordinates, residual=self._residual(torch.ones_like(self._energies)))
        shrink, iterations = solution
        if 1 - self._norm_ratio(shrink) ** 2 < least_gain(coordinates.rounding_unit):
            outcome = Outcome.ALREADY_MINIMAL
            return Shift.unchanged(coordinates.matrix, outcome, rank=coordinates.rank, residual=self._floor)
        return Shift.moved_to(
            coordinates, self._combine(shrink), residual=self._residual(shrink), iterations=iterations
        )

    def frontier(self, tolerances: Iterable[float]) -> list[tuple[float, float]]:
        """What each tolerance buys: `(tolerance, ‖W‖_F / ‖V‖_F)`, at a cost of O(r) each."""
        return [(tolerance, self._least_norm(tolerance)) for tolerance in tolerances]

    def _least_norm(self, tolerance: float) -> float:
        if obstacle(self._coordinates) is not None:
            return 1.0
        solution = self._factors(tolerance)
        return self._norm_ratio(torch.ones_like(self._energies) if solution is None else solution[0])

    def _factors(self, tolerance: float) -> tuple[Tensor, int] | None:
        """λ/(λ+μ) of the kept directions and Newton's iterations; None when the exact shift is the solution."""
        room = (tolerance**2 - self._floor**2) * self._scale**2 - self._coordinates.dropped
        if room <= 0:
            return None
        if room >= float(self._energies.sum()):
            return torch.zeros_like(self._energies), 0  # W = 0 is within the ball
        root, iterations = secular_root(self._eigenvalues, self._energies, math.sqrt(room))
        scaled = root * self._eigenvalues
        return scaled / (1 + scaled), iterations

    def _combine(self, shrink: Tensor) -> Tensor:
        factors = torch.zeros_like(self._coordinates.energies)
        factors[self._kept] = shrink
        return self._coordinates.combine(factors)

    def _norm_ratio(self, shrink: Tensor) -> float:
        squares = self._coordinates.coefficients.square().sum(-1)[self._kept]
        return math.sqrt(float((shrink**2 * squares).sum() / self._coordinates.matrix.square().sum()))

    def _residual(self, shrink: Tensor) -> float:
        moved = float(((1 - shrink) ** 2 * self._energies).sum()) + self._coordinates.dropped
        return math.sqrt(moved / self._scale**2 + self._floor**2) if self._scale else 0.0


def solve(spectrum: Spectrum, matrix: Tensor, tolerance: float, rounding_unit: float) -> Shift:
    """The smallest weight whose outputs stay within a tolerance of those of V, over the layer as a whole.

    Args:
        spectrum: Eigenbasis of the layer's rows.
        matrix: V `[g, d, m]`.
        tolerance: ε = ‖A(W - V)‖_F / ‖AV‖_F, at most.
        rounding_unit: Of the dtype in which the weight is stored.
    """
    return BallPath(Coordinates.of(spectrum, matrix, rounding_unit)).at(tolerance)


def secular_root(eigenvalues: Tensor, energies: Tensor, radius: float) -> tuple[float, int]:
    """The t = 1/μ > 0 at which `√(Σ eᵢ/(1+tλᵢ)²) = radius`.

    Args:
        eigenvalues: λ `[k]`, positive.
        energies: e `[k]`, not negative, with `Σ e > radius²`.
        radius: Positive.

    Returns:
        The root and the number of Newton iterations.
    """
    # Were all λ the largest one, this would be the root: it lies to the left of the true one.
    root = (math.sqrt(float(energies.sum())) / radius - 1) / float(eigenvalues.max())
    for iteration in range(1, _MAX_NEWTON + 1):
        inverse = 1 / (1 + root * eigenvalues)
        terms = energies * inverse**2
        square = float(terms.sum())
        residual = math.sqrt(square)
        # d(1/h)/dt = Σ λ e/(1+tλ)³ / h³
        slope = float((eigenvalues * terms * inverse).sum()) / (square * residual)
        step = (1 / radius - 1 / residual) / slope
        root += step
        if residual <= radius * (1 + _ROOT_ACCURACY):
            return root, iteration
    return root, _MAX_NEWTON
