"""Reading and rewriting the payload of one TensorProto, and walking over all of a model's tensors.

A payload lives in `raw_data`, in a typed field (`float_data`, `int32_data`, ...), or in an external file. Rewriting
keeps the kind of storage, so that nothing but the numbers of a tensor changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.graph.bodies import bodies, graphs, unique_names

# The floating types that a weight may have, by ONNX type number, as they are called in reports.
FLOAT_TYPES: Final[dict[int, str]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
_TYPE_NAMES: Final[dict[int, str]] = {n: name.lower() for name, n in onnx.TensorProto.DataType.items()} | FLOAT_TYPES
# Types that share bytes when stored: numpy has no such thing, so ml_dtypes spends a whole byte on each.
_PACKED_BITS: Final = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2, "float6e2m3": 6, "float6e3m2": 6}
# Where a payload can be; everything else in a TensorProto describes it.
PAYLOAD_FIELDS: Final = (
    "raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data",
)  # fmt: skip


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the payload lies in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def type_name(tensor: onnx.TensorProto) -> str:
    """The element type as numpy spells it where it can: `float32`, `int8`, `bfloat16`."""
    return _TYPE_NAMES.get(tensor.data_type, f"type {tensor.data_type}")


def stored_dtype(tensor: onnx.TensorProto) -> np.dtype[np.generic]:
    """The numpy dtype of the elements (bfloat16 and smaller ones come from ml_dtypes), in file byte order.

    Raises:
        InputError: The element type has no numpy counterpart.
    """
    if tensor.data_type not in onnx.helper.get_all_tensor_dtypes():
        raise InputError(
            f"tensor {tensor.name!r}: element type {tensor.data_type} is unknown to onnx {onnx.__version__}. "
            "Update onnx, or export the model again."
        )
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")


def raw_size(tensor: onnx.TensorProto) -> int:
    """Bytes that the payload takes as raw data, from its dims and its element type.

    Raises:
        InputError: The dims are negative or the type has no fixed size.
    """
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(f"tensor {tensor.name!r}: negative dimension in {list(tensor.dims)}. Export the model again.")
    if tensor.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        raise InputError(f"tensor {tensor.name!r}: a {type_name(tensor)} tensor has no raw bytes.")
    bits = _PACKED_BITS.get(type_name(tensor), 8 * stored_dtype(tensor).itemsize)
    return (math.prod(int(dim) for dim in tensor.dims) * bits + 7) // 8


def inline_array(tensor: onnx.TensorProto) -> NDArray[np.generic]:
    """The inline payload as an array of the tensor's own shape and dtype.

    Raises:
        InputError: The payload does not fit dims and type.
    """
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, IndexError) as error:
        raise InputError(
            f"tensor {tensor.name!r}: its payload does not fit {type_name(tensor)} {list(tensor.dims)} ({error}). "
            "The file is damaged; export the model again."
        ) from error


def little_endian(array: NDArray[np.generic]) -> bytes:
    """The array's elements as raw bytes in the byte order of ONNX files."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def check_fits(tensor: onnx.TensorProto, array: NDArray[np.generic]) -> None:
    """Insists that an array has the dtype and the shape of the tensor it is to replace.

    Raises:
        InputError: It has another dtype or shape.
    """
    shape, dtype = tuple(tensor.dims), stored_dtype(tensor)
    if array.dtype != dtype.newbyteorder("=") or array.shape != shape:
        raise InputError(
            f"tensor {tensor.name!r}: expected {type_name(tensor)} {list(shape)}, got {array.dtype} "
            f"{list(array.shape)}. A patch keeps dtype and shape; convert the array first."
        )


def replace_inline(tensor: onnx.TensorProto, array: NDArray[np.generic]) -> None:
    """Overwrites an inline floating payload in place, in the field that holds it now. Raises as `check_fits`."""
    check_fits(tensor, array)
    if tensor.HasField("raw_data"):
        tensor.raw_data = little_endian(array)
    else:
        # 16-bit floats are stored as their bit patterns, one per int32.
        numbers = array.view(np.uint16) if array.itemsize == 2 else array
        getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))[:] = numbers.ravel().tolist()


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The `value` tensor of a Constant node; None for every other node."""
    if node.op_type != "Constant" or node.domain not in {"", "ai.onnx"} or len(node.output) != 1:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def owned_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and values of Constant nodes, by the model-wide name of `bodies.unique_names`."""
    return {name: tensor for name, tensor in named_tensors(model) if name}


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every TensorProto of a model, in the order of `named_tensors`."""
    return (tensor for _, tensor in named_tensors(model))


def named_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every TensorProto of a model in a fixed order, those of bodies, functions and sparse tensors too.

    Yields:
        The name that a tensor of `owned_tensors` is read by, else an empty one; and the tensor.
    """
    others = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    others += [body for function in model.functions for node in function.node for body in bodies(node)]
    named = zip(graphs(model.graph), unique_names(model.graph), strict=True)
    nameless: Iterator[tuple[onnx.GraphProto, dict[str, str]]] = ((part, {}) for top in others for part in graphs(top))
    for graph, names in chain(named, nameless):
        yield from ((names.get(tensor.name, ""), tensor) for tensor in graph.initializer)
        yield from (("", tensor) for sparse in graph.sparse_initializer for tensor in (sparse.values, sparse.indices))
        for node in graph.node:
            name = names.get(node.output[0], "") if constant_value(node) is not None else ""
            yield from ((name, tensor) for tensor in _attached(node.attribute))
    for function in model.functions:
        for attributes in (function.attribute_proto, *(node.attribute for node in function.node)):
            yield from (("", tensor) for tensor in _attached(attributes))


def _attached(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes, those of bodies not included."""
    for attribute in attributes:
        yield from [attribute.t] if attribute.HasField("t") else []
        yield from attribute.tensors
        single = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        yield from (
            tensor for sparse in (*single, *attribute.sparse_tensors) for tensor in (sparse.values, sparse.indices)
        )
