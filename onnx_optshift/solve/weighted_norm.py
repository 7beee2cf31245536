"""The weight that the layers before it feel least: `min tr(WᵀMW)  subject to  ‖A(W - V)‖_F <= ε ‖AV‖_F`.

‖W‖_F only bounds what curvature the loss has in earlier layers. Those see the weight through `dz = Wᵀ dh`: how far its
outputs z move when an earlier weight θ moves its input h. With `M = E[Σ_θ (∂h/∂θ)(∂h/∂θ)ᵀ]` the sum of all squared
slopes is `E Σ_θ ‖∂z/∂θ‖² = tr(WᵀMW)`. At the last layer this is the trace of the Gauss-Newton matrix of all earlier
layers, with the identity for the loss's own Hessian; deeper down it is a part of it.

With `M = LLᵀ` (Cholesky) and `Y = LᵀW` it becomes `min ‖Y‖_F` over the rows `A L⁻ᵀ`, with the same residual: the
secular equation of `error_ball`, and at ε = 0 the projection of `min_norm`, oblique in W, which keeps `AW = AV`.

M comes as `M d / tr(M) + 1` (`balanced`): curvature and norm weigh alike, and directions that no earlier weight moves
are not free to grow.

Cost: one Cholesky factorization of M and one SVD of r x d for each input, once for all tolerances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onnx_optshift.solve.error_ball import BallPath
from onnx_optshift.solve.shift import Shift
from onnx_optshift.solve.spectrum import Coordinates, Spectrum


@dataclass(frozen=True)
class Metric:
    """A layer's rows seen through a norm.

    Attributes:
        lower: L `[g, d, d]` with M = LLᵀ, lower triangular.
        weighted: Of the rows `A L⁻ᵀ`.
    """

    lower: Tensor
    weighted: Spectrum

    def seen(self, matrix: Tensor) -> Tensor:
        """Y = LᵀW `[g, d, m]` of a matrix W."""
        return self.lower.mT @ matrix.to(self.lower)

    def unseen(self, matrix: Tensor) -> Tensor:
        """W = L⁻ᵀY `[g, d, m]`: the inverse of `seen`."""
        solution: Tensor = torch.linalg.solve_triangular(self.lower.mT, matrix, upper=True)
        return solution

    def square(self, matrix: Tensor) -> float:
        """tr(WᵀMW) of a matrix `[g, d, m]`, summed over groups."""
        return float(self.seen(matrix).square().sum())


def balanced(curvature: Tensor) -> Tensor:
    """`M d / tr(M) + 1` `[g, d, d]`, float64, the mean of the trace being over groups; the identity where M is 0.

    Args:
        curvature: M `[g, d, d]`, positive semidefinite.
    """
    curvature = curvature.to(torch.float64)
    identity = torch.eye(curvature.shape[-1], dtype=torch.float64, device=curvature.device)
    mean = float(curvature.diagonal(dim1=-2, dim2=-1).mean()) if curvature.numel() else 0.0
    return curvature / mean + identity if mean > 0 else identity.expand_as(curvature).clone()


def measure(spectrum: Spectrum, metric: Tensor) -> Metric:
    """Factors a layer's rows for one norm.

    Args:
        spectrum: Of the layer's rows.
        metric: M `[g, d, d]`, positive definite.
    """
    lower = torch.linalg.cholesky(metric.to(spectrum.basis))
    # B with BᵀB = L⁻¹ AᵀA L⁻ᵀ, without squaring what the eigenvalues resolve.
    turned = torch.linalg.solve_triangular(lower, spectrum.basis, upper=False)
    _, singular, basis_t = torch.linalg.svd(spectrum.eigenvalues.sqrt()[..., None] * turned.mT, full_matrices=False)
    # L is regular: the rows keep their rank, and what lies beyond it is rounding.
    rank = torch.count_nonzero(spectrum.eigenvalues, dim=-1)[:, None]
    numbers = torch.arange(singular.shape[-1], device=singular.device)
    squares = torch.where(numbers < rank, singular, 0.0).square()
    return Metric(lower, Spectrum(squares, basis_t.mT.contiguous(), spectrum.rows, spectrum.width))


def solve(metric: Metric, matrix: Tensor, tolerance: float, rounding_unit: float) -> Shift:
    """The weight of least weighted norm whose outputs stay within a tolerance of those of V.

    Args:
        metric: The layer's rows and norm.
        matrix: V `[g, d, m]`, any floating dtype.
        tolerance: ε = ‖A(W - V)‖_F / ‖AV‖_F, at most; 0 is exact.
        rounding_unit: Of the dtype in which the weight is stored.

    Returns:
        The shift. Its norms and ranges are the plain ones of V and W, so that they may come out larger.
    """
    matrix = matrix.to(metric.lower)
    found = BallPath(Coordinates.of(metric.weighted, metric.seen(matrix), rounding_unit)).at(tolerance)
    before = Shift.unchanged(matrix, found.outcome, rank=found.rank, residual=found.predicted_residual)
    if not found.outcome.moved:
        return before
    after = Shift.unchanged(metric.unseen(found.matrix), found.outcome)
    return replace(
        before,
        matrix=after.matrix,
        norm_after=after.norm_before,
        range_after=after.range_before,
        iterations=found.iterations,
    )
