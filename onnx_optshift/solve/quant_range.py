"""The narrowest weight within a tolerance: what a quantizer scales by, made as small as the outputs allow.

For every output column j: `min max|w_j|  subject to  ‖A(w_j - v_j)‖ <= ε ‖A v_j‖`; directions that no row reaches are
free. ADMM takes turns between the two halves (Boyd, Parikh, Chu, Peleato, Eckstein 2011, "Distributed Optimization and
Statistical Learning via the Alternating Direction Method of Multipliers", section 3):

- the range: the proximal operator of the max-norm clips at the θ with `Σ (|pᵢ| - θ)₊ = 1/ρ` (by Moreau: it takes off
  the projection on the l1 ball of radius 1/ρ). The sum is convex and piecewise linear in θ, so that Newton, started at
  the previous θ, ends after a few passes and nothing is sorted;
- the outputs: the projection on the ellipsoid is in the eigenbasis one secular equation per column, as in
  `error_ball`. Newton may start anywhere here too, as one step leads to the left of the root.

It stops by a certificate. The multiplier y of the second half lies in the row space, and once its l1 norm is scaled to
1, `yᵀv - radius ‖Λ^-½ Uᵀy‖` (the least value of yᵀw over the ellipsoid) bounds every feasible range from below.

Cost: two d x r x m products and some 20 passes over d x m numbers an iteration. Measured on eigenvalues of 4 to 12
decades: 30 to 120 iterations at ε >= 0.001, hundreds near ε = 0, where the ellipsoid is flat and the limit may end it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onnx_optshift.errors import InputError
from onnx_optshift.solve.shift import Outcome, Shift, check_tolerance, obstacle
from onnx_optshift.solve.spectrum import Coordinates, Spectrum

# Share of the range that may lie between a solution and its lower bound; one step of int8 is four times as much.
GAP = 2e-3
MAX_ITERATIONS = 500

_CHECK_EVERY = 10
_ADAPT_UNTIL = 100  # ADMM converges for a constant ρ; adapting it for ever was seen to cycle
_RELAXATION = 1.6  # between 1.5 and 1.8, section 3.4.3 of Boyd et al.
_ROOT_ACCURACY = 1e-10
_MAX_NEWTON = 100


@dataclass(frozen=True)
class Granularity:
    """Which entries of a weight share one scale of the quantizer.

    Attributes:
        mode: "channel", one scale per output column; "block", one per `block` consecutive inputs of a column, of which
            the sum is minimized; "tensor", one for the whole weight.
        block: Inputs per block.

    Raises:
        InputError: There is no such mode, or the block is empty.
    """

    mode: str = "channel"
    block: int = 32

    def __post_init__(self) -> None:
        if self.mode not in {"channel", "block", "tensor"} or self.block < 1:
            raise InputError(
                f"granularity {self.mode!r} with blocks of {self.block} is not usable. "
                f"Choose channel, block or tensor, and a block of at least 1."
            )

    def cells(self, matrix: Tensor) -> Tensor:
        """A matrix `[g, d, m]` as `[problems, cells, entries, columns]`; the entries of a cell share a scale."""
        if self.mode == "tensor":
            return matrix.reshape(1, 1, -1, 1)
        if self.mode == "channel":
            return matrix[:, None]
        padded = functional.pad(matrix, (0, 0, 0, -matrix.shape[1] % self.block))
        return padded.reshape(matrix.shape[0], -1, self.block, matrix.shape[2])

    def matrix(self, cells: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `cells`, to a matrix of this shape."""
        return cells.reshape(shape) if self.mode == "tensor" else cells.flatten(1, 2)[:, : shape[1]]

    def sums(self, values: Tensor) -> Tensor:
        """Sum of `[g, k, m]` over each independent problem: `[g, 1, m]`, or `[1, 1, 1]` for the mode "tensor"."""
        return values.sum((0, 1, 2) if self.mode == "tensor" else 1, keepdim=True)

    def ranges(self, matrix: Tensor) -> Tensor:
        """What is minimized: the sum of the cells' max|W|, per problem."""
        return self.cells(matrix.abs()).amax(2).sum(1, keepdim=True)

    def dual_norm(self, matrix: Tensor) -> Tensor:
        """The dual norm of `ranges`: the largest l1 norm of a cell, per problem."""
        return self.cells(matrix.abs()).sum(2).amax(1, keepdim=True)


def solve(
    spectrum: Spectrum,
    matrix: Tensor,
    tolerance: float,
    rounding_unit: float,
    *,
    granularity: Granularity | None = None,
) -> Shift:
    """The narrowest weight whose outputs stay within a tolerance of those of V, in every output column.

    The result is within the tolerance whenever the solver stops, and no problem (column, or the whole weight for the
    mode "tensor") ends up wider than in V. A tolerance below the rounding unit counts as the rounding unit: outputs
    move by as much when the weight is rounded, and an ellipsoid without inside would leave nothing to iterate on.

    Args:
        spectrum: Eigenbasis of the layer's rows.
        matrix: V `[g, d, m]`.
        tolerance: ε = ‖A(w - v)‖ / ‖A v‖ of every column, at most.
        rounding_unit: Of the dtype in which the weight is stored.
        granularity: What the target quantizer scales by; per output channel when not given.
    """
    check_tolerance(tolerance)
    granularity = granularity or Granularity()
    coordinates = Coordinates.of(spectrum, matrix, rounding_unit)
    blocked = obstacle(coordinates)
    if blocked is None and coordinates.full_rank and tolerance <= rounding_unit:
        blocked = Outcome.FULL_RANK
    if blocked is not None:
        return Shift.unchanged(coordinates.matrix, blocked, rank=coordinates.rank)
    narrowest, gain, gap, iterations = _Admm(coordinates, max(tolerance, rounding_unit), granularity).run()
    # A second run could find what the first one left, up to GAP: that is not worth new bytes.
    if gain < GAP:
        return Shift.unchanged(coordinates.matrix, Outcome.ALREADY_MINIMAL, rank=coordinates.rank)
    outcome = Outcome.SHIFTED if gap <= GAP else Outcome.STOPPED_EARLY
    return Shift.moved_to(coordinates, narrowest, outcome=outcome, iterations=iterations)


class _Admm:
    """The iteration, in units in which every problem of V has range 1 and the largest eigenvalue is 1."""

    def __init__(self, coordinates: Coordinates, tolerance: float, granularity: Granularity) -> None:
        self._granularity = granularity
        spectrum, matrix, coefficients = coordinates.spectrum, coordinates.matrix, coordinates.coefficients
        # Every direction with λ > 0 is held by the ellipsoid, dropped ones too: its weight there may grow.
        used = int(torch.count_nonzero((spectrum.eigenvalues > 0).any(0)))
        self._basis = spectrum.basis[..., :used]
        eigenvalues = spectrum.eigenvalues[:, :used, None]
        self._eigenvalues = eigenvalues / eigenvalues.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        targets = coefficients[:, :used]
        outputs = (self._eigenvalues * targets.square()).sum(1, keepdim=True).sqrt()

        widest = matrix.abs().amax((0, 1, 2) if granularity.mode == "tensor" else 1, keepdim=True)
        self._unit = torch.where(widest > 0, widest, 1.0)
        # A column without any output may as well be 0; its ellipsoid would have no size to measure by.
        silent = outputs == 0
        self._start = matrix / self._unit
        self._center = torch.where(silent, 0.0, self._start)
        self._targets = torch.where(silent, 0.0, targets / self._unit)
        self._radius = torch.where(silent, 1.0, tolerance * outputs / self._unit)

        self._solution = self._center  # z, always within the ellipsoid
        self._dual = torch.zeros_like(self._center)  # u, scaled by 1/ρ, and Uᵀu
        self._dual_coordinates = torch.zeros_like(self._targets)
        # Clipping starts at a tenth of what the l1 norm of V is: within a factor 3 of what adaption ends at.
        self._rho = 10 / granularity.dual_norm(self._center).clamp_min(1e-30)
        self._level = granularity.cells(self._center.abs()).amax(2, keepdim=True)  # θ
        self._multiplier = torch.zeros_like(self._radius)  # t = 1/μ of the secular equation

    def run(self) -> tuple[Tensor, float, float, int]:
        """The narrowest matrix found, its gain over V, the gap to the lower bound, and the iterations."""
        granularity = self._granularity
        before = granularity.ranges(self._start)
        best, narrowest = self._start, before
        bound = torch.zeros_like(before)
        gap, iteration = math.inf, 0
        while gap > GAP and iteration < MAX_ITERATIONS:
            for _ in range(_CHECK_EVERY):
                primal, dual = self._step()
            iteration += _CHECK_EVERY
            ranges = granularity.ranges(self._solution)
            better = ranges < narrowest
            best = torch.where(better, self._solution, best)
            narrowest = torch.where(better, ranges, narrowest)
            bound = torch.maximum(bound, self._bound())
            gap = float((narrowest - bound).sum() / narrowest.sum().clamp_min(1e-300))
            if iteration <= _ADAPT_UNTIL:
                self._balance(primal, dual)
        return best * self._unit, 1 - float(narrowest.sum() / before.sum()), gap, iteration

    def _step(self) -> tuple[Tensor, Tensor]:
        """One iteration; returns what the two halves still disagree on, and how far the solution moved."""
        clipped = self._clip(self._solution - self._dual)
        relaxed = _RELAXATION * clipped + (1 - _RELAXATION) * self._solution
        # The dual lies in the row space: its coordinates are known, and U is applied once instead of twice.
        offset = self._basis.mT @ relaxed + self._dual_coordinates - self._targets
        self._multiplier = _secular_roots(
            self._eigenvalues, self._eigenvalues * offset.square(), self._radius, self._multiplier
        )
        scaled = self._multiplier * self._eigenvalues
        self._dual_coordinates = scaled / (1 + scaled) * offset
        dual = self._basis @ self._dual_coordinates
        solution = relaxed + self._dual - dual
        moved = solution - self._solution
        self._solution, self._dual = solution, dual
        return clipped - solution, moved

    def _clip(self, point: Tensor) -> Tensor:
        """The proximal operator of the range, per cell: entries beyond ±θ are clipped."""
        cells = self._granularity.cells(point)
        magnitudes, room = cells.abs(), 1 / self._rho[:, None]
        level = self._level
        for _ in range(_MAX_NEWTON):
            beyond = (magnitudes - level).clamp_min_(0)
            excess = beyond.sum(2, keepdim=True) - room
            if bool((excess.abs() <= _ROOT_ACCURACY * room).logical_or((level == 0) & (excess <= 0)).all()):
                break
            count = torch.count_nonzero(beyond, 2).unsqueeze(2).clamp_min(1)
            level = (level + excess / count).clamp_min(0)
        self._level = level
        return self._granularity.matrix(torch.minimum(torch.maximum(cells, -level), level), point.shape)

    def _bound(self) -> Tensor:
        """Lower bound on the range of anything within the ellipsoid, per problem."""
        sums = self._granularity.sums
        norm = self._granularity.dual_norm(self._dual)
        # y = -u up to scale. Uᵀu has the factor λ, so that nothing is divided by a small eigenvalue in earnest.
        steep = torch.where(self._eigenvalues > 0, self._dual_coordinates / self._eigenvalues.sqrt(), 0.0)
        steep = steep.square().sum(1, keepdim=True).sqrt()
        least = -sums(self._dual_coordinates * self._targets) - sums(self._radius * steep)
        return torch.where(norm > 0, least / norm, 0.0)

    def _balance(self, primal: Tensor, dual: Tensor) -> None:
        """Adapts ρ so that both residuals, each relative to its own scale, fall alike (Wohlberg 2017, 1704.06209)."""

        def norm(values: Tensor) -> Tensor:
            return self._granularity.sums(values.square()).sqrt().clamp_min(1e-300)

        ratio = (norm(primal) / norm(self._solution)) / (norm(dual) / norm(self._dual))
        factor = torch.where((ratio > 2) | (ratio < 0.5), ratio.sqrt().clamp(0.2, 5), 1.0)
        self._rho = self._rho * factor
        self._dual = self._dual / factor
        self._dual_coordinates = self._dual_coordinates / factor


def _secular_roots(eigenvalues: Tensor, energies: Tensor, radius: Tensor, start: Tensor) -> Tensor:
    """Per column the t >= 0 with `√(Σ eᵢ/(1+tλᵢ)²) = radius`, and 0 where the column is within its radius.

    Args:
        eigenvalues: λ `[g, k, 1]`.
        energies: e `[g, k, m]`.
        radius: Positive, `[g, 1, m]`.
        start: Of Newton, `[g, 1, m]`, not negative: the roots of the iteration before.
    """
    root = start
    for _ in range(_MAX_NEWTON):
        inverse = 1 / (1 + root * eigenvalues)
        terms = energies * inverse.square()
        square = terms.sum(1, keepdim=True)
        residual = square.sqrt()
        within = (residual - radius).abs() <= _ROOT_ACCURACY * radius
        done = within | ((root == 0) & (residual <= radius))
        if bool(done.all()):
            break
        slope = (eigenvalues * terms * inverse).sum(1, keepdim=True) / (square * residual)
        root = torch.where(done, root, (root + (1 / radius - 1 / residual) / slope).clamp_min(0))
    return root
