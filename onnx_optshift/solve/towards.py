"""The smallest weight whose outputs come near to given ones: `min ‖W‖_F  s.t.  ‖AW - Z‖² <= ‖AV* - Z‖² + ε² ‖Z‖²`.

V* is the least-squares solution `(AᵀA)⁺ AᵀZ` of least norm, and `‖AW - Z‖² = ‖A(W - V*)‖² + ‖AV* - Z‖²`: the ball of
`error_ball` around V*. What no weight can reach is not held against the layer, which gets its residual on top of that:
else a layer with a floor above its residual would be solved by V* itself, which noise in A can make arbitrarily large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnx_optshift.solve.error_ball import BallPath
from onnx_optshift.solve.shift import Shift
from onnx_optshift.solve.spectrum import Coordinates, Spectrum


def towards(spectrum: Spectrum, cross: Tensor, energy: float, residual: float, rounding_unit: float) -> Shift:
    """The smallest weight within a residual of wanted outputs Z `[g, n, m]`.

    Args:
        spectrum: Eigenbasis of the rows A `[g, n, d]`.
        cross: AᵀZ `[g, d, m]`.
        energy: ‖Z‖_F².
        residual: ε.
        rounding_unit: Of the dtype in which the weight is stored.

    Returns:
        The shift; V* itself where nothing smaller is found.
    """
    inverse = torch.where(spectrum.eigenvalues > 0, 1 / spectrum.eigenvalues, 0.0)
    # Within the span of the rows; beyond it the equation says nothing, and the smallest solution has nothing.
    center = spectrum.basis @ (inverse[..., None] * spectrum.coordinates(cross))
    reached = float((spectrum.eigenvalues[..., None] * spectrum.coordinates(center).square()).sum())
    scale = math.sqrt(max(energy, 0.0))
    floor = math.sqrt(max(energy - reached, 0.0)) / scale if scale else 0.0
    path = BallPath(Coordinates.of(spectrum, center, rounding_unit), floor=floor, scale=scale)
    return path.at(math.hypot(residual, floor))
