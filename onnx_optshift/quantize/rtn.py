"""Round-to-nearest, the quantizer under all others: every weight goes to the nearest point of an evenly spaced grid.

Symmetric (int): `q = clip(round(w/s), -L, L)` with `L = 2^(b-1) - 1` and `s = max|w| / L`. The level -2^(b-1) is not
used, as in TensorRT and the ONNX Runtime QDQ format for weights: the grid is the same on both sides, and 2 bits are
the three levels -s, 0, s.

Full: `q = clip(round(w/s), -2^(b-1), 2^(b-1) - 1)` with `s = -w_x / 2^(b-1)`, where w_x is the weight largest in
magnitude, with its sign: it takes the level that only one side has. Symmetric 4-bit weights of ONNX Runtime's
MatMulNBits (its own quantizer) and GGML's Q4_0 are made like this.

Unsigned: `q = clip(round(w/s) + z, 0, 2^b - 1)` with `s = (hi - lo) / (2^b - 1)` and `z = round(-lo/s)`, where
`lo = min(w, 0)` and `hi = max(w, 0)` per scale. The range is widened to hold 0, so that 0 (padding, a pruned
weight) stays exactly 0.

What shares a scale: an output channel (all d inputs of one column), the whole tensor, or a block of consecutive inputs
of one column; the last block of a column may be shorter. Halves round to even. Where all weights of a scale are 0
they stay 0. Quantization is returned as what it amounts to, the dequantized weight. It is float64 here, while a file
stores its scale in float32, which differs by at most 6e-8 of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from onnx_optshift.errors import InputError, closest
from onnx_optshift.geometry import WeightForm

FEWEST_BITS, MOST_BITS = 2, 8
SCOPES = ("channel", "tensor", "block")
LEVELS = ("symmetric", "full", "unsigned")


@dataclass(frozen=True)
class Grid:
    """A quantizer's choice of levels.

    Attributes:
        bits: b, from 2 to 8.
        scope: What shares a scale: `"channel"` (one output), `"tensor"`, or `"block"`.
        block: Consecutive inputs that share a scale; given exactly when the scope is `"block"`.
        levels: `"symmetric"`, the same on both sides of 0; `"full"`, one more on the side of the largest weight; or
            `"unsigned"` with a zero point.

    Raises:
        InputError: A value cannot be used.
    """

    bits: int
    scope: str = "channel"
    block: int | None = None
    levels: str = "symmetric"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(FEWEST_BITS, MOST_BITS + 1):
            raise InputError(
                f"quantization bits: expected a whole number from {FEWEST_BITS} to {MOST_BITS}, found {self.bits!r}. "
                "Weights of 16 bits or more need no shift to survive rounding."
            )
        for what, value, known in (("scope", self.scope, SCOPES), ("levels", self.levels, LEVELS)):
            if value not in known:
                raise InputError(
                    f"quantization {what}: {value!r} is not known. Take one of {', '.join(map(repr, known))}."
                    f"{closest(str(value), list(known))}"
                )
        if (self.block is not None) != (self.scope == "block"):
            raise InputError(
                f"quantization block: found {self.block!r} with scope {self.scope!r}. Give a block size with scope "
                "'block', and none otherwise."
            )
        if self.block is not None and self.block < 1:
            raise InputError(f"quantization block: expected at least 1, found {self.block!r}. Usual are 32, 64 or 128.")

    @property
    def reach(self) -> float:
        """How much farther the levels go on one side of 0 than on the other: 1, or 2^(b-1) / (2^(b-1) - 1)."""
        half = 2.0 ** (self.bits - 1)
        return 1.0 if self.levels == "symmetric" else half / (half - 1)


def round_to_nearest(matrix: Tensor, grid: Grid) -> Tensor:
    """A weight matrix V `[g, d, m]` after quantization and dequantization, float64.

    Where a weight is not finite, everything that shares its scale is NaN.
    """
    matrix = matrix.to(torch.float64)
    if matrix.numel() == 0:
        return matrix.clone()
    if grid.block is None:
        return _on_grid(matrix, (1,) if grid.scope == "channel" else (0, 1, 2), grid)
    groups, width, outputs = matrix.shape
    blocks = -(-width // grid.block)
    # Zeros at the end of the last block change neither max|w| nor a range that holds 0 anyway.
    padded = functional.pad(matrix, (0, 0, 0, blocks * grid.block - width))
    rounded = _on_grid(padded.reshape(groups, blocks, grid.block, outputs), (2,), grid)
    return rounded.reshape(groups, blocks * grid.block, outputs)[:, :width]


def round_initializer(array: NDArray[np.generic], form: WeightForm, grid: Grid) -> NDArray[np.generic]:
    """An initializer after quantization and dequantization of the matrix V, rounded once more to its own dtype."""
    matrix = torch.from_numpy(np.ascontiguousarray(form.to_matrix(array).astype(np.float64)))
    return form.from_matrix(round_to_nearest(matrix, grid).numpy()).astype(array.dtype)


def _on_grid(values: Tensor, shared: tuple[int, ...], grid: Grid) -> Tensor:
    """Values on the grid whose scale is shared along the axes `shared`."""
    half = 2 ** (grid.bits - 1)
    low, high = values.amin(shared, keepdim=True), values.amax(shared, keepdim=True)
    if grid.levels == "unsigned":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _or_one((high - low) / (2 * half - 1))
        zero = torch.round(-low / scale)
        return ((torch.round(values / scale) + zero).clamp(0, 2 * half - 1) - zero) * scale
    if grid.levels == "full":
        scale = _or_one(torch.where(high > -low, high, low) / -half)
        return torch.round(values / scale).clamp(-half, half - 1) * scale
    scale = _or_one(torch.maximum(high, -low) / (half - 1))
    return torch.round(values / scale).clamp(1 - half, half - 1) * scale


def _or_one(scale: Tensor) -> Tensor:
    """A scale of 0 stands for weights that are all 0: any other value keeps them where they are."""
    return torch.where(scale == 0, 1.0, scale)
