"""Nodes that only rearrange a constant on its way to a linear layer, as steps of its form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_optshift.geometry import Reshape, Transpose, WeightForm
from onnx_optshift.graph.tensors import FLOAT_TYPES, inline_array, is_external
from onnx_optshift.graph.weights import MICROSOFT, attribute, operand_of

# The integers that a value is known to hold; None when it is computed.
Integers = Callable[[gs.Tensor], "tuple[int, ...] | None"]

_MOST_AXES = 64  # numpy's limit
QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear"})


def passed_through(node: gs.Node, operand: int, form: WeightForm, integers: Integers) -> WeightForm | None:
    """The form of a node's output when the node only rearranges (or rounds) a constant of this form.

    None when it does something else, or when its shape is not known beforehand; `integers` looks up shapes and axes.
    """
    rank = len(form.result_shape)
    known = not node.domain or (node.domain == MICROSOFT and node.op in QUANTIZATION)
    if not known or operand != 0 or not node.outputs or rank > _MOST_AXES:
        return None
    match node.op:
        case "Identity" | "QuantizeLinear" | "DequantizeLinear":
            return form
        case "Cast":
            return form if attribute(node, "to", 0) in FLOAT_TYPES else None
        case "Transpose":
            perm = attribute(node, "perm", tuple(reversed(range(rank))))
            return form.then(Transpose(perm)) if sorted(perm) == list(range(rank)) else None
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            shape = _new_shape(node, form.result_shape, integers)
            return None if shape is None else form.then(Reshape(shape))
    return None


def _new_shape(node: gs.Node, shape: tuple[int, ...], integers: Integers) -> tuple[int, ...] | None:
    """What a node makes of a shape, by numpy; None when that is not known, or cannot be."""
    if node.op == "Flatten":
        axis = attribute(node, "axis", 1)
        return (math.prod(shape[:axis]), math.prod(shape[axis:])) if abs(axis) <= len(shape) else None
    # Older opsets hold them in an attribute, newer ones in the second input.
    name, second = "shape" if node.op == "Reshape" else "axes", operand_of(node, 1)
    stated = attribute(node, name, ()) if name in node.attrs else None if second is None else integers(second)
    try:
        scalar = np.broadcast_to(np.float32(0), shape)
        if node.op == "Squeeze" and name not in node.attrs and second is None:
            return scalar.squeeze().shape
        if stated is None:
            return None
        if node.op == "Squeeze":
            return scalar.squeeze(stated).shape
        if node.op == "Unsqueeze":
            return np.expand_dims(scalar, stated).shape
        if attribute(node, "allowzero", 0) == 0:
            stated = tuple(shape[axis] if dim == 0 else dim for axis, dim in enumerate(stated))
        return scalar.reshape(stated).shape if min(stated, default=0) >= -1 else None
    except (ValueError, IndexError):  # it does not fit
        return None


def constant_integers(tensors: dict[str, onnx.TensorProto], value: gs.Tensor) -> tuple[int, ...] | None:
    """The integers of a short constant (a shape, a list of axes); None when it is computed or something else.

    Raises:
        InputError: The constant is damaged.
    """
    producer = value.inputs[0] if value.inputs else None
    if producer is not None and producer.op == "Constant" and "value_ints" in producer.attrs:
        return attribute(producer, "value_ints", ())
    tensor = tensors.get(value.name)
    if tensor is None or tensor.data_type != onnx.TensorProto.INT64 or len(tensor.dims) > 1:
        return None
    if math.prod(tensor.dims) > 64 or is_external(tensor):
        return None
    return tuple(int(item) for item in inline_array(tensor).ravel())
