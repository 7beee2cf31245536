"""im2col patches of images, and their Gram matrix without building the patches.

The patches of a stride-1 convolution overlap: with M[y] what the image shows at position y of one axis, the block of
the Gram matrix that joins kernel positions i and i + l of that axis is `Σ M[y]ᵀ M[y+l]` over y from i to i + out. It
depends on i only through its border terms, so one product per lag l and a few thin ones make all blocks exactly. The
other axes stay im2col: one axis alone already turns k(k+1)/2 products into k and the k-fold copy into none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import PatchRows, Tap

# Below this many output positions per kernel position the border terms eat up the gain (measured: 3 x 3 kernels gain
# a factor 2.3 on 32 x 32 images, 1.5 on 16 x 16, and lose on 8 x 8).
_LEAST_OUTPUTS = 4


def check_images(images: Tensor, form: PatchRows, tap: Tap) -> None:
    """Refuses images that are not the `[N, C, *spatial]` that a tap reads, or smaller than its kernel.

    Raises:
        InputError: They are.
    """
    shape = list(images.shape)
    window = list(form.kernel)
    channels = tap.width * tap.groups // max(1, math.prod(form.kernel))
    if len(shape) != 2 + len(window) or shape[1] != channels:
        raise InputError(
            f"value {tap.value!r} has shape {shape}, but a convolution with kernel {window} and {form.group} group(s) "
            f"reads it as [N, {channels}] and {len(window)} spatial axes. Check the model's inputs and shapes."
        )
    if min(outputs(images, form)) < 1:
        raise InputError(
            f"value {tap.value!r} has shape {shape}: the kernel {window} with dilations {list(form.dilations)} does "
            f"not fit into the padded image. Give calibration images of the size that the model is used with."
        )


def outputs(images: Tensor, form: PatchRows) -> tuple[int, ...]:
    """Output positions per spatial axis, of images `[N, C, *spatial]`."""
    spatial = tuple(images.shape[2:])
    pads, axes = form.pads_for(spatial), len(spatial)
    return tuple(
        (size + pads[axis] + pads[axes + axis] - _extent(form, axis)) // form.strides[axis] + 1
        for axis, size in enumerate(spatial)
    )


def patch_view(images: Tensor, form: PatchRows) -> Tensor:
    """All patches of images `[N, C, *spatial]`, as a view `[g, N, *out, C/g, *kernel]` of the padded images."""
    axes = images.ndim - 2
    view = _windows(_padded(images, form), form)
    return view.permute(1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))


def lag_axis(images: Tensor, form: PatchRows) -> int | None:
    """The spatial axis along which lags pay, or None where plain im2col is faster."""
    candidates = [
        axis
        for axis, out in enumerate(outputs(images, form))
        if form.strides[axis] == 1 and form.kernel[axis] > 1 and out >= _LEAST_OUTPUTS * form.kernel[axis]
    ]
    return max(candidates, key=lambda axis: form.kernel[axis], default=None)


def patch_gram(
    images: Tensor, form: PatchRows, axis: int, *, device: torch.device, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """AᵀA `[g, d, d]` and column sums `[g, d]` of all patches A, in float64 and without the form's scale.

    By lags along `axis`, whose stride is 1. Besides the moments, `chunk_bytes` of float64 exist, or a few positions.
    """
    kernel, halo = form.kernel[axis], _extent(form, axis) - 1
    rest = [k for other, k in enumerate(form.kernel) if other != axis]
    channels = images.shape[1] // form.group
    width = channels * math.prod(rest)
    shape = (form.group, width, width)
    blocks = {
        (i, j): torch.zeros(shape, dtype=torch.float64, device=device) for i in range(kernel) for j in range(i, kernel)
    }
    sums = torch.zeros(kernel, form.group, width, dtype=torch.float64, device=device)

    out = outputs(images, form)
    position = 8 * form.group * width * math.prod(out) // out[axis]  # bytes of M at one position of one image
    span = min(out[axis], max(_LEAST_OUTPUTS * kernel, chunk_bytes // position - halo))
    for some in torch.split(images, max(1, chunk_bytes // (position * (span + halo)))):
        padded = _padded(some, form)
        for start in range(0, out[axis], span):
            length = min(span, out[axis] - start)
            piece = padded.narrow(2 + axis, start, length + halo)
            _add_blocks(blocks, sums, _strips(piece, form, axis, device), length, form.dilations[axis])

    # Features are channels, then kernel positions: the lag axis goes back between the others.
    features = (channels, *rest[:axis], kernel, *rest[axis:])
    gram = torch.empty(form.group, *features, *features, dtype=torch.float64, device=device)
    cells = gram.movedim((2 + axis, 2 + axis + len(features)), (0, 1))  # [k, k, g, C/g, *rest, C/g, *rest]
    for (i, j), block in blocks.items():
        cells[i, j] = block.view(cells.shape[2:])
        cells[j, i] = block.mT.reshape(cells.shape[2:])
    total = torch.stack(list(sums.view(kernel, form.group, channels, *rest)), dim=2 + axis)
    depth = width * kernel
    return gram.reshape(form.group, depth, depth), total.reshape(form.group, depth)


def _add_blocks(blocks: dict[tuple[int, int], Tensor], sums: Tensor, strips: Tensor, out: int, dilation: int) -> None:
    """Adds the products of strips `[g, out + halo, n, w]` to the blocks of all pairs of kernel positions."""
    kernel = len(sums)

    def product(start: int, stop: int, lag: int) -> Tensor:
        left, right = strips[:, start:stop], strips[:, start + lag : stop + lag]
        return left.flatten(1, 2).mT @ right.flatten(1, 2)

    for lag in range(kernel):
        block = product(0, out, lag * dilation)
        blocks[0, lag] += block
        for i in range(kernel - 1 - lag):
            # From kernel position i to i + 1 the window of y moves by one dilation.
            low, high = i * dilation, out + i * dilation
            block = block + product(high, high + dilation, lag * dilation)
            block -= product(low, low + dilation, lag * dilation)
            blocks[i + 1, i + 1 + lag] += block
    columns = strips.sum(2)
    for i in range(kernel):
        sums[i] += columns[:, i * dilation : i * dilation + out].sum(1)


def _strips(padded: Tensor, form: PatchRows, axis: int, device: torch.device) -> Tensor:
    """M `[g, positions, N * other outputs, C/g * other kernels]` in float64, im2col along all axes but one."""
    axes = padded.ndim - 2
    view = _windows(padded, form, without=axis)
    others = [3 + other for other in range(axes) if other != axis]
    view = view.permute(1, 3 + axis, 0, *others, 2, *range(3 + axes, view.ndim))
    # Conversion and copy in one pass: a cast alone would keep the strides, and every product copy again.
    strips = view.to(device, torch.float64, memory_format=torch.contiguous_format)
    return strips.reshape(form.group, padded.shape[2 + axis], math.prod(view.shape[2 : 2 + axes]), -1)


def _windows(padded: Tensor, form: PatchRows, without: int | None = None) -> Tensor:
    """Sliding windows of padded images, a view `[N, g, C/g, *positions, *kernel]`, but along one axis if named."""
    view = padded
    for axis, stride in enumerate(form.strides):
        if axis != without:
            view = view.unfold(2 + axis, _extent(form, axis), stride)[..., :: form.dilations[axis]]
    return torch.unflatten(view, 1, (form.group, -1))


def _padded(images: Tensor, form: PatchRows) -> Tensor:
    pads, axes = form.pads_for(tuple(images.shape[2:])), images.ndim - 2
    if not any(pads):
        return images
    # torch names the last axis first, each with its beginning and end.
    return functional.pad(images, [pads[side + axis] for axis in reversed(range(axes)) for side in (0, axes)])


def _extent(form: PatchRows, axis: int) -> int:
    """Pixels from the first to the last position of the kernel, both included."""
    return (form.kernel[axis] - 1) * form.dilations[axis] + 1
