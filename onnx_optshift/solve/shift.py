"""What a solver returns: the new matrix, how it came about, and the figures that the report shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from onnx_optshift.errors import InputError
from onnx_optshift.solve.spectrum import Coordinates, relative_residual

# Smallest fall of ‖W‖² (or of the range), relative, that is worth new bytes in the file. It lies above what rounding
# a float32 weight adds back along the freed directions (4e-15), so that a second run finds nothing more.
MIN_GAIN = 1e-6


class Outcome(Enum):
    """How a layer ended. The values are the messages that users read."""

    SHIFTED = "shifted"
    STOPPED_EARLY = (
        "shifted, but stopped at the iteration limit: within the tolerance and better than before, perhaps not the "
        "best. (a) The tolerance is very small. (b) The rows are badly conditioned"
    )
    SNAPPED = "shifted onto the quantizer's grid: rounding to nearest reproduces it"
    FULL_RANK = (
        "the rows span all d directions: the equation has only one solution. "
        "Only a tolerance above 0 leaves room for another weight"
    )
    ALREADY_MINIMAL = (
        "nothing to gain: no solution is noticeably smaller than the weight itself. (a) The model was shifted before. "
        "(b) Training with weight decay had already removed what no row reaches. (c) The tolerance is too small"
    )
    ROUNDED_AWAY = (
        "nothing to gain: rounding the solution to the weight's dtype adds back what it took away, so that the bytes "
        "stay. A larger tolerance leaves more room"
    )
    ROUNDS_WORSE = (
        "nothing to gain: at every residual that was tried, the layer's outputs are farther off once the weight is "
        "quantized than those of the original weight. (a) The bits are many, and round finely already. "
        "(b) The range is set by weights that the outputs need"
    )
    NO_ROWS = (
        "no calibration row reached the layer. (a) The calibration data is empty. "
        "(b) The layer lies on a branch that the data never takes"
    )
    NONFINITE_ROWS = (
        "the layer's calibration inputs contain NaN or infinity. (a) The calibration data does. "
        "(b) An earlier layer overflows its dtype"
    )
    NONFINITE_WEIGHT = "the weight itself contains NaN or infinity"
    ZERO_OUTPUT = (
        "the layer's output is zero on every calibration row, so that nothing says which weights matter. "
        "(a) Its inputs are always zero, as behind a dead activation. (b) The weight is zero"
    )

    @property
    def moved(self) -> bool:
        """Whether the matrix differs from the one given."""
        return self in {Outcome.SHIFTED, Outcome.STOPPED_EARLY, Outcome.SNAPPED}


@dataclass(frozen=True)
class Shift:
    """A solution W of A W = A V (or nearly), in place of V.

    Attributes:
        matrix: W `[g, d, m]`, float64; V itself when the outcome is not one that moves.
        outcome: How the solver ended.
        rank: Directions kept, mean over groups, as `Coordinates.rank`.
        norm_before: ‖V‖_F.
        norm_after: ‖W‖_F.
        predicted_residual: ‖A(W - V)‖_F / ‖AV‖_F (or / the scale that was given), from the eigenvalues.
        range_before: Largest max|V| of an output channel.
        range_after: Largest max|W| of an output channel.
        iterations: Of the solver; 0 for a closed form.
    """

    matrix: Tensor
    outcome: Outcome
    rank: int
    norm_before: float
    norm_after: float
    predicted_residual: float
    range_before: float
    range_after: float
    iterations: int = 0

    @classmethod
    def unchanged(cls, matrix: Tensor, outcome: Outcome, *, rank: int = 0, residual: float = 0.0) -> Shift:
        """The matrix `[g, d, m]` as it was, and why.

        Args:
            matrix: V.
            outcome: The reason.
            rank: Directions kept.
            residual: Irreducible residual of V itself, where there is one.
        """
        matrix = matrix.to(torch.float64)
        norm, largest = float(torch.linalg.vector_norm(matrix)), largest_entry(matrix)
        return cls(matrix, outcome, rank, norm, norm, residual, largest, largest)

    @classmethod
    def moved_to(
        cls,
        coordinates: Coordinates,
        matrix: Tensor,
        *,
        outcome: Outcome = Outcome.SHIFTED,
        residual: float | None = None,
        iterations: int = 0,
    ) -> Shift:
        """A new matrix, with every figure taken from the matrix itself rather than from the solver's formula.

        Args:
            coordinates: V in the eigenbasis.
            matrix: W `[g, d, m]`.
            outcome: One that moves.
            residual: The predicted residual, where it does not refer to ‖AV‖_F.
            iterations: Of the solver.
        """
        before = coordinates.matrix
        if residual is None:
            residual = relative_residual(coordinates.spectrum, before, matrix)
        return cls(
            matrix,
            outcome,
            coordinates.rank,
            float(torch.linalg.vector_norm(before)),
            float(torch.linalg.vector_norm(matrix)),
            residual,
            largest_entry(before),
            largest_entry(matrix),
            iterations,
        )


def largest_entry(matrix: Tensor) -> float:
    """max|V| over all output channels; 0 for an empty matrix."""
    return float(torch.linalg.vector_norm(matrix, ord=math.inf)) if matrix.numel() else 0.0


def obstacle(coordinates: Coordinates) -> Outcome | None:
    """Why no solver can do anything here, or None."""
    if coordinates.spectrum.rows == 0:
        return Outcome.NO_ROWS
    # NaN fails every comparison: the first test catches weights that overflow in the product as well.
    if not math.isfinite(coordinates.total):
        finite = bool(torch.isfinite(coordinates.matrix).all())
        return Outcome.NONFINITE_ROWS if finite else Outcome.NONFINITE_WEIGHT
    if coordinates.total == 0:
        return Outcome.ZERO_OUTPUT
    return None


def least_gain(rounding_unit: float) -> float:
    """Smallest relative fall of ‖W‖² that is not undone by rounding the weight to its dtype."""
    return max(MIN_GAIN, rounding_unit**2)


def check_tolerance(tolerance: float) -> None:
    """Checks a residual tolerance.

    Raises:
        InputError: It is negative or not a number.
    """
    # Not <, or NaN would pass.
    if not tolerance >= 0:
        raise InputError(f"tolerance {tolerance!r} is not usable. Give a number from 0 (exact) up, such as 0.01.")
