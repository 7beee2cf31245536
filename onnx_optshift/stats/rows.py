"""Activations as rows: what geometry says about a tap, done to tensors.

Every form is first a view whose axes are `[*group, *row, *feature]`: reshaped it is the rows `[g, n, d]`, sliced it
is a few of them without the rest. So an activation never exists as a whole in float64, nor patches all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import AxisRows, Inside, MatrixRows, PatchRows, Tap
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.patches import check_images, lag_axis, outputs, patch_gram, patch_view

# Rows in float64 exist in pieces of about this size: enough for full speed, little beside the activations.
CHUNK_BYTES = 64 * 2**20
# Patches that each image keeps, more or less, however small it is.
LEAST_OF_IMAGE = 64
# Largest entries of activations between these have products, and sums of many of them, that float32 holds.
SINGLE = 1e-12, 1e12

Weigh = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _RowView:
    """A view `[*group, *row, *feature]` of an activation, with the numbers of group and of feature axes."""

    tensor: Tensor
    group_axes: int
    feature_axes: int

    def rows(self, tensor: Tensor) -> Tensor:
        """The view, or a slice of it along its row axes, as `[g, n, d]`."""
        first, last = self.group_axes, tensor.ndim - self.feature_axes
        shape = tensor.shape
        return tensor.reshape(math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:]))

    def thinned(self, every: int, phase: int) -> _RowView:
        """One of so many rows of each sample, evenly spaced along its last axes; another phase takes others."""
        tensor = self.tensor
        for axis in range(tensor.ndim - self.feature_axes - 1, self.group_axes, -1):
            step = min(every, tensor.shape[axis])
            # From the middle of a step: at the edges patches hold padding.
            tensor = tensor[(slice(None),) * axis + (slice((step // 2 + phase) % step, None, step),)]
            every, phase = round(every / step), phase // step
        return replace(self, tensor=tensor)

    def slices(self, limit: int) -> Iterator[Tensor]:
        """Slices along the row axes, of at most `limit` rows each."""
        return _slices(self.tensor, self.group_axes, self.tensor.ndim - self.feature_axes, limit)


def to_rows(activation: Tensor, tap: Tap) -> Tensor:
    """The rows `[g, n, d]` that an activation, the value of a tap, brings to it; in the activation's dtype.

    Raises:
        InputError: The activation does not have the tap's shape.
    """
    if tap.inside is not None:
        each = [to_rows(piece, replace(tap, inside=None)) for piece in _runs(activation, tap.inside)]
        return torch.cat(each, 1) if each else activation.new_zeros(tap.groups, 0, tap.width)
    view = _view(activation, tap)
    rows = view.rows(view.tensor)
    return rows if tap.form.scale == 1 else rows * tap.form.scale


def observe(
    moments: InputMoments,
    tap: Tap,
    activation: Tensor,
    weigh: Weigh | None = None,
    *,
    every: int = 1,
    phase: int = 0,
) -> None:
    """Adds the rows of one activation to the moments of its tap, in bounded memory.

    An activation (any floating dtype and device) that contains NaN or infinity is not added: its elements that are not
    finite are counted. `weigh` gives the weights w `[n]` of rows `[g, n, d]`, which enter as √w times what they are. Of
    each image's patches one of `every` is taken, though about `LEAST_OF_IMAGE` at least, by turns: `phase` counts them.

    Raises:
        InputError: The activation does not have the tap's shape.
    """
    if tap.inside is not None:
        for piece in _runs(activation, tap.inside):
            observe(moments, replace(tap, inside=None), piece, weigh, every=every, phase=phase)
        return
    form = tap.form
    if activation.numel() == 0:
        _view(activation, tap)  # brings no rows; a wrong shape is an error all the same
        return
    # NaN is the least and the greatest of anything it is in: one pass, and no mask of the activation's size.
    low, high = map(float, torch.aminmax(activation))
    if not (math.isfinite(low) and math.isfinite(high)):
        moments.nonfinite += activation.numel() - int(torch.isfinite(activation).sum())
        return
    largest = max(-low, high) * abs(form.scale)
    dtype = moments.products if SINGLE[0] < largest < SINGLE[1] else torch.float64

    limit = max(1, CHUNK_BYTES // (8 * tap.groups * tap.width))
    parts: Sequence[Tensor] = (activation,)
    if isinstance(form, PatchRows):
        check_images(activation, form, tap)
        per_image = math.prod(outputs(activation, form))
        rows = len(activation) * per_image
        every = max(1, min(every, per_image // LEAST_OF_IMAGE))  # images of one data set may differ in size
        axis = lag_axis(activation, form)
        if weigh is None and every == 1 and axis is not None and moments.rows + rows > tap.width:
            gram, total = patch_gram(activation, form, axis, device=moments.device, chunk_bytes=CHUNK_BYTES)
            moments.update_gram(gram * form.scale**2, total * form.scale, rows)
            return
        parts = torch.split(activation, max(1, limit // per_image))  # padding copies: only these images at a time
    for part in parts:
        view = _view(part, tap)
        view = view.thinned(every, phase) if every > 1 else view
        for piece in view.slices(limit):
            _add(moments, view, piece, form.scale, weigh, dtype)


def _runs(activation: Tensor, inside: Inside) -> Sequence[Tensor]:
    """What each run of a body brought; nothing where it never ran."""
    if activation.numel() and inside.loops:
        return activation.flatten(0, inside.loops - 1).unbind(0)
    return (activation,) if activation.numel() else ()


def _add(
    moments: InputMoments, view: _RowView, piece: Tensor, scale: float, weigh: Weigh | None, dtype: torch.dtype
) -> None:
    # A function of its own, so that its copy of the rows is gone before the next one is made.
    # Conversion and copy in one pass: a cast alone keeps the strides of im2col, and reshaping copies again.
    rows = view.rows(piece.to(moments.device, dtype, memory_format=torch.contiguous_format))
    # The factor follows the conversion: in half precision it would be rounded away.
    rows = rows if scale == 1 else rows * scale
    moments.update(rows if weigh is None else rows * weigh(rows).to(rows).sqrt()[:, None])


def _view(activation: Tensor, tap: Tap) -> _RowView:
    form = tap.form
    if isinstance(form, PatchRows):
        check_images(activation, form, tap)
        return _RowView(patch_view(activation, form), 1, 1 + len(form.kernel))
    if isinstance(form, AxisRows):
        return _axis_view(activation, form, tap)
    return _matrix_view(activation, form, tap)


def _axis_view(activation: Tensor, form: AxisRows, tap: Tap) -> _RowView:
    # As `[*groups, 1, *other axes, *features]`: the 1 makes a row where there is no other axis.
    shape, axes = activation.shape, (*form.groups, *form.features)
    fits = all(-len(shape) <= axis < len(shape) for axis in axes)
    if (
        not fits
        or math.prod(shape[axis] for axis in form.groups) != tap.groups
        or math.prod(shape[axis] for axis in form.features) != tap.width
    ):
        raise InputError(
            f"value {tap.value!r} has shape {list(shape)}, but its layer reads {tap.groups} group(s) from the axes "
            f"{list(form.groups)} and rows of {tap.width} from the axes {list(form.features)}. Check that the "
            "calibration inputs have the shapes that the model was exported for."
        )
    groups, features = ([axis % len(shape) for axis in some] for some in (form.groups, form.features))
    free = [axis for axis in range(len(shape)) if axis not in {*groups, *features}]
    return _RowView(activation.permute(*groups, *free, *features).unsqueeze(len(groups)), len(groups), len(features))


def _matrix_view(activation: Tensor, form: MatrixRows, tap: Tap) -> _RowView:
    # `[*leading, n, d]` as `[*batch, *leading not in batch, n, d]`. MatMul broadcasts the leading axes of X against
    # those of the weight, aligned at the right. Where X is short or has a 1, each matrix of the weight meets the same
    # rows; where the weight has a 1 or no axis, X brings more rows.
    tensor = activation
    if tensor.ndim == 1:
        tensor = tensor[None]
    elif tensor.ndim and form.feature_axis == -2:
        tensor = tensor.mT
    if tensor.ndim == 0 or tensor.shape[-1] != tap.width:
        which = "only" if activation.ndim == 1 else "last" if form.feature_axis == -1 else "second to last"
        raise InputError(
            f"value {tap.value!r} has shape {list(activation.shape)}, but its layer reads rows of {tap.width} from its "
            f"{which} axis. Check that the calibration inputs have the shapes that the model was exported for."
        )
    batch = form.batch
    missing = len(batch) - (tensor.ndim - 2)
    tensor = tensor[(None,) * max(0, missing)]
    leading = tensor.ndim - 2
    aligned = range(leading - len(batch), leading)
    sizes = list(tensor.shape)
    for axis, size in zip(aligned, batch, strict=True):
        if sizes[axis] == 1:
            sizes[axis] = size
        elif size not in {1, sizes[axis]}:
            raise InputError(
                f"value {tap.value!r} has shape {list(activation.shape)}, whose leading axes do not broadcast against "
                f"the {list(batch)} matrices of its weight. Check the shapes of the calibration inputs."
            )
    tensor = tensor.expand(sizes)
    owned = [axis for axis, size in zip(aligned, batch, strict=True) if size > 1]
    free = [axis for axis in range(leading) if axis not in owned]
    return _RowView(tensor.permute(*owned, *free, leading, leading + 1), len(owned), 1)


def _slices(tensor: Tensor, axis: int, last: int, limit: int) -> Iterator[Tensor]:
    """Slices of a tensor along axes `axis` to `last - 1`, of at most `limit` positions over those axes."""
    inner = math.prod(tensor.shape[axis + 1 : last])
    if inner > limit and axis + 1 < last:
        for index in range(tensor.shape[axis]):
            yield from _slices(tensor.narrow(axis, index, 1), axis + 1, last, limit)
    else:
        yield from torch.split(tensor, max(1, limit // max(1, inner)), axis)
