"""The table of objectives: what a solver minimizes, by the name that users give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from onnx_optshift.errors import InputError, closest
from onnx_optshift.solve import error_ball, quant_range, weighted_norm
from onnx_optshift.solve.quant_range import Granularity
from onnx_optshift.solve.shift import Shift
from onnx_optshift.solve.spectrum import Spectrum
from onnx_optshift.solve.weighted_norm import Metric

Objective = Callable[[Spectrum, Tensor, float, float], Shift]
"""`(spectrum, matrix [g, d, m], tolerance, rounding_unit) -> Shift`."""

OBJECTIVES: Mapping[str, Objective] = {
    "norm": error_ball.solve,
    "range": quant_range.solve,
    # Where there is no metric to weigh with; `solve_layer` takes `weighted_norm.solve` where there is one.
    "curvature": error_ball.solve,
}


def solve_layer(
    spectrum: Spectrum,
    matrix: Tensor,
    *,
    objective: str,
    tolerance: float,
    rounding_unit: float,
    granularity: Granularity | None = None,
    metric: Metric | None = None,
) -> Shift:
    """Solves one layer.

    Args:
        spectrum: Eigenbasis of the layer's rows.
        matrix: V `[g, d, m]`, any floating dtype.
        objective: A name in `OBJECTIVES`.
        tolerance: The residual allowed, relative to ‖AV‖_F; 0 is exact.
        rounding_unit: Of the dtype in which the weight is stored: 2⁻²⁴ for float32.
        granularity: What the quantizer scales by, for the objective "range"; per output channel when not given.
        metric: The norm that is made small, for the objective "curvature"; the plain one when not given.

    Raises:
        InputError: There is no objective of this name.
    """
    if objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise InputError(
            f"objective {objective!r} does not exist. Choose one of: {known}.{closest(objective, list(OBJECTIVES))}"
        )
    if objective == "range":
        return quant_range.solve(spectrum, matrix, tolerance, rounding_unit, granularity=granularity)
    if objective == "curvature" and metric is not None:
        return weighted_norm.solve(metric, matrix, tolerance, rounding_unit)
    return OBJECTIVES[objective](spectrum, matrix, tolerance, rounding_unit)
