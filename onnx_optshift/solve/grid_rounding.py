"""Weights that lie on a quantizer's grid, rounded together so that their errors cancel in the layer's outputs.

Round-to-nearest decides every weight alone. Here `‖A(Q - V)‖_F` of a whole column is made small over the points Q of
the grid, with the ORIGINAL weight V as the target, in four steps:

1. narrow V within a residual (`quant_range`): the grid's scale follows the largest weight, and narrower is finer;
2. round with error feedback, the inputs of most energy first, each error being passed on to the inputs not yet rounded
   (GPTQ, Frantar et al. 2022, arXiv 2210.17323: `U = chol((H + damping)⁻¹)`, H = AᵀA), towards the narrowed weight;
3. refit every scale: for given levels q the best scale of a cell is a least-squares problem in one number;
4. move one level at a time to the best point of the grid against V (coordinate descent), and refit again, until the
   error falls no more.

The largest weight of every cell (what shares a scale) is pinned to the outermost level throughout. So any
round-to-nearest quantizer of the same granularity finds the same scales in the result, and reproduces it.

Cost: a Cholesky factorization of H, and about 2 d² m products a step. `grid_choice` repeats it on some columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.problem import Problem
from onnx_optshift.solve.quant_range import narrowest
from onnx_optshift.solve.shift import obstacle
from onnx_optshift.solve.spectrum import Coordinates, Spectrum

# Of the mean diagonal of H: the usual damping of GPTQ.
DAMPING = 0.01
# A start for rounding needs no certificate as tight as a result of its own.
START_GAP = 2e-2
# Sweeps of coordinate descent; they end where one takes less than this share off the squared error.
MOST_SWEEPS, LEAST_FALL = 6, 2e-3
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
    """

    residual: float = 0.0
    scale: float = 1.0


def on_grid(problem: Problem, grid: Grid, start: Start) -> Tensor:
    """A weight `[g, d, m]`, float64, whose entries are points of the grid.

    In no column are the outputs farther from those of V than after round-to-nearest of V.

    Args:
        problem: The layer: rows, V, and how finely it is stored.
        grid: The target quantizer's, symmetric or full.
        start: How to begin; of `choose`.
    """
    scale = torch.full_like(problem.matrix[:1, :1], start.scale)
    return Rounding(problem.spectrum, grid).run(problem.matrix, narrowed(problem, grid, start.residual), scale)


def narrowed(problem: Problem, grid: Grid, residual: float) -> Tensor:
    """A start for rounding `[g, d, m]`: narrow within a residual; V itself where that leaves no room."""
    coordinates = Coordinates.of(problem.spectrum, problem.matrix, problem.rounding_unit)
    if residual <= problem.rounding_unit or obstacle(coordinates) is not None:
        return problem.matrix
    return narrowest(coordinates, residual, _granularity(grid), gap=START_GAP).matrix


def _granularity(grid: Grid) -> Granularity:
    return Granularity(grid.scope, grid.block or 1, grid.reach)


class Rounding:
    """Steps 2 to 4 for one layer's rows, in float32; the scales, and so the result, in float64.

    Args:
        spectrum: Of the rows.
        grid: The target quantizer's.
    """

    def __init__(self, spectrum: Spectrum, grid: Grid) -> None:
        gram = spectrum.gram()
        # Units in which float32 neither overflows nor loses small layers.
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        self._gram = gram / mean.clamp_min(torch.finfo(torch.float64).tiny)
        self._single = self._gram.to(torch.float32)
        self._order, self._upper = _feedback(self._gram)
        self._grid = grid

    def run(self, matrix: Tensor, narrow: Tensor, share: Tensor) -> Tensor:
        """V `[g, d, m]` on the grid, from a narrowed V and the share `[1, 1, m]` of its scales."""
        if self._grid.scope == "tensor":
            return self._columns(matrix, narrow, share[..., :1])
        sides = (torch.split(side, _COLUMNS, -1) for side in (matrix, narrow, share))
        return torch.cat([self._columns(*part) for part in zip(*sides, strict=True)], -1)

    def _columns(self, matrix: Tensor, narrow: Tensor, share: Tensor) -> Tensor:
        state = _pinned(narrow, self._grid, share)
        _round_in_order(state, narrow, self._order, self._upper)
        # Every step from here on lowers the error: no column ends above round-to-nearest if it starts below.
        plain = _nearest(matrix, self._grid)
        errors, before = (by_column(found.values() - matrix, self._gram) for found in (state, plain))
        if self._grid.scope == "tensor":
            errors, before = errors.sum(), before.sum()
        state = state.where(errors < before, plain)
        target = matrix.to(torch.float32)
        best, least = state.values(), math.inf
        for _ in range(MOST_SWEEPS):
            _refit(state, target, self._single, self._grid)
            _descend(state, target, self._single)
            now = float(by_column(state.values() - matrix, self._gram).sum())
            if now < least:
                best = state.values()
            if not now < (1 - LEAST_FALL) * least:
                break
            least = now
        return best


def _feedback(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The order of rounding `[g, d]`, and in that order the upper Cholesky factor `[g, d, d]` of (H + damping)⁻¹."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(-1, descending=True)
    turned = gram.gather(1, order[..., None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    ridge = (DAMPING * diagonal.mean(-1)).clamp_min(torch.finfo(torch.float32).tiny)
    turned.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(turned))
    return order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


@dataclass
class _State:
    """A point of the grid: `levels * scales`.

    Attributes:
        levels: Whole numbers `[g, d, m]`.
        scales: Of every entry `[g, d, m]`, float64; equal within a cell.
        pinned: Entries whose level stays.
        low: Lowest level.
        high: Highest level.
    """

    levels: Tensor
    scales: Tensor
    pinned: Tensor
    low: int
    high: int

    def values(self) -> Tensor:
        """The weights, float64."""
        return self.levels.to(torch.float64) * self.scales

    def where(self, chosen: Tensor, other: _State) -> _State:
        """This one where `chosen` `[g, 1, m]`, the other elsewhere."""
        return _State(
            torch.where(chosen, self.levels, other.levels),
            torch.where(chosen, self.scales, other.scales),
            torch.where(chosen, self.pinned, other.pinned),
            self.low,
            self.high,
        )


def _pinned(narrow: Tensor, grid: Grid, share: Tensor) -> _State:
    """Scales and pinned levels; all other levels are 0 yet."""
    half = 2 ** (grid.bits - 1)
    granularity = _granularity(grid)
    cells = granularity.cells(narrow)
    place = cells.abs().argmax(2, keepdim=True)
    largest = cells.gather(2, place)
    # The one level that only a full grid has takes the largest weight, whatever its sign, as the quantizers do.
    outermost = torch.full_like(largest, -half) if grid.levels == "full" else largest.sign() * (half - 1)
    outermost = torch.where(largest == 0, 0.0, outermost)
    scale = torch.where(largest == 0, 1.0, share[..., None, :] * largest / torch.where(largest == 0, 1.0, outermost))

    def matrix(values: Tensor) -> Tensor:
        return granularity.matrix(values, narrow.shape).clone()

    levels = torch.zeros_like(cells).scatter_(2, place, outermost)
    pinned = torch.zeros_like(cells, dtype=torch.bool).scatter_(2, place, value=True)
    low = -half if grid.levels == "full" else 1 - half
    return _State(matrix(levels).to(torch.float32), matrix(scale.expand_as(cells)), matrix(pinned), low, half - 1)


def _nearest(matrix: Tensor, grid: Grid) -> _State:
    """Round-to-nearest of V itself."""
    state = _pinned(matrix, grid, torch.ones_like(matrix[:1, :1, :1]))
    levels = (matrix / state.scales).round().clamp(state.low, state.high)
    return replace(state, levels=levels.to(torch.float32))


def _round_in_order(state: _State, narrow: Tensor, order: Tensor, upper: Tensor) -> None:
    """Error feedback: fills in the levels."""
    index = order[..., None].expand_as(narrow)
    rest = narrow.to(torch.float32).gather(1, index)
    scales, pins = state.scales.to(torch.float32).gather(1, index), state.pinned.gather(1, index)
    levels = state.levels.gather(1, index)
    width = narrow.shape[1]
    for first in range(0, width, _CHUNK):
        last = min(first + _CHUNK, width)
        errors = torch.empty_like(rest[:, first:last])
        for k in range(first, last):
            nearest = (rest[:, k] / scales[:, k]).round_().clamp_(state.low, state.high)
            levels[:, k] = torch.where(pins[:, k], levels[:, k], nearest)
            error = (rest[:, k] - levels[:, k] * scales[:, k]) / upper[:, k, k, None]
            errors[:, k - first] = error
            rest[:, k + 1 : last] -= upper[:, k, k + 1 : last, None] * error[:, None]
        rest[:, last:] -= upper[:, first:last, last:].mT @ errors
    state.levels.scatter_(1, index, levels)


def _refit(state: _State, target: Tensor, gram: Tensor, grid: Grid) -> None:
    """The best scale of each cell for its levels, one block of inputs after the other."""
    values = state.values().to(torch.float32)
    slope = gram @ (values - target)
    width = target.shape[1]
    step = grid.block if grid.scope == "block" and grid.block else width
    summed = (0, 1, 2) if grid.scope == "tensor" else (1,)
    for first in range(0, width, step):
        rows = slice(first, first + step)
        part = values[:, rows]
        moved = gram[:, :, rows] @ part
        curvature = (part * moved[:, rows]).sum(summed, keepdim=True)
        gained = (part * slope[:, rows]).sum(summed, keepdim=True)
        factor = 1 - gained / curvature
        usable = (curvature > 0) & (factor > 1 / MOST_REFIT) & (factor < MOST_REFIT)
        factor = torch.where(usable, factor, torch.ones_like(factor))
        slope += moved * (factor - 1)
        state.scales[:, rows] *= factor.to(torch.float64)


def _descend(state: _State, target: Tensor, gram: Tensor) -> None:
    """One sweep of coordinate descent on `‖A(Q - V)‖²` over the grid."""
    scales, levels = state.scales.to(torch.float32), state.levels
    slope = gram @ (state.values().to(torch.float32) - target)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # An input that is always 0 moves nothing: its weights stay.
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    width = target.shape[1]
    for first in range(0, width, _CHUNK):
        last = min(first + _CHUNK, width)
        local = slope[:, first:last].clone()
        moves = torch.empty_like(local)
        for k in range(first, last):
            wanted = levels[:, k] - local[:, k - first] * inverse[:, k, None] / scales[:, k]
            nearest = torch.where(state.pinned[:, k], levels[:, k], wanted.round_().clamp_(state.low, state.high))
            moves[:, k - first] = (nearest - levels[:, k]) * scales[:, k]
            levels[:, k] = nearest
            local += gram[:, first:last, k, None] * moves[:, k - first, None]
        slope += gram[:, :, first:last] @ moves


def by_column(moved: Tensor, gram: Tensor) -> Tensor:
    """‖A x‖² of every column x of `[g, d, m]`, as `[g, 1, m]`."""
    return ((gram @ moved) * moved).sum(1, keepdim=True)
