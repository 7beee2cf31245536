"""Convolutions in one, two or three dimensions, one problem per channel group.

Conv and FusedConv: im2col patches `[n, C/g * prod(kernel)]` against the kernel. The weight `[M, C/g, *kernel]` becomes
`[g, M/g, C/g * prod(kernel)]`, transposed.

ConvTranspose: every pixel's channels `[n, C/g]` against the kernel `[C/g, M/g * prod(kernel)]`, then overlap-add. Only
the product with the kernel is the equation that is solved. What follows (adding up overlapping patches, cutting off
pads) is linear and fixed, so equal products give equal outputs. Where patches overlap or are cut off, the outputs
alone would leave more freedom; it would cost problems of width C/g * prod(kernel) instead of C/g.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import PatchRows, Reshape, Transpose, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one convolution as patches @ V."""
    shape = form.result_shape
    if len(shape) < 3:
        return f"a Conv weight has at least 3 axes, this one {len(shape)}"
    kernel = shape[2:]
    axes = len(kernel)
    stated = attribute(node, "kernel_shape", kernel)
    strides = attribute(node, "strides", (1,) * axes)
    dilations = attribute(node, "dilations", (1,) * axes)
    pads = attribute(node, "pads", (0,) * (2 * axes))
    auto_pad = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    group = attribute(node, "group", 1)
    if stated != kernel:
        return f"kernel_shape {list(stated)} disagrees with the weight's shape {list(shape)}"
    if len(strides) != axes or len(dilations) != axes or len(pads) != 2 * axes:
        return f"strides, dilations or pads do not fit {axes} spatial axes"
    if min(strides) < 1 or min(dilations) < 1 or min(pads) < 0:
        return "strides and dilations below 1 or negative pads are not handled"
    if auto_pad not in {"NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"}:
        return f"auto_pad {auto_pad!r} is not handled"
    if group < 1 or shape[0] % group:
        return f"{shape[0]} output channels cannot be divided into {group} groups"
    width = shape[1] * math.prod(kernel)
    form = form.then(Reshape((group, shape[0] // group, width))).then(Transpose((0, 2, 1)))
    return make_match(node, node.inputs[:1], form, PatchRows(kernel, strides, dilations, pads, auto_pad, group))


def match_transposed(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one transposed convolution as pixels @ V."""
    shape = form.result_shape
    if len(shape) < 3:
        return f"a ConvTranspose weight has at least 3 axes, this one {len(shape)}"
    group = attribute(node, "group", 1)
    if group < 1 or shape[0] % group:
        return f"{shape[0]} input channels cannot be divided into {group} groups"
    form = form.then(Reshape((group, shape[0] // group, math.prod(shape[1:]))))
    ones = (1,) * (len(shape) - 2)
    return make_match(node, node.inputs[:1], form, PatchRows(ones, ones, ones, (0,) * (2 * len(ones)), group=group))
