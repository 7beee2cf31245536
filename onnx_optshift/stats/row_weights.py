"""Row weights: every row's error counts relative to the row's own output, `w_r = 1 / ‖x_r V‖²`.

The energies of rows near 0 are taken as a share of the median's, or they would own the norm in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Samples that the median of a layer's energies is taken from.
MOST_SAMPLES = 32
# Least energy of a row, as a share of the median's.
FLOOR = 0.05
# Rows that hold the largest outputs, for the report's share of the Gram matrix.
TOP = 0.01


@dataclass(frozen=True)
class RowRule:
    """The weights of rows by the outputs that some layers give them: 1 over the mean of their relative energies.

    Attributes:
        root: R `[g, d, k]`, float32, with R Rᵀ the mean of V Vᵀ over the layers, each divided by the median energy of
            its output rows; k is d at most, so that a wide layer's weights cost no more than d² products a row.
    """

    root: Tensor

    @classmethod
    def of(cls, matrices: Sequence[Tensor], medians: Sequence[float]) -> RowRule:
        """The rule of layers with these V `[g, d, m]` and medians of the energy of their output rows."""
        scaled = [matrix / math.sqrt(median * len(matrices)) for matrix, median in zip(matrices, medians, strict=True)]
        root = torch.cat(scaled, -1)
        # The QR decomposition of the transpose: x R Rᵀ xᵀ = ‖x V‖² for every row.
        return cls(torch.linalg.qr(root.mT, mode="r").R.mT.contiguous() if root.shape[2] > root.shape[1] else root)

    def __call__(self, rows: Tensor) -> Tensor:
        """Weights `[n]` of rows `[g, n, d]`; 1 for a row of median energy."""
        return 1 / energies(rows, self.root).clamp_min(FLOOR)


@dataclass(frozen=True)
class Rows:
    """What a few samples say about the output rows of one layer.

    Attributes:
        energies: ‖x_r V‖² `[n]`.
    """

    energies: Tensor

    @property
    def median(self) -> float:
        """Median energy; the mean where most rows are 0."""
        return float(self.energies.median()) or float(self.energies.mean())

    @property
    def top_share(self) -> float:
        """Share of all energy that the largest 1 per cent of the rows have."""
        count = max(1, round(TOP * len(self.energies)))
        total = float(self.energies.sum())
        return float(self.energies.topk(count).values.sum()) / total if total else 0.0


def energies(rows: Tensor, matrix: Tensor) -> Tensor:
    """‖x_r V‖² `[n]` of rows `[g, n, d]`, over all groups, in float32."""
    return (rows.to(matrix) @ matrix).square().sum((0, 2))
