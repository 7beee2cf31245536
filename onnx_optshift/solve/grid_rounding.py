"""Weights that lie on a quantizer's grid, rounded together so that their errors cancel in the layer's outputs.

Round-to-nearest decides every weight alone. Here `‖A(Q - V)‖_F` of a whole column is made small over the points Q of
the grid, with the ORIGINAL weight V as the target, in four steps:

1. narrow V within a residual (`quant_range`): the grid's scale follows the largest weight, and narrower is finer;
2. round with error feedback, the inputs of most energy first, each error being passed on to the inputs not yet rounded
   (GPTQ, Frantar et al. 2022, arXiv 2210.17323: `U = chol((H + damping)⁻¹)`, H = AᵀA), towards the narrowed weight;
3. refit every scale: for given levels q the best scale of a cell is a least-squares problem in one number;
4. move one level at a time to the best point of the grid against V (coordinate descent), and refit again, until the
   error falls no more.

Few rows say little of directions that they hardly reach, and a descent that trusts them moves weights there at will.
Steps 3 and 4 therefore work with H + ridge, a shrunk estimate of the second moment (Ledoit, Wolf 2004, "A
well-conditioned estimator for large-dimensional covariance matrices"); rows that did not fit choose the ridge.

The largest weight of every cell (what shares a scale) is pinned to the outermost level throughout. So any
round-to-nearest quantizer of the same granularity finds the same scales in the result, and reproduces it.

Cost: a Cholesky factorization of H, and about 2.5 d² m products a sweep. `grid_choice` repeats it on some columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.solve.grid_point import GridPoint, granularity_of, nearest_point, with_pins
from onnx_optshift.solve.problem import Problem
from onnx_optshift.solve.quant_range import narrowest
from onnx_optshift.solve.shift import obstacle
from onnx_optshift.solve.spectrum import Spectrum

# Of the mean diagonal of H. GPTQ's usual 0.01 served held-out rows up to 9 % worse where rows were few.
DAMPING = 0.1
# The same for the descent where nothing speaks for more.
LEAST_RIDGE = 0.01
# A start for rounding needs no tight certificate: at 0.02 layers of a transformer ended 1 % worse, in twice the time.
START_GAP = 0.1
# Sweeps of coordinate descent; they end where one takes less than this share off the squared error.
MOST_SWEEPS, LEAST_FALL = 6, 1e-2
# Refitted scales stay within this factor: beyond it the levels are the wrong ones.
MOST_REFIT = 2.0
# Inputs whose errors are passed on together, and columns at a time where they are independent. Their product stays
# below what torch shares out among threads (32,768 numbers): those would wait for one another at every input.
_CHUNK, _COLUMNS = 32, 1000


@dataclass(frozen=True)
class Start:
    """How a layer is brought onto the grid.

    Attributes:
        residual: Relative residual within which V is narrowed first; 0 for V itself.
        scale: Scale of every cell as a share of what its largest weight asks for.
        ridge: Added to every entry of the diagonal of AᵀA, as a share of their mean: the fewer the rows, the more of it
            serves rows that were not seen.
    """

    residual: float = 0.0
    scale: float = 1.0
    ridge: float = LEAST_RIDGE


def on_grid(problem: Problem, grid: Grid, start: Start) -> Tensor:
    """A weight `[g, d, m]`, float64, whose entries are points of the grid.

    In no column are the outputs farther from those of V than after round-to-nearest of V.

    Args:
        problem: The layer: rows, V, and how finely it is stored.
        grid: The target quantizer's, symmetric or full.
        start: How to begin; of `choose`.
    """
    matrix, rounding = problem.matrix, Rounding(problem.spectrum, grid)
    scale, ridge = (torch.full_like(matrix[:1, :1], share) for share in (start.scale, start.ridge))
    rounded = rounding.run(matrix, narrowed(problem, grid, start.residual), scale, ridge)
    width = matrix.shape[-1] if grid.scope == "tensor" else _COLUMNS
    for found, target in zip(*(torch.split(side, width, -1) for side in (rounded, matrix)), strict=True):
        plain = nearest_point(target, grid).values()
        errors, before = (by_column(side - target, rounding.gram) for side in (found, plain))
        found.copy_(torch.where(_less(errors, before, grid), found, plain))
    return rounded


def narrowed(problem: Problem, grid: Grid, residual: float) -> Tensor:
    """A start for rounding `[g, d, m]`: narrow within a residual; V itself where that leaves no room."""
    coordinates = problem.coordinates
    if residual <= problem.rounding_unit or obstacle(coordinates) is not None:
        return problem.matrix
    return narrowest(coordinates, residual, granularity_of(grid), gap=START_GAP).matrix


class Rounding:
    """Steps 2 to 4 for one layer's rows, in float32; the scales, and so the result, in float64.

    Args:
        spectrum: Of the rows.
        grid: The target quantizer's.

    Attributes:
        gram: AᵀA `[g, d, d]`, float64, of mean diagonal 1.
    """

    def __init__(self, spectrum: Spectrum, grid: Grid) -> None:
        gram = spectrum.gram()
        # Units in which float32 neither overflows nor loses small layers, and a ridge is a share of the mean energy.
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        self.gram = gram / mean.clamp_min(torch.finfo(torch.float64).tiny)
        self._single = self.gram.to(torch.float32)
        self._order, self._upper = _feedback(self.gram)
        self._grid = grid

    def run(self, matrix: Tensor, narrow: Tensor, share: Tensor, ridge: Tensor, *, sweeps: int = MOST_SWEEPS) -> Tensor:
        """V `[g, d, m]` on the grid, from a narrowed V, the share `[1, 1, m]` of its scales, and ridges `[1, 1, m]`."""
        if self._grid.scope == "tensor":
            return self._columns(matrix, narrow, share[..., :1], ridge[..., :1], sweeps=sweeps)
        rounded = torch.empty_like(matrix)
        sides = (torch.split(side, _COLUMNS, -1) for side in (rounded, matrix, narrow, share, ridge))
        for part, *given in zip(*sides, strict=True):
            part.copy_(self._columns(*given, sweeps=sweeps))
        return rounded

    def _columns(self, matrix: Tensor, narrow: Tensor, share: Tensor, ridge: Tensor, *, sweeps: int) -> Tensor:
        state = with_pins(narrow, self._grid, share)
        _round_in_order(state, narrow, self._order, self._upper)
        target = matrix.to(torch.float32)
        # Descent ends where it starts well: from round-to-nearest where that is closer.
        plain = nearest_point(matrix, self._grid)
        errors, before = (
            by_column(found.values().to(torch.float32) - target, self._single) for found in (state, plain)
        )
        state = state.where(_less(errors, before, self._grid), plain)
        metric = _Metric(self._single, ridge.to(torch.float32))
        least = math.inf
        for _ in range(sweeps):
            moved = state.values().to(torch.float32).sub_(target)
            slope = metric.times(moved)
            error = float((slope * moved).sum())
            if not error < (1 - LEAST_FALL) * least:
                break
            least = error
            _refit(state, slope, metric, self._grid)
            _descend(state, slope, metric)
        return state.values()


@dataclass(frozen=True)
class _Metric:
    """AᵀA plus a ridge: what a few rows say of all rows, drawn towards rows that are alike in all directions.

    Attributes:
        gram: AᵀA `[g, d, d]`, of mean diagonal 1.
        ridge: By column `[1, 1, m]`.
    """

    gram: Tensor
    ridge: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """Its product with a matrix `[g, d, m]`."""
        return (self.gram @ matrix).addcmul_(self.ridge, matrix)


def _feedback(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The order of rounding `[g, d]`, and in that order the upper Cholesky factor `[g, d, d]` of (H + damping)⁻¹."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(-1, descending=True)
    turned = gram.gather(1, order[..., None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    ridge = (DAMPING * diagonal.mean(-1)).clamp_min(torch.finfo(torch.float32).tiny)
    turned.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(turned))
    return order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def _round_in_order(state: GridPoint, narrow: Tensor, order: Tensor, upper: Tensor) -> None:
    """Error feedback: fills in the levels."""
    index = order[..., None].expand_as(narrow)
    rest = narrow.to(torch.float32).gather(1, index)
    scales, pins = state.scales.to(torch.float32).gather(1, index), state.pinned.gather(1, index)
    levels = state.levels.gather(1, index)
    width = narrow.shape[1]
    roots = upper.diagonal(dim1=-2, dim2=-1)[..., None]
    levels_of, scale, pinned, root = (x.unbind(1) for x in (levels, scales, pins, roots))
    for first in range(0, width, _CHUNK):
        last = min(first + _CHUNK, width)
        local = rest[:, first:last]
        wanted, rows = local.unbind(1), upper[:, first:last, first:last, None].unbind(1)
        errors = torch.empty_like(local)
        for k, error in enumerate(errors.unbind(1), first):
            nearest = (wanted[k - first] / scale[k]).round_().clamp_(state.low, state.high)
            levels_of[k].copy_(torch.where(pinned[k], levels_of[k], nearest))
            torch.addcmul(wanted[k - first], levels_of[k], scale[k], value=-1, out=error)
            error.div_(root[k])
            local[:, k - first + 1 :].addcmul_(rows[k - first][:, k - first + 1 :], error[:, None], value=-1)
        rest[:, last:].baddbmm_(upper[:, first:last, last:].mT, errors, alpha=-1)
    state.levels.scatter_(1, index, levels)


def _refit(state: GridPoint, slope: Tensor, metric: _Metric, grid: Grid) -> None:
    """The best scale of each cell for its levels, one block of inputs after the other; keeps the slope up to date."""
    values = state.values().to(torch.float32)
    width = values.shape[1]
    step = grid.block if grid.scope == "block" and grid.block else width
    summed = (0, 1, 2) if grid.scope == "tensor" else (1,)
    for first in range(0, width, step):
        rows = slice(first, first + step)
        part = values[:, rows]
        moved = metric.gram[:, :, rows] @ part
        moved[:, rows].addcmul_(metric.ridge, part)
        curvature = (part * moved[:, rows]).sum(summed, keepdim=True)
        gained = (part * slope[:, rows]).sum(summed, keepdim=True)
        factor = 1 - gained / curvature
        usable = (curvature > 0) & (factor > 1 / MOST_REFIT) & (factor < MOST_REFIT)
        factor = torch.where(usable, factor, torch.ones_like(factor))
        slope.addcmul_(moved, factor - 1)
        state.scales[:, rows] *= factor.to(torch.float64)


def _descend(state: GridPoint, slope: Tensor, metric: _Metric) -> None:
    """One sweep of coordinate descent on `‖A(Q - V)‖²` over the grid; uses the slope up."""
    gram, scales = metric.gram, state.scales.to(torch.float32)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)[..., None] + metric.ridge
    # The ridge keeps it above 0: weights of an input that is always 0 go to the nearest level.
    steps = 1 / (diagonal * scales)
    width = slope.shape[1]
    # Views of all inputs at once: taken one by one they would cost as much as the arithmetic.
    levels, pinned, sizes, scale = (x.unbind(1) for x in (state.levels, state.pinned, steps, scales))
    for first in range(0, width, _CHUNK):
        last = min(first + _CHUNK, width)
        local = slope[:, first:last]
        slopes, columns = local.unbind(1), gram[:, first:last, first:last, None].unbind(2)
        moves = torch.empty_like(local)
        for k, move in enumerate(moves.unbind(1), first):
            level = levels[k]
            nearest = torch.addcmul(level, slopes[k - first], sizes[k], value=-1).round_()
            nearest = torch.where(pinned[k], level, nearest.clamp_(state.low, state.high))
            torch.mul(nearest - level, scale[k], out=move)
            level.copy_(nearest)
            local.addcmul_(columns[k - first], move[:, None])
        slope[:, last:].baddbmm_(gram[:, last:, first:last], moves)


def _less(errors: Tensor, than: Tensor, grid: Grid) -> Tensor:
    """Where errors `[g, 1, m]` are less than others: by column, or for the whole where that shares a scale."""
    return errors.sum() < than.sum() if grid.scope == "tensor" else errors < than


def by_column(moved: Tensor, gram: Tensor) -> Tensor:
    """‖A x‖² of every column x of `[g, d, m]`, as `[g, 1, m]`."""
    return ((gram @ moved) * moved).sum(1, keepdim=True)
