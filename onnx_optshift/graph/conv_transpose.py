"""ConvTranspose: every pixel's channels `[n, C/g]` against the kernel `[C/g, M/g * prod(kernel)]`, then overlap-add.

Only the product with the kernel is the equation that is solved. What follows (adding up overlapping patches, cutting
off pads) is linear and fixed, so equal products give equal outputs. Where patches overlap or are cut off, the outputs
alone would leave more freedom; it would cost problems of width C/g * prod(kernel) instead of C/g.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import PatchRows, Reshape, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match

OPERANDS = (1,)


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one transposed convolution as pixels @ V."""
    shape = form.result_shape
    if len(shape) < 3:
        return f"a ConvTranspose weight has at least 3 axes, this one {len(shape)}"
    axes = len(shape) - 2
    group = attribute(node, "group", 1)
    if group < 1 or shape[0] % group:
        return f"{shape[0]} input channels cannot be divided into {group} groups"
    form = form.then(Reshape((group, shape[0] // group, math.prod(shape[1:]))))
    ones = (1,) * axes
    return make_match(node, 0, form, PatchRows(ones, ones, ones, (0,) * (2 * axes), group=group))
