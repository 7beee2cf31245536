"""The eigenbasis of the rows' second moment: computed once, used by every objective and every tolerance.

`AᵀA = U diag(λ) Uᵀ`. In coordinates `C = UᵀV` the equation decouples: `‖A(W - V)‖² = Σ λᵢ ‖(UᵀW)ᵢ - cᵢ‖²`, so that
row i of C is free where λᵢ = 0, and matters by its energy `λᵢ‖cᵢ‖²` elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onnx_optshift.stats.moments import InputMoments

# Columns of a weight that are in the eigenbasis at the same time where only a sum over them is wanted.
_COLUMNS = 4096


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of G = AᵀA, per group.

    Attributes:
        eigenvalues: λ `[g, r]`, float64, descending; those that rounding cannot tell from 0 are exactly 0.
        basis: U `[g, d, r]`, orthonormal columns. Directions outside its span are met by no row.
        rows: n, rows per group.
        width: d.
    """

    eigenvalues: Tensor
    basis: Tensor
    rows: int
    width: int

    def coordinates(self, matrix: Tensor) -> Tensor:
        """UᵀV `[g, r, m]` of a matrix `[g, d, m]`, float64 on the spectrum's device."""
        return self.basis.mT @ matrix.to(self.basis)

    def gram(self) -> Tensor:
        """G = AᵀA `[g, d, d]`, float64, as far as its eigenvalues are resolved."""
        return (self.basis * self.eigenvalues[:, None]) @ self.basis.mT


def factor(moments: InputMoments) -> Spectrum:
    """Eigenbasis of the rows: by SVD of the rows while they are stored, else by eigendecomposition of G.

    The SVD has r = n <= d and never builds a d x d matrix. G squares the condition number: through it, singular
    values below 6e-8 (float32's rounding unit) of the largest one are lost and count as 0.

    Args:
        moments: Finite moments of the rows.
    """
    rows = moments.stored_rows
    if rows is not None:
        _, singular, basis_t = torch.linalg.svd(rows, full_matrices=False)
        # Threshold of numpy.linalg.matrix_rank: the rounding error of the largest singular value.
        eigenvalues = _resolved(singular, max(rows.shape[1:]) * torch.finfo(torch.float64).eps) ** 2
        basis = basis_t.mT
    else:
        ascending, vectors = torch.linalg.eigh(moments.gram())
        # Measured: null directions of G come out within 5 eps of 0 relative to the largest, for d = 16 to 1,024.
        eigenvalues = _resolved(ascending.flip(-1), 16 * torch.finfo(torch.float64).eps)
        basis = vectors.flip(-1)
    return Spectrum(eigenvalues, basis.contiguous(), moments.rows, moments.width)


def _resolved(values: Tensor, unit: float) -> Tensor:
    """Values `[g, r]`, descending, with those that rounding cannot tell from 0 set to 0.

    A Gram matrix has no negative eigenvalues: where one is computed, it shows how far rounding reaches. `unit` times
    the largest value is assumed besides, as a few null directions may all have come out positive.
    """
    if values.shape[-1] == 0:
        return values
    noise = torch.maximum(values[..., :1] * unit, -2 * values[..., -1:])
    return torch.where(values > noise, values, 0.0)


def decide_rank(spectrum: Spectrum, coefficients: Tensor, rounding_unit: float) -> Tensor:
    """Which directions matter to the output: the one place where rank is decided.

    Per group the directions of smallest λ are dropped while the sum of their energies `λᵢ‖cᵢ‖²` stays within
    `rounding_unit²` of the group's total: what they add to the output is then less than what rounding the weight
    once already does. A cut-off on λ alone would not know how strongly the weight reads a direction.

    Args:
        spectrum: Eigenbasis of the rows.
        coefficients: C = UᵀV `[g, r, m]`.
        rounding_unit: Of the dtype in which the weight is stored, 2⁻²⁴ for float32.

    Returns:
        Mask `[g, r]`, True for the directions kept. A direction with λ = 0 never is.
    """
    energies = spectrum.eigenvalues * coefficients.square().sum(-1)
    dropped = energies.flip(-1).cumsum(-1).flip(-1)  # of this direction and all smaller ones
    total = energies.sum(-1, keepdim=True)
    # Not >=, or a group whose output is all zeros would keep everything.
    return (dropped > rounding_unit**2 * total) & (spectrum.eigenvalues > 0)


@dataclass(frozen=True)
class Coordinates:
    """A weight matrix seen from the eigenbasis, with the rank decided.

    Attributes:
        spectrum: The eigenbasis.
        matrix: V `[g, d, m]`, float64.
        coefficients: C = UᵀV `[g, r, m]`.
        kept: Mask `[g, r]` of the directions that matter to the output.
        energies: λᵢ‖cᵢ‖² `[g, r]`; their sum is ‖AV‖².
        rounding_unit: That the rank was decided with.
    """

    spectrum: Spectrum
    matrix: Tensor
    coefficients: Tensor
    kept: Tensor
    energies: Tensor
    rounding_unit: float

    @classmethod
    def of(cls, spectrum: Spectrum, matrix: Tensor, rounding_unit: float) -> Coordinates:
        """Coordinates of a matrix `[g, d, m]` of any floating dtype."""
        matrix = matrix.to(spectrum.basis)
        coefficients = spectrum.coordinates(matrix)
        kept = decide_rank(spectrum, coefficients, rounding_unit)
        energies = spectrum.eigenvalues * coefficients.square().sum(-1)
        return cls(spectrum, matrix, coefficients, kept, energies, rounding_unit)

    @property
    def rank(self) -> int:
        """Directions kept, mean over groups, rounded down; but at least 1 where any is kept."""
        kept = int(self.kept.sum())
        return max(kept // max(1, self.kept.shape[0]), min(kept, 1))

    @property
    def free(self) -> int:
        """Directions that are not kept, over all groups."""
        return self.kept.shape[0] * self.spectrum.width - int(self.kept.sum())

    @property
    def full_rank(self) -> bool:
        """Whether every group keeps all d directions, so that A W = A V has only one solution."""
        return self.free == 0

    @property
    def total(self) -> float:
        """‖AV‖_F²."""
        return float(self.energies.sum())

    @property
    def dropped(self) -> float:
        """‖A(W - V)‖_F² when W loses exactly the directions that are not kept."""
        return float(self.energies[~self.kept].sum())

    def combine(self, factors: Tensor) -> Tensor:
        """`U diag(factors) C` `[g, d, m]` over the kept directions, each scaled by its own factor `[g, r]`."""
        # λ descends, so the directions in use come first: the product may stop after the last of them.
        used = int(torch.count_nonzero(self.kept.any(0)))
        return self.spectrum.basis[..., :used] @ (
            torch.where(self.kept, factors, 0.0)[..., :used, None] * self.coefficients[:, :used]
        )


def relative_residual(spectrum: Spectrum, before: Tensor, after: Tensor, total: float | None = None) -> float:
    """‖A(W - V)‖_F / ‖A V‖_F of any two matrices, from the eigenbasis alone.

    Args:
        spectrum: Eigenbasis of the rows.
        before: V `[g, d, m]`, any floating dtype.
        after: W `[g, d, m]`.
        total: ‖A V‖_F², where it is known.

    Returns:
        0 when both are 0, infinity when only A V is.
    """
    basis = spectrum.basis
    weights = spectrum.eigenvalues[..., None]
    moved = whole = 0.0
    for start in range(0, before.shape[-1], _COLUMNS):
        old, new = before[..., start : start + _COLUMNS], after[..., start : start + _COLUMNS]
        # The difference is taken before the product: it is many orders of magnitude smaller than either.
        moved += float((weights * spectrum.coordinates(new.to(basis) - old.to(basis)).square()).sum())
        if total is None:
            whole += float((weights * spectrum.coordinates(old).square()).sum())
    whole = whole if total is None else total
    if whole == 0:
        return 0.0 if moved == 0 else math.inf
    return math.sqrt(moved / whole)
