"""Reading and rewriting the payload of one TensorProto, and walking over all of a model's tensors.

A payload lives in `raw_data`, in a typed field (`float_data`, `int32_data`, ...), or in an external file. Rewriting
keeps the kind of storage, so that nothing but the numbers of a tensor changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.graph.bodies import bodies, unique_names

# The floating types that a weight may have, by ONNX type number, as they are called in reports.
FLOAT_TYPES: Final[dict[int, str]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
# Where a payload can be; everything else in a TensorProto describes it.
PAYLOAD_FIELDS: Final = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the payload lies in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def type_name(tensor: onnx.TensorProto) -> str:
    """The element type as numpy spells it where it can: `float32`, `int8`, `bfloat16`."""
    names = {number: str(name).lower() for name, number in onnx.TensorProto.DataType.items()}
    return FLOAT_TYPES.get(tensor.data_type) or names.get(tensor.data_type, f"type {tensor.data_type}")


def stored_dtype(tensor: onnx.TensorProto) -> np.dtype[np.generic]:
    """The numpy dtype of the elements (bfloat16 and smaller ones come from ml_dtypes), in file byte order.

    Raises:
        InputError: The element type has no numpy counterpart.
    """
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"tensor {tensor.name!r}: element type {tensor.data_type} is unknown to onnx {onnx.__version__}. "
            "Update onnx, or export the model again."
        ) from error
    return np.dtype(dtype).newbyteorder("<")


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


# Types that share bytes when stored: numpy has no such thing, so ml_dtypes spends a whole byte on each.
_PACKED_BITS: Final = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}


def inline_array(tensor: onnx.TensorProto) -> NDArray[np.generic]:
    """The inline payload as an array of the tensor's own shape and dtype.

    Raises:
        InputError: The payload does not fit dims and type.
    """
    shape = tuple(tensor.dims)
    if tensor.HasField("raw_data") and tensor.data_type in FLOAT_TYPES:
        raw, expected = tensor.raw_data, raw_size(tensor)
        if len(raw) != expected:
            raise InputError(
                f"tensor {tensor.name!r}: {type_name(tensor)} {list(shape)} needs {expected} bytes, found {len(raw)}. "
                "The file is damaged; export the model again."
            )
        return np.frombuffer(raw, stored_dtype(tensor)).reshape(shape)
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, IndexError) as error:
        raise InputError(
            f"tensor {tensor.name!r}: its payload does not fit {type_name(tensor)} {list(shape)} ({error}). "
            "The file is damaged; export the model again."
        ) from error


def inline_bytes(tensor: onnx.TensorProto) -> bytes:
    """The inline payload as raw little-endian bytes, whatever field it is stored in.

    Raises:
        InputError: The payload does not fit dims and type.
    """
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    array = inline_array(tensor)
    if type_name(tensor) in _PACKED_BITS:
        return numpy_helper.from_array(array).raw_data
    return little_endian(array)


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
    """Overwrites an inline floating payload in place, in the field that holds it now.

    Raises:
        InputError: The array has another dtype or shape than the tensor.
    """
    check_fits(tensor, array)
    if tensor.HasField("raw_data"):
        tensor.raw_data = little_endian(array)
    elif tensor.data_type == onnx.TensorProto.FLOAT:
        tensor.float_data[:] = array.ravel().tolist()
    elif tensor.data_type == onnx.TensorProto.DOUBLE:
        tensor.double_data[:] = array.ravel().tolist()
    else:
        # 16-bit floats are stored as their bit patterns, one per int32.
        tensor.int32_data[:] = np.ascontiguousarray(array).view(np.uint16).ravel().tolist()


def owned_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and values of Constant nodes, by the model-wide name of `bodies.unique_names`."""
    return {name: tensor for name, tensor in named_tensors(model) if name}


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The `value` tensor of a Constant node; None for every other node."""
    if node.op_type != "Constant" or node.domain not in {"", "ai.onnx"} or len(node.output) != 1:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def named_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every TensorProto of a model in a fixed order: initializers, attributes, bodies, functions, sparse parts.

    Yields:
        The tensor and, for those of `owned_tensors`, the name it is read by; else an empty name.
    """
    yield from _in_graph(model.graph, iter(unique_names(model.graph)))
    nameless: Iterator[dict[str, str]] = repeat({})
    for function in model.functions:
        yield from _in_nodes(function.node, {}, nameless)
        yield from (("", tensor) for tensor in _own_tensors(function.attribute_proto))
    for training in model.training_info:
        for graph in (training.initialization, training.algorithm):
            yield from _in_graph(graph, nameless)


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every TensorProto of a model, in the order of `named_tensors`."""
    return (tensor for _, tensor in named_tensors(model))


# A tensor and the name it is read by, for each tensor of a graph or of nodes; `scopes` gives the names of each graph.
_Named = Iterator[tuple[str, onnx.TensorProto]]


def _in_graph(graph: onnx.GraphProto, scopes: Iterator[dict[str, str]]) -> _Named:
    names = next(scopes)
    for tensor in graph.initializer:
        yield names.get(tensor.name, ""), tensor
    for tensor in _sparse_parts(graph.sparse_initializer):
        yield "", tensor
    yield from _in_nodes(graph.node, names, scopes)


def _in_nodes(nodes: Iterable[onnx.NodeProto], names: dict[str, str], scopes: Iterator[dict[str, str]]) -> _Named:
    for node in nodes:
        name = names.get(node.output[0], "") if constant_value(node) is not None else ""
        for tensor in _own_tensors(node.attribute):
            yield name, tensor
        for body in bodies(node):
            yield from _in_graph(body, scopes)


def _own_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes, those of bodies not included."""
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        yield from _sparse_parts([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])
        yield from _sparse_parts(attribute.sparse_tensors)


def _sparse_parts(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for sparse in tensors:
        yield sparse.values
        yield sparse.indices
