"""Nodes that only rearrange a constant on its way to a linear layer, as steps of its form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_optshift.geometry import Reshape, Transpose, WeightForm
from onnx_optshift.graph.tensors import FLOAT_TYPES, inline_array
from onnx_optshift.graph.weights import MICROSOFT, attribute, domain_of

# The integers that a value is known to hold; None when it is computed.
Integers = Callable[[gs.Tensor], "tuple[int, ...] | None"]

_MOST_AXES = 64  # numpy's limit
QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear"})


def passed_through(node: gs.Node, operand: int, form: WeightForm, integers: Integers) -> WeightForm | None:
    """The form of a node's output when the node only rearranges (or rounds) a constant of this form.

    None when it does something else, or when its shape is not known beforehand; `integers` looks up shapes and axes.
    """
    shape = form.result_shape
    rank = len(shape)
    known = not domain_of(node) or (domain_of(node) == MICROSOFT and node.op in QUANTIZATION)
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
        case "Reshape":
            wanted = _argument(node, "shape", integers)
            return _reshaped(form, wanted, keep_zero=attribute(node, "allowzero", 0) != 0)
        case "Flatten":
            axis = attribute(node, "axis", 1)
            if not -rank <= axis <= rank:
                return None
            axis += rank if axis < 0 else 0
            return form.then(Reshape((math.prod(shape[:axis]), math.prod(shape[axis:]))))
        case "Squeeze":
            axes = _argument(node, "axes", integers)
            return _viewed(form, np.squeeze, axes) if axes is not None or _absent(node, "axes") else None
        case "Unsqueeze":
            axes = _argument(node, "axes", integers)
            return _viewed(form, np.expand_dims, axes) if axes is not None else None
    return None


def _absent(node: gs.Node, name: str) -> bool:
    return name not in node.attrs and (len(node.inputs) < 2 or not node.inputs[1].name)


def _argument(node: gs.Node, name: str, integers: Integers) -> tuple[int, ...] | None:
    """An argument that older opsets hold in an attribute and newer ones in the second input."""
    if name in node.attrs:
        return attribute(node, name, ())
    if len(node.inputs) < 2 or not node.inputs[1].name:
        return None
    return integers(node.inputs[1])


def _reshaped(form: WeightForm, wanted: tuple[int, ...] | None, *, keep_zero: bool) -> WeightForm | None:
    if wanted is None:
        return None
    shape, size = form.result_shape, math.prod(form.result_shape)
    if not keep_zero:
        if any(dim == 0 and axis >= len(shape) for axis, dim in enumerate(wanted)):
            return None
        wanted = tuple(shape[axis] if dim == 0 else dim for axis, dim in enumerate(wanted))
    if wanted.count(-1) == 1:
        rest = math.prod(dim for dim in wanted if dim != -1)
        if rest <= 0 or size % rest:
            return None
        wanted = tuple(size // rest if dim == -1 else dim for dim in wanted)
    if any(dim < 0 for dim in wanted) or math.prod(wanted) != size:
        return None
    return form.then(Reshape(wanted))


def _viewed(
    form: WeightForm, view: Callable[..., NDArray[np.generic]], axes: tuple[int, ...] | None
) -> WeightForm | None:
    try:
        return form.then(Reshape(view(np.broadcast_to(np.float32(0), form.result_shape), axes).shape))
    except ValueError:  # axes that the constant does not have, or not of length 1
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
    if math.prod(tensor.dims) > 64 or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return tuple(int(item) for item in inline_array(tensor).ravel())
