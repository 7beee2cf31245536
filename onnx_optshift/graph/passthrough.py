"""Nodes that only rearrange a constant on its way to a linear layer, as steps of its form."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import onnx_graphsurgeon as gs

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Reshape, Transpose, WeightForm
from onnx_optshift.graph.weights import attribute

# The integers that a value is known to hold; None when it is computed.
Integers = Callable[[gs.Tensor], "tuple[int, ...] | None"]

_MOST_AXES = 64  # numpy's limit
QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear"})
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


def passed_through(node: gs.Node, operand: int, form: WeightForm, integers: Integers) -> WeightForm | None:
    """The form of a node's output when the node only rearranges (or rounds) this operand.

    Args:
        node: A node that reads a constant.
        operand: Where it reads it.
        form: The constant at that operand.
        integers: Looks up constant shapes and axes.

    Returns:
        The form behind the node, or None when the node does something else or its shape is not known beforehand.
    """
    shape = form.result_shape
    rank = len(shape)
    if operand != 0 or not node.outputs or rank > _MOST_AXES:
        return None
    match node.op:
        case "Identity" | "QuantizeLinear" | "DequantizeLinear":
            return form
        case "Cast":
            return form if attribute(node, "to", 0) in _FLOATS else None
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
            return _squeezed(form, _argument(node, "axes", integers), all_of_them=_absent(node, "axes"))
        case "Unsqueeze":
            return _unsqueezed(form, _argument(node, "axes", integers))
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


def _squeezed(form: WeightForm, axes: tuple[int, ...] | None, *, all_of_them: bool) -> WeightForm | None:
    shape = form.result_shape
    if all_of_them:
        axes = tuple(axis for axis, dim in enumerate(shape) if dim == 1)
    if axes is None or any(not -len(shape) <= axis < len(shape) for axis in axes):
        return None
    gone = {axis % len(shape) for axis in axes}
    if any(shape[axis] != 1 for axis in gone):
        return None
    return form.then(Reshape(tuple(dim for axis, dim in enumerate(shape) if axis not in gone)))


def _unsqueezed(form: WeightForm, axes: tuple[int, ...] | None) -> WeightForm | None:
    if axes is None:
        return None
    rank = len(form.result_shape) + len(axes)
    if any(not -rank <= axis < rank for axis in axes) or len({axis % rank for axis in axes}) != len(axes):
        return None
    new = {axis % rank for axis in axes}
    old = iter(form.result_shape)
    return form.then(Reshape(tuple(1 if axis in new else next(old) for axis in range(rank))))


def constant_integers(tensors: dict[str, onnx.TensorProto], value: gs.Tensor) -> tuple[int, ...] | None:
    """The integers of a short constant (a shape, a list of axes); None when it is computed or something else.

    Args:
        tensors: Constants of the graph by name.
        value: The value to look up.

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
    try:
        return tuple(int(item) for item in onnx.numpy_helper.to_array(tensor).ravel())
    except (ValueError, TypeError) as error:
        raise InputError(
            f"tensor {tensor.name or value.name!r}: its payload does not fit int64 {list(tensor.dims)} ({error}). "
            "The file is damaged; export the model again."
        ) from error
