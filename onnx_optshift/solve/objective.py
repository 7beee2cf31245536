"""What a solver makes small. Each objective answers the same five questions, so that nobody asks which one it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.solve import quant_range, weighted_norm
from onnx_optshift.solve.error_ball import BallPath
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.problem import Problem
from onnx_optshift.solve.rounding_error import allowed_error, output_errors
from onnx_optshift.solve.shift import Outcome, Shift, largest_entry

# Smaller residuals that a layer is tried at before its shift is given up, where it rounds worse than the original.
SMALLER_RESIDUALS = 3
# What weights are mostly quantized to where 8 bits are not the question: "range" needs one to judge by.
DEFAULT_BITS = 4

Point = tuple[float, float]
"""(tolerance, figure as a share of the original's)."""


class Objective(Protocol):
    """What is made small, and what follows from it.

    Attributes:
        figure: The headline figure in words: what the objective makes small.
        needs_slopes: Whether it must be measured how far earlier weights move each layer's input.
        grids: What weights are rounded to before they are judged; empty where they are judged as they are.
    """

    @property
    def figure(self) -> str: ...  # noqa: D102
    @property
    def needs_slopes(self) -> bool: ...  # noqa: D102
    @property
    def grids(self) -> tuple[Grid, ...]: ...  # noqa: D102

    def solve(self, problem: Problem, tolerance: float) -> Shift:
        """The best weight whose outputs stay within a residual tolerance of those of V."""
        ...

    def residuals(self, tolerance: float) -> Iterator[float]:
        """Residuals to try one after the other until a solution has no objection."""
        ...

    def objection(self, problem: Problem, written: Tensor, tolerance: float) -> Outcome | None:
        """Why a solution, as it would stand in the file `[g, d, m]`, is not worth new bytes; None where it is."""
        ...

    def measure(self, problem: Problem, matrix: Tensor) -> float:
        """The headline figure of a weight `[g, d, m]`."""
        ...

    def frontier(self, problem: Problem, tolerances: Sequence[float]) -> list[Point]:
        """What other tolerances would give, where that costs next to nothing; else nothing."""
        ...


class Norm:
    """The smallest Frobenius norm."""

    figure = "norm"
    needs_slopes = False
    grids: tuple[Grid, ...] = ()

    def solve(self, problem: Problem, tolerance: float) -> Shift:
        """See `error_ball`."""
        return BallPath(problem.coordinates).at(tolerance)

    def residuals(self, tolerance: float) -> Iterator[float]:
        """The tolerance alone: every solution is smaller."""
        yield tolerance

    def objection(self, problem: Problem, written: Tensor, tolerance: float) -> Outcome | None:
        """Rounding may add back what the solution took away."""
        gained = self.measure(problem, written) < self.measure(problem, problem.matrix)
        return None if gained else Outcome.ROUNDED_AWAY

    def measure(self, problem: Problem, matrix: Tensor) -> float:
        """‖W‖_F."""
        return float(torch.linalg.vector_norm(matrix))

    def frontier(self, problem: Problem, tolerances: Sequence[float]) -> list[Point]:
        """From the one factorization."""
        return BallPath(problem.coordinates).frontier(tolerances)


class Curvature(Norm):
    """The smallest norm as earlier weights feel it; the plain one where none lies before the layer."""

    figure = "weighted norm"
    needs_slopes = True

    def solve(self, problem: Problem, tolerance: float) -> Shift:
        """See `weighted_norm`."""
        if problem.metric is None:
            return super().solve(problem, tolerance)
        return weighted_norm.solve(problem.metric, problem.matrix, tolerance, problem.rounding_unit)

    def measure(self, problem: Problem, matrix: Tensor) -> float:
        """√tr(WᵀMW)."""
        if problem.metric is None:
            return super().measure(problem, matrix)
        return math.sqrt(problem.metric.square(matrix))

    def frontier(self, problem: Problem, tolerances: Sequence[float]) -> list[Point]:
        """Only where it is the plain norm's."""
        return [] if problem.metric is not None else super().frontier(problem, tolerances)


class Range:
    """The smallest range that a quantizer scales by.

    Args:
        granularity: Which weights share a scale.
        grids: What the weights are going to be rounded to. A solution that rounds worse than the original weight is
            tried again at smaller residuals, and then given up.
    """

    figure = "range"
    needs_slopes = False

    def __init__(self, granularity: Granularity, grids: Sequence[Grid]) -> None:
        self.grids = tuple(grids)
        self._granularity = granularity

    def solve(self, problem: Problem, tolerance: float) -> Shift:
        """See `quant_range`."""
        return quant_range.solve(
            problem.spectrum, problem.matrix, tolerance, problem.rounding_unit, granularity=self._granularity
        )

    def residuals(self, tolerance: float) -> Iterator[float]:
        """The tolerance, and then powers of two below it: the same for tolerances nearby."""
        yield tolerance
        if tolerance > 0:
            highest = math.floor(math.log2(0.75 * tolerance))
            yield from (2.0 ** (highest - step) for step in range(SMALLER_RESIDUALS))

    def objection(self, problem: Problem, written: Tensor, tolerance: float) -> Outcome | None:
        """The layer's outputs must not be farther off once the weight is rounded than those of V, rounded."""
        before = output_errors(problem.spectrum, problem.matrix, problem.matrix, self.grids)
        after = output_errors(problem.spectrum, problem.matrix, written, self.grids)
        fewest = min(grid.bits for grid in self.grids)
        worse = any(after[grid] > allowed_error(before[grid], tolerance, grid, fewest) for grid in self.grids)
        return Outcome.ROUNDS_WORSE if worse else None

    def measure(self, problem: Problem, matrix: Tensor) -> float:
        """The largest absolute weight of an output channel."""
        return largest_entry(matrix)

    def frontier(self, problem: Problem, tolerances: Sequence[float]) -> list[Point]:
        """Nothing: every point is a solve of its own."""
        return []


def _range(bits: Sequence[int], scope: str, block: int | None, levels: str) -> Range:
    grids = make_grids(bits or (DEFAULT_BITS,), scope, block, levels)
    coarsest = min(grids, key=lambda grid: grid.bits)
    return Range(Granularity(coarsest.scope, block or Granularity.block, coarsest.reach), grids)


# By the name that users give.
OBJECTIVES: dict[str, Callable[[Sequence[int], str, int | None, str], Objective]] = {
    "norm": lambda *_: Norm(),
    "range": _range,
    "curvature": lambda *_: Curvature(),
}


def make_objective(
    name: str, bits: Sequence[int] = (), scope: str = "channel", block: int | None = None, levels: str = "auto"
) -> Objective:
    """The objective of a name.

    Args:
        name: A key of `OBJECTIVES`.
        bits: Bit widths that the weights are going to be quantized to.
        scope: What shares a scale: "channel" or "tensor".
        block: Consecutive inputs of a channel that share a scale; None for `scope`.
        levels: "symmetric", "full", or "auto".
    """
    return OBJECTIVES[name](bits, scope, block, levels)


def make_grids(
    bits: Sequence[int], scope: str = "channel", block: int | None = None, levels: str = "auto"
) -> tuple[Grid, ...]:
    """What weights are quantized to, for each bit width."""
    if levels == "auto":
        # Most quantizers that scale by blocks, MatMulNBits before all, use every level.
        levels = "symmetric" if block is None else "full"
    return tuple(Grid(width, scope if block is None else "block", block, levels) for width in bits)
