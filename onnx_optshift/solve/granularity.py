"""Which entries of a weight share one scale of a quantizer, and how wide that makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onnx_optshift.errors import InputError


@dataclass(frozen=True)
class Granularity:
    """Which entries of a weight share one scale of the quantizer.

    Attributes:
        mode: "channel", one scale per output column; "block", one per `block` consecutive inputs of a column, of which
            the sum is minimized; "tensor", one for the whole weight.
        block: Inputs per block.
        reach: How much farther the levels go on one side of 0 than on the other: 1 where they are the same on both, 8/7
            for -8..7. Each cell has its far side where its own largest weight is. Solutions crowd at the two ends of
            the range: ends that fall between levels would be rounded by half a step or more, all of them.

    Raises:
        InputError: There is no such mode, the block is empty, or the reach is below 1.
    """

    mode: str = "channel"
    block: int = 32
    reach: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in {"channel", "block", "tensor"} or self.block < 1 or self.reach < 1:
            raise InputError(
                f"granularity {self.mode!r} with blocks of {self.block} and a reach of {self.reach:g} is not usable. "
                f"Choose channel, block or tensor, a block and a reach of at least 1."
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
        """Sum of `[..., g, k, m]` over each problem: `[..., g, 1, m]`, or `[..., 1, 1, 1]` for the mode "tensor"."""
        return values.sum((-3, -2, -1) if self.mode == "tensor" else -2, keepdim=True)

    def sides(self, matrix: Tensor) -> Tensor | None:
        """Reach above and below 0 of each cell, `[2, problems, cells, 1, columns]`; None where it is 1 everywhere."""
        if self.reach == 1:
            return None
        cells = self.cells(matrix)
        downwards = (-cells).amax(2, keepdim=True) >= cells.amax(2, keepdim=True)
        above = torch.where(downwards, 1.0, self.reach).to(matrix)
        return torch.stack([above, self.reach + 1 - above])

    def ranges(self, matrix: Tensor, sides: Tensor | None = None) -> Tensor:
        """What is minimized: the sum of the cells' max|W| over the reach of its side, per problem.

        Args:
            matrix: W `[g, d, m]`.
            sides: Of `sides`; those of W itself when not given.
        """
        sides = self.sides(matrix) if sides is None else sides
        if sides is None:
            return self.cells(matrix.abs()).amax(2).sum(1, keepdim=True)
        cells = self.cells(matrix)
        above, below = cells.amax(2, keepdim=True), (-cells).amax(2, keepdim=True)
        widest = torch.maximum(above / sides[0], below / sides[1]).clamp_min(0)
        return widest.squeeze(2).sum(1, keepdim=True)

    def dual_norm(self, matrix: Tensor, sides: Tensor | None) -> Tensor:
        """The dual of `ranges` with given sides: the largest sum of a cell's |entries| by their reach, per problem."""
        cells = self.cells(matrix)
        weighed = cells.abs() if sides is None else torch.where(cells > 0, sides[0] * cells, -sides[1] * cells)
        return weighed.sum(2).amax(1, keepdim=True)
