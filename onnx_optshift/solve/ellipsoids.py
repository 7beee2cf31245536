"""The weights within a tolerance of V, `‖A(w - v)‖ <= ε ‖A v‖` for every column, and the projection on them.

In the eigenbasis the projection is one secular equation per column, as in `error_ball`; here Newton may start anywhere,
as one step leads to the left of the root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from onnx_optshift.solve.spectrum import Coordinates

_NEWTON_ACCURACY = 1e-4  # before Newton's last step, which squares it
_MAX_NEWTON = 100


@dataclass(frozen=True)
class Ellipsoids:
    """`{x: ‖A x‖ <= radius}` of every column; x = w - v is the move of the weight, so that little cancels.

    Units: every problem of V has range 1, the largest eigenvalue is 1.

    Attributes:
        basis: U `[g, d, k]`.
        eigenvalues: λ `[g, k, 1]`.
        center: v `[g, d, m]`.
        targets: Uᵀv `[g, k, m]`.
        radius: Positive, `[g, 1, m]`.
    """

    basis: Tensor
    eigenvalues: Tensor
    center: Tensor
    targets: Tensor
    radius: Tensor

    @classmethod
    def of(cls, coordinates: Coordinates, unit: Tensor, tolerance: float) -> Ellipsoids:
        """The ellipsoids of a tolerance around V / unit."""
        spectrum = coordinates.spectrum
        # Every direction with λ > 0 is held by the ellipsoid, dropped ones too: its weight there may grow.
        used = int(torch.count_nonzero((spectrum.eigenvalues > 0).any(0)))
        eigenvalues = spectrum.eigenvalues[:, :used, None]
        eigenvalues = eigenvalues / eigenvalues.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        targets = coordinates.coefficients[:, :used] / unit
        outputs = (eigenvalues * targets.square()).sum(1, keepdim=True).sqrt()
        # A column without any output may as well be 0; its ellipsoid would have no size to measure by.
        silent = outputs == 0
        return cls(
            spectrum.basis[..., :used].contiguous(),
            eigenvalues,
            torch.where(silent, 0.0, coordinates.matrix / unit),
            torch.where(silent, 0.0, targets),
            torch.where(silent, 1.0, tolerance * outputs),
        )

    def to(self, dtype: torch.dtype) -> Ellipsoids:
        """The same in another dtype."""
        return Ellipsoids(*(getattr(self, field.name).to(dtype) for field in fields(self)))

    def columns(self, part: slice) -> Ellipsoids:
        """The ellipsoids of some columns."""
        own = (tensor[..., part].contiguous() for tensor in (self.center, self.targets, self.radius))
        return Ellipsoids(self.basis, self.eigenvalues, *own)

    def outside(self, point: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates `[g, k, m]` of points less their projections, and the multipliers `[g, 1, m]` of these.

        Args:
            point: x `[g, d, m]`.
            root: Multipliers to start at.
        """
        offset = self.basis.mT @ point
        root = _secular_roots(self.eigenvalues, self.eigenvalues * offset.square(), self.radius, root)
        scaled = root * self.eigenvalues
        return offset.mul_(scaled.div_(scaled + 1)), root

    def nearest(self, point: Tensor) -> Tensor:
        """Weights `[g, d, m]` of the projections of moves."""
        coordinates, _ = self.outside(point, torch.zeros_like(self.radius))
        return self.center + point - self.basis @ coordinates

    def drawn(self, point: Tensor) -> Tensor:
        """Moves `[g, d, m]`, shortened until they are within."""
        outputs = (self.eigenvalues * (self.basis.mT @ point).square()).sum(1, keepdim=True).sqrt()
        return point * (self.radius / outputs.clamp_min(self.radius))


def _secular_roots(eigenvalues: Tensor, energies: Tensor, radius: Tensor, start: Tensor) -> Tensor:
    """Per column the t >= 0 with `√(Σ eᵢ/(1+tλᵢ)²) = radius`, and 0 where the column is within its radius.

    Args:
        eigenvalues: λ `[g, k, 1]`.
        energies: e `[g, k, m]`.
        radius: Positive, `[g, 1, m]`.
        start: Of Newton, `[g, 1, m]`, not negative: the roots of the iteration before.
    """
    root = start
    least = math.sqrt(torch.finfo(energies.dtype).tiny)
    for _ in range(_MAX_NEWTON):
        inverse = (root * eigenvalues).add_(1).reciprocal_()
        terms = inverse.square().mul_(energies)
        square = terms.sum(1, keepdim=True).clamp_min_(least)
        residual = square.sqrt()
        within = (root == 0) & (residual <= radius)
        done = ((residual - radius).abs() <= _NEWTON_ACCURACY * radius).logical_or_(within).all()
        slope = terms.mul_(inverse).mul_(eigenvalues).sum(1, keepdim=True) / (square * residual)
        root = torch.where(within, root, (root + (1 / radius - 1 / residual) / slope).clamp_min(0))
        if bool(done):
            break
    return root
