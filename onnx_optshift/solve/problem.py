"""One layer as an equation: its rows, its weight, and how finely that is stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from onnx_optshift.solve.spectrum import Coordinates, Spectrum, relative_residual
from onnx_optshift.solve.weighted_norm import Metric

# Half the distance from 1 to the next number: the largest relative error of rounding to the dtype.
ROUNDING_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Problem:
    """A W = A V, to be solved for a better W.

    Attributes:
        spectrum: Eigenbasis of the rows A.
        matrix: V `[g, d, m]`, float64.
        rounding_unit: Of the dtype in which the weight is stored.
        metric: The norm that earlier weights give W, where an objective asks for it and it could be measured.
        note: Why there is no metric although one was asked for; empty otherwise.
    """

    spectrum: Spectrum
    matrix: Tensor
    rounding_unit: float
    metric: Metric | None = None
    note: str = ""

    @cached_property
    def coordinates(self) -> Coordinates:
        """V in the eigenbasis, with the rank decided."""
        return Coordinates.of(self.spectrum, self.matrix, self.rounding_unit)

    def residual(self, matrix: Tensor) -> float:
        """‖A(W - V)‖_F / ‖A V‖_F of a matrix W `[g, d, m]`."""
        return relative_residual(self.spectrum, self.matrix, matrix, self.coordinates.total)
