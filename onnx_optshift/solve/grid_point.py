"""A point of a quantizer's grid: levels times scales, the outermost pinned, so that quantizers find the same scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.solve.granularity import Granularity


@dataclass
class GridPoint:
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

    def where(self, chosen: Tensor, other: GridPoint) -> GridPoint:
        """This one where `chosen` `[g, 1, m]`, the other elsewhere."""
        return GridPoint(
            torch.where(chosen, self.levels, other.levels),
            torch.where(chosen, self.scales, other.scales),
            torch.where(chosen, self.pinned, other.pinned),
            self.low,
            self.high,
        )


def with_pins(narrow: Tensor, grid: Grid, share: Tensor) -> GridPoint:
    """Scales and pinned levels; all other levels are 0 yet."""
    half = 2 ** (grid.bits - 1)
    granularity = granularity_of(grid)
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
    return GridPoint(matrix(levels).to(torch.float32), matrix(scale.expand_as(cells)), matrix(pinned), low, half - 1)


def nearest_point(matrix: Tensor, grid: Grid) -> GridPoint:
    """Round-to-nearest of V itself."""
    point = with_pins(matrix, grid, torch.ones_like(matrix[:1, :1, :1]))
    levels = (matrix / point.scales).round().clamp(point.low, point.high)
    return replace(point, levels=levels.to(torch.float32))


def granularity_of(grid: Grid) -> Granularity:
    """Which entries share a scale of this grid, as the range solver knows it."""
    return Granularity(grid.scope, grid.block or 1, grid.reach)
