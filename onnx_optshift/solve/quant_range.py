"""The narrowest weight within a tolerance: what a quantizer scales by, made as small as the outputs allow.

For every output column j: `min max|w_j|  subject to  ‖A(w_j - v_j)‖ <= ε ‖A v_j‖`; directions that no row reaches are
free. ADMM takes turns between the two halves (Boyd, Parikh, Chu, Peleato, Eckstein 2011, "Distributed Optimization and
Statistical Learning via the Alternating Direction Method of Multipliers", section 3):

- the range: the proximal operator of the max-norm clips at the θ with `Σ (|pᵢ| - θ)₊ = 1/ρ` (by Moreau: it takes off
  the projection on the l1 ball of radius 1/ρ). The sum is convex and piecewise linear in θ, so that Newton, started at
  the previous θ, ends after a few passes and nothing is sorted;
- the outputs: the projection on the ellipsoid is in the eigenbasis one secular equation per column, as in
  `error_ball`. Newton may start anywhere here too, as one step leads to the left of the root.

Alone, that halves the gap with every doubling of the iterations. Anderson's acceleration of each problem (a column, or
the whole weight) takes 35 to 60 % of the iterations where they are many. The iteration runs in float32, at tolerances
near 0 too: the projection that gives the result is made in float64, and so is the certificate.

It stops by a certificate. The multiplier y of the second half lies in the row space, and once its l1 norm is scaled to
1, `yᵀv - radius ‖Λ^-½ Uᵀy‖` (the least value of yᵀw over the ellipsoid) bounds every feasible range from below.

Cost: two d x k x m products and dozens of passes over d x m numbers an iteration. Measured by `tools/bench_range.py`
on one thread, d = m, ε = 0.03, Gaussian weights and inputs over 3 decades: 40, 49 and 48 times one `eigh` for d = 512,
1024 and 4096 (100, 140 and 260 iterations). Trained layers of d = 32 to 512 took 20 to 50 at ε of 0.003 to 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onnx_optshift.solve.anderson import Anderson
from onnx_optshift.solve.ellipsoids import Ellipsoids
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.shift import Outcome, Shift, check_tolerance, obstacle
from onnx_optshift.solve.spectrum import Coordinates, Spectrum

# Share of the range that may lie between a solution and its lower bound: 2/3 of a step of int8. A tenth of it takes
# 1 to 5 times the iterations and changed a layer's output error at 8 and 4 bits by 0.4 % at most (d >= 256, ε >= 0.01).
GAP = 5e-3
MAX_ITERATIONS = 500

_COLUMNS = 256  # at a time: the arrays of an iteration stay in the cache, and memory does not grow with m
_CHECK_EVERY = 10
_MARGIN = 0.95  # of GAP, for what float64 finds different about a float32 solution
_ADAPT_UNTIL = 100  # ADMM converges for a constant ρ; adapting it for ever was seen to cycle
_RELAXATION = 1.6  # between 1.5 and 1.8, section 3.4.3 of Boyd et al.
_NEWTON_ACCURACY = 1e-4  # before Newton's last step, which squares it
_MAX_NEWTON = 100
_FLOAT32_RADIUS = 1e-8  # of an ellipsoid, at least: squares of smaller ones come near the end of float32's exponents


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
    found = narrowest(coordinates, max(tolerance, rounding_unit), granularity)
    # A second run could find what the first one left, up to GAP: that is not worth new bytes.
    if found.gain < GAP:
        return Shift.unchanged(coordinates.matrix, Outcome.ALREADY_MINIMAL, rank=coordinates.rank)
    outcome = Outcome.SHIFTED if found.gap <= GAP else Outcome.STOPPED_EARLY
    return Shift.moved_to(coordinates, found.matrix, outcome=outcome, iterations=found.iterations)


@dataclass(frozen=True)
class Narrowest:
    """What the iteration found.

    Attributes:
        matrix: W `[g, d, m]`, float64, within the tolerance.
        gain: By how much the mean range of the problems fell, relative to that of V.
        gap: Share of it that may lie above the optimum, at most: by the certificate, in float64.
        iterations: Of the columns that took longest.
    """

    matrix: Tensor
    gain: float
    gap: float
    iterations: int


def narrowest(coordinates: Coordinates, tolerance: float, granularity: Granularity, *, gap: float = GAP) -> Narrowest:
    """Narrows every column of V, `_COLUMNS` at a time where they are independent.

    Args:
        coordinates: V in the eigenbasis, with outputs that are not all zero.
        tolerance: Positive.
        granularity: What the target quantizer scales by.
        gap: Share of the range that may lie between a solution and its lower bound.
    """
    whole = granularity.mode == "tensor"
    matrix = coordinates.matrix
    widest = matrix.abs().amax((0, 1, 2) if whole else 1, keepdim=True)
    unit = torch.where(widest > 0, widest, 1.0)
    start = matrix / unit
    ellipsoids = Ellipsoids.of(coordinates, unit, tolerance)
    single = None if float(ellipsoids.radius.amin()) < _FLOAT32_RADIUS else ellipsoids.to(torch.float32)
    total, step = matrix.shape[-1], matrix.shape[-1] if whole else _COLUMNS
    result = start.clone()
    before = after = bound = 0.0
    iterations = 0
    for first in range(0, total, step):
        part = slice(first, first + step)
        exact = ellipsoids.columns(part)
        sides = granularity.sides(exact.center)
        admm = _Admm((single or ellipsoids).columns(part), granularity, sides)
        iterations = max(iterations, admm.run(gap))
        found = exact.nearest(admm.best.to(torch.float64))
        ranges, given = granularity.ranges(found, sides), granularity.ranges(start[..., part])
        result[..., part] = torch.where(ranges < given, found, start[..., part])
        before += float(given.sum())
        after += float(torch.minimum(ranges, given).sum())
        witness = admm.witness.to(torch.float64)
        bound += float(_bound(exact, granularity, sides, witness, exact.basis @ witness).clamp_min(0).sum())
    return Narrowest(result * unit, 1 - after / before, (after - bound) / max(after, 1e-300), iterations)


class _Admm:
    """The iteration, as a fixed point of one variable: the solution plus the scaled multiplier.

    Attributes:
        best: Move of the narrowest weight found `[g, d, m]`, within the ellipsoid up to rounding.
        witness: Coordinates `[g, k, m]` of the multiplier that gave the highest lower bound.
    """

    def __init__(self, ellipsoids: Ellipsoids, granularity: Granularity, sides: Tensor | None) -> None:
        self._ellipsoids, self._granularity = ellipsoids, granularity
        center = ellipsoids.center
        self._sides = None if sides is None else sides.to(center)
        self.best = torch.zeros_like(center)
        self.witness = torch.zeros_like(ellipsoids.targets)
        self._narrowest = granularity.ranges(center, self._sides)
        self._bound = torch.zeros_like(self._narrowest)
        self._state = torch.zeros_like(center)
        self._multiplier = torch.zeros_like(ellipsoids.radius)  # t = 1/μ of the secular equation
        # Clipping starts at a twentieth of what the l1 norm of V is: within a factor 3 of what adaption ends at.
        self._rho = 20 / granularity.dual_norm(center, self._sides).clamp_min(1e-30)
        self._level = granularity.cells(center.abs()).amax(2, keepdim=True)  # θ
        self._anderson = Anderson(center, granularity.sums)

    def run(self, wanted: float) -> int:
        """Iterates until the gap is as small as wanted, and returns the number of iterations."""
        ellipsoids, center = self._ellipsoids, self._ellipsoids.center
        gap, iteration = math.inf, 0
        nearest = self._state
        while gap > _MARGIN * wanted and iteration < MAX_ITERATIONS:
            iteration += 1
            previous = nearest
            coordinates, self._multiplier = ellipsoids.outside(self._state, self._multiplier)
            dual = ellipsoids.basis @ coordinates
            nearest = self._state - dual
            clipped = self._clip((nearest - dual).add_(center)).sub_(center)
            if iteration % _CHECK_EVERY == 0:
                gap = self._check(nearest, ellipsoids.drawn(clipped), coordinates, dual)
                if iteration <= _ADAPT_UNTIL and self._balance(clipped, nearest, nearest - previous, dual):
                    continue
            self._state = self._anderson.step(self._state, (clipped - nearest).mul_(_RELAXATION))
        return iteration

    def _clip(self, point: Tensor) -> Tensor:
        """The proximal operator of the range, per cell: entries beyond θ times their side's reach are clipped."""
        cells = self._granularity.cells(point)
        magnitudes, room, level = cells.abs(), 1 / self._rho[:, None], self._level
        squares: Tensor | None = None
        above = below = torch.ones((), dtype=point.dtype, device=point.device)
        if self._sides is not None:  # with reach r an entry counts by r(|p| - rθ), of slope r² in θ
            above, below = self._sides
            reach = torch.where(cells > 0, above, below)
            magnitudes, squares = magnitudes.mul_(reach), reach.square()
        for _ in range(_MAX_NEWTON):
            beyond = (magnitudes - (level if squares is None else squares * level)).clamp_min_(0)
            excess = beyond.sum(2, keepdim=True) - room
            slopes = beyond.sign_() if squares is None else beyond.sign_().mul_(squares)
            done = (excess.abs() <= _NEWTON_ACCURACY * room).logical_or_((level == 0) & (excess <= 0)).all()
            level = (level + excess / slopes.sum(2, keepdim=True).clamp_min_(1)).clamp_min_(0)
            if bool(done):
                break
        self._level = level
        return self._granularity.matrix(torch.clamp(cells, -below * level, above * level), point.shape)

    def _check(self, nearest: Tensor, drawn: Tensor, coordinates: Tensor, dual: Tensor) -> float:
        """Keeps the narrowest weights and the highest bounds; returns the gap between them."""
        center = self._ellipsoids.center
        for candidate in (nearest, drawn):
            ranges = self._granularity.ranges(center + candidate, self._sides)
            better = ranges < self._narrowest
            self.best = torch.where(better, candidate, self.best)
            self._narrowest = torch.where(better, ranges, self._narrowest)
        bound = _bound(self._ellipsoids, self._granularity, self._sides, coordinates, dual)
        self.witness = torch.where(bound > self._bound, coordinates, self.witness)
        self._bound = torch.maximum(self._bound, bound)
        total = float(self._narrowest.sum())
        return (total - float(self._bound.sum())) / max(total, 1e-300)

    def _balance(self, clipped: Tensor, nearest: Tensor, moved: Tensor, dual: Tensor) -> bool:
        """Adapts ρ so that both residuals, each relative to its own scale, fall alike (Wohlberg 2017, 1704.06209).

        Returns:
            Whether any ρ changed, which starts the iteration anew from where it is.
        """

        def norm(values: Tensor) -> Tensor:
            return self._granularity.sums(values.square()).sqrt().clamp_min(1e-30)

        primal = norm(clipped - nearest) / norm(nearest + self._ellipsoids.center)
        ratio = primal / (norm(moved) / norm(dual))
        factor = torch.where((ratio > 2) | (ratio < 0.5), ratio.sqrt().clamp(0.2, 5), 1.0)
        if bool((factor == 1).all()):
            return False
        self._rho = self._rho * factor
        self._state = nearest + dual / factor
        self._anderson.forget()
        return True


def _bound(
    ellipsoids: Ellipsoids, granularity: Granularity, sides: Tensor | None, coordinates: Tensor, dual: Tensor
) -> Tensor:
    """Lower bound on the range of any weight within the ellipsoids, per problem.

    Args:
        ellipsoids: Of the columns.
        granularity: What is minimized.
        sides: Of `Granularity.sides`.
        coordinates: -Uᵀy `[g, k, m]`, up to a positive factor.
        dual: -y `[g, d, m]`.
    """
    norm = granularity.dual_norm(-dual, sides)
    # The coordinates have the factor λ, so that nothing is divided by a small eigenvalue in earnest.
    steep = torch.where(ellipsoids.eigenvalues > 0, coordinates / ellipsoids.eigenvalues.sqrt(), 0.0)
    steep = torch.linalg.vector_norm(steep, dim=1, keepdim=True)
    least = -granularity.sums(coordinates * ellipsoids.targets) - granularity.sums(ellipsoids.radius * steep)
    return torch.where(norm > 0, least / norm, 0.0)
