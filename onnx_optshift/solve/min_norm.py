"""The exact shift: the smallest weight with the same outputs.

`min ‖W‖_F  subject to  A W = A V` has the solution `W = P V`, P the orthogonal projector on the row space of A.
With independent rows this is `Aᵀ(AAᵀ)⁻¹ A V`, equation 8 of "Improving Generalization of Deep Neural Networks by
Optimum Shifting" (arXiv 2405.14111); the eigenbasis gives `W = U_K U_Kᵀ V` for any rows, K the kept directions.

Cost: two d x |K| x m products. It cannot help when the rows span all d directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onnx_optshift.solve.shift import Outcome, Shift, least_gain, obstacle
from onnx_optshift.solve.spectrum import Coordinates, Spectrum


def solve(spectrum: Spectrum, matrix: Tensor, rounding_unit: float) -> Shift:
    """The exact shift of one layer.

    Args:
        spectrum: Eigenbasis of the layer's rows.
        matrix: V `[g, d, m]`.
        rounding_unit: Of the dtype in which the weight is stored.
    """
    return solve_in(Coordinates.of(spectrum, matrix, rounding_unit))


def solve_in(coordinates: Coordinates, *, residual: float | None = None) -> Shift:
    """The exact shift in coordinates that were computed before.

    Args:
        coordinates: V in the eigenbasis.
        residual: The predicted residual, where it does not refer to ‖AV‖_F.
    """
    matrix, rank = coordinates.matrix, coordinates.rank
    blocked = obstacle(coordinates)
    if blocked is None and coordinates.full_rank:
        blocked = Outcome.FULL_RANK
    if blocked is None:
        norm = float(torch.linalg.vector_norm(matrix)) ** 2
        kept = float(coordinates.coefficients.square().sum(-1)[coordinates.kept].sum())
        # The shift is a projection: the second time it changes nothing but what rounding left.
        if 1 - kept / norm < least_gain(coordinates.rounding_unit):
            blocked = Outcome.ALREADY_MINIMAL
    if blocked is not None:
        return Shift.unchanged(matrix, blocked, rank=rank, residual=residual or 0.0)
    projected = coordinates.combine(torch.ones_like(coordinates.energies))
    return Shift.moved_to(coordinates, projected, residual=residual)
