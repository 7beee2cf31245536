"""From which residual and scale a layer is best rounded: tried on some of its columns, judged by other rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onnx_optshift.quantize.rtn import Grid, round_to_nearest
from onnx_optshift.solve.grid_rounding import LEAST_RIDGE, MOST_SWEEPS, Rounding, Start, by_column, narrowed
from onnx_optshift.solve.problem import Problem

# Residuals of the narrowed weight that are tried, as shares of what round-to-nearest of V costs: on six kinds of layers
# of a transformer, and 2 to 4 bits, the best lay between 0.06 (blocks, 4 bits) and 0.27 (channels, 2 bits).
RESIDUAL_SHARES = (0.0, 0.05, 0.12, 0.25)
# Scales that are tried, as shares of what the narrowed weight's largest entry asks for.
SCALE_SHARES = (1.0, 0.9)
# Ridges that are tried from the best of these starts: with 1.6 rows an input the most was best, by 15 % of the error on
# other rows, and with 20 rows the least, by 1 to 4 %; where energies decay the mean is large, and less is better.
RIDGES = (0.001, LEAST_RIDGE, 0.1, 0.4)
# Columns on which these are chosen.
SAMPLE = 64
# In layers of more inputs than this the choice is made by what one sweep of the descent leaves: more of them ended at
# starts as good. With few inputs, where they cost nothing, all of them took another 1.5 % off.
FEW_INPUTS = 256


def choose(problem: Problem, grid: Grid, judge: Tensor, most: float = 1.0) -> Start:
    """The start of least output error on rows that did not fit it.

    Args:
        problem: The layer.
        grid: The target quantizer's.
        judge: AᵀA `[g, d, d]` of other rows of the same layer.
        most: Largest residual that may be chosen.
    """
    some = _sampled(problem, grid)
    # Where the whole weight shares a scale nothing can be sampled, so that every start costs as much as the result.
    shares = RESIDUAL_SHARES[2:3] if grid.scope == "tensor" else RESIDUAL_SHARES
    narrow = _narrow_at(some, grid, shares, most)
    rounding = Rounding(problem.spectrum, grid)
    sweeps = MOST_SWEEPS if problem.spectrum.width <= FEW_INPUTS else 1

    def best(starts: Sequence[Start]) -> Start:
        found: dict[Start, float] = {}
        # Side by side where columns are independent: what a step costs is mostly its call.
        for group in [[start] for start in starts] if grid.scope == "tensor" else [starts]:
            scales = torch.cat([torch.full_like(some.matrix[:1, :1], start.scale) for start in group], -1)
            ridges = torch.cat([torch.full_like(some.matrix[:1, :1], start.ridge) for start in group], -1)
            target = torch.cat([some.matrix for _ in group], -1)
            begin = torch.cat([narrow[start.residual] for start in group], -1)
            rounded = rounding.run(target, begin, scales, ridges, sweeps=sweeps)
            errors = by_column(rounded - target, judge).sum(0).reshape(len(group), -1).sum(-1)
            found |= {start: float(error) for start, error in zip(group, errors, strict=True)}
        return min(found, key=lambda start: found[start])

    start = best([Start(residual, scale) for residual in narrow for scale in SCALE_SHARES])
    return best([replace(start, ridge=ridge) for ridge in RIDGES])


def choose_residual(problem: Problem, grids: Sequence[Grid], judge: Tensor, most: float = 1.0) -> float:
    """The residual of narrowing at which round-to-nearest has the least output error on rows that did not fit it.

    With several grids the one of fewest bits decides, among residuals that no grid is farther off at; 0 where none is.

    Args:
        problem: The layer.
        grids: The target quantizers'.
        judge: AᵀA `[g, d, d]` of other rows of the same layer.
        most: Largest residual that may be chosen.
    """
    coarsest = min(grids, key=lambda grid: grid.bits)
    some = _sampled(problem, coarsest)
    narrow = _narrow_at(some, coarsest, RESIDUAL_SHARES, most)

    def error(matrix: Tensor, grid: Grid) -> float:
        return float(by_column(round_to_nearest(matrix, grid) - some.matrix, judge).sum())

    before = {grid: error(some.matrix, grid) for grid in grids}
    good = [r for r, matrix in narrow.items() if all(error(matrix, grid) <= before[grid] for grid in grids)]
    return min(good, key=lambda residual: error(narrow[residual], coarsest))


def _narrow_at(problem: Problem, grid: Grid, shares: Sequence[float], most: float) -> dict[float, Tensor]:
    """Narrowed weights `[g, d, m]` by residual: shares of what round-to-nearest costs."""
    cost = problem.residual(round_to_nearest(problem.matrix, grid))
    cost = cost if math.isfinite(cost) else 0.0
    residuals = dict.fromkeys(min(most, share * cost) for share in shares)
    return {residual: narrowed(problem, grid, residual) for residual in residuals}


def _sampled(problem: Problem, grid: Grid) -> Problem:
    """The same layer with some of its columns; all of them where they share a scale."""
    columns = problem.matrix.shape[-1]
    if grid.scope == "tensor" or columns <= SAMPLE:
        return problem
    some = torch.linspace(0, columns - 1, SAMPLE, device=problem.matrix.device).round().long()
    return replace(problem, matrix=problem.matrix[..., some].contiguous())
