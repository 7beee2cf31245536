"""How a solution becomes the numbers of the file: today by rounding it once to the weight's own dtype."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.geometry import WeightForm


def as_matrix(content: NDArray[np.generic], form: WeightForm, device: str = "cpu") -> Tensor:
    """An initializer's content as the matrix V `[g, d, m]`, float64."""
    matrix = form.to_matrix(content).astype(np.float64, order="C")
    return torch.from_numpy(matrix).to(device)


def finished(matrix: Tensor, form: WeightForm, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """A solution `[g, d, m]` as the initializer's content, in its shape and dtype."""
    return form.from_matrix(matrix.cpu().numpy().astype(dtype))
