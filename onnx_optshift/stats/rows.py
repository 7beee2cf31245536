"""Activations as rows: what geometry says about a tap, done to tensors.

Every form is first a view whose axes are `[*group, *row, *feature]`; reshaping it gives the rows `[g, n, d]`, slicing
it gives a few of them without the rest. im2col is such a view too, so that patches exist only chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import MatrixRows, PatchRows, Tap
from onnx_optshift.stats import lags
from onnx_optshift.stats.moments import InputMoments

# Rows in float64 exist in pieces of about this size: large enough for full speed, small beside the activations.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _RowView:
    """A view `[*group, *row, *feature]` of an activation, and how many axes are which."""

    tensor: Tensor
    group_axes: int
    feature_axes: int

    @property
    def rows(self) -> int:
        return math.prod(self.tensor.shape[self.group_axes : self.tensor.ndim - self.feature_axes])

    def as_rows(self, tensor: Tensor) -> Tensor:
        groups = math.prod(tensor.shape[: self.group_axes])
        width = math.prod(tensor.shape[tensor.ndim - self.feature_axes :])
        rows = math.prod(tensor.shape[self.group_axes : tensor.ndim - self.feature_axes])
        return tensor.reshape(groups, rows, width)

    def chunks(self, limit: int) -> Iterator[Tensor]:
        """Slices of the view along its row axes, of at most `limit` rows each."""
        return _slices(self.tensor, self.group_axes, self.tensor.ndim - self.feature_axes, limit)


def to_rows(activation: Tensor, tap: Tap) -> Tensor:
    """The rows that an activation brings to a tap.

    Args:
        activation: The tap's value.
        tap: How it is read.

    Returns:
        Rows `[g, n, d]` in the activation's dtype.

    Raises:
        InputError: The activation does not have the tap's shape.
    """
    view = _view(activation, tap)
    rows = view.as_rows(view.tensor)
    return rows if tap.form.scale == 1 else rows * tap.form.scale


def observe(moments: InputMoments, tap: Tap, activation: Tensor) -> None:
    """Adds the rows of one activation to the moments of its tap, in float64 and bounded memory.

    An activation with NaN or infinity in it is only counted, in `moments.nonfinite`.

    Args:
        moments: To be added to.
        tap: How the activation is read.
        activation: The tap's value, any floating dtype and device.

    Raises:
        InputError: The activation does not have the tap's shape.
    """
    if activation.numel() == 0:
        _view(activation, tap)  # nothing to add, but a wrong shape is still an error
        return
    # NaN is the least and the greatest of anything it is in: one pass, no mask of the activation's size.
    if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(activation)):
        moments.nonfinite += activation.numel() - int(torch.isfinite(activation).sum())
        return
    limit = max(1, CHUNK_BYTES // (8 * tap.groups * tap.width))
    form = tap.form
    if isinstance(form, PatchRows):
        images = _checked_images(activation, form, tap)
        out = form_outputs(images, form)
        if lags.pays(form, tap.width, out) and moments.rows + len(images) * math.prod(out) > tap.width:
            ...
        # Padding copies: by as many images at a time as make a chunk.
        parts = images.split(max(1, limit // max(1, math.prod(out))))
    else:
        parts = (activation,)
    for part in parts:
        view = _view(part, tap)
        for piece in view.chunks(limit):
            rows = view.as_rows(piece.to(moments.device, torch.float64))
            # The factor goes on after the conversion: half precision would round it.
            moments.update(rows if form.scale == 1 else rows * form.scale)
