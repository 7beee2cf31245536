"""What quantizing a weight does to the layer's outputs, always against the ORIGINAL weight's outputs.

`‖A(Q(W) - V)‖_F / ‖A V‖_F` for the quantized shifted weight Q(W) and the original weight V. It holds the deviation of
the shift and the quantization error together: a shift that makes quantization easier by ruining the outputs shows as
a loss, not as a gain.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from onnx_optshift.quantize.rtn import MOST_BITS, Grid, round_to_nearest
from onnx_optshift.solve.spectrum import Spectrum, relative_residual


def output_error(spectrum: Spectrum, original: Tensor, weight: Tensor, grid: Grid) -> float:
    """Relative output error of a weight once it is rounded to nearest.

    Args:
        spectrum: Eigenbasis of the layer's rows A.
        original: V `[g, d, m]`, whose outputs are the truth.
        weight: W `[g, d, m]`, the weight that is quantized: V itself, or a shifted one.
        grid: The quantizer's levels.

    Returns:
        ‖A(Q(W) - V)‖_F / ‖A V‖_F; 0 when both are 0, infinity when only A V is.
    """
    return relative_residual(spectrum, original, round_to_nearest(weight, grid))


def output_errors(spectrum: Spectrum, original: Tensor, weight: Tensor, grids: Iterable[Grid]) -> dict[Grid, float]:
    """`output_error` of a weight for each of several grids."""
    return {grid: output_error(spectrum, original, weight, grid) for grid in grids}


def allowed_error(before: float, granted: float, grid: Grid, fewest: int) -> float:
    """The relative error that quantized outputs may have after a shift.

    No more than before. Only where 8 bits are looked at beside fewer, a deviation that was asked for is not held
    against a shift: 8 bits round so finely that any deviation shows, and the run is for the fewer bits.

    Args:
        before: The error of the original weights, quantized.
        granted: Relative deviation that the outputs may show.
        grid: What is rounded to.
        fewest: Bits of the coarsest grid.
    """
    return before if grid.bits == fewest or grid.bits < MOST_BITS else before + granted
