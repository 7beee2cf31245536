"""What quantizing a weight does to the layer's outputs, always against the ORIGINAL weight's outputs.

`‖A(Q(W) - V)‖_F / ‖A V‖_F` for the quantized shifted weight Q(W) and the original weight V. It holds the deviation of
the shift and the quantization error together: a shift that makes quantization easier by ruining the outputs shows as
a loss, not as a gain.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from onnx_optshift.quantize.rtn import Grid, round_to_nearest
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


def layer_errors(
    spectrum: Spectrum, original: Tensor, shifted: Tensor, grids: Iterable[Grid]
) -> list[tuple[Grid, float, float]]:
    """Output errors under round-to-nearest before and after a shift.

    Args:
        spectrum: Eigenbasis of the layer's rows.
        original: V `[g, d, m]`.
        shifted: W `[g, d, m]`, as it stands in the file.
        grids: The quantizers' levels to try.

    Returns:
        `(grid, error before, error after)` in the order of `grids`, both relative to ‖A V‖_F.
    """
    return [
        (grid, output_error(spectrum, original, original, grid), output_error(spectrum, original, shifted, grid))
        for grid in grids
    ]
