"""The integer weights of a quantized file: of DequantizeLinear, and of MatMulNBits of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile

Array = NDArray[Any]
_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}


def integer_weights(model: ModelFile) -> Iterator[tuple[str, int, Array, Array, Array]]:
    """(name, bits, levels, scales, zero points) of each, the last three of one shape and float64.

    Raises:
        InputError: Scales do not fit their weight: no runtime takes such a file.
    """
    for node in model.proto.graph.node:
        known = [model.initializer(name) if name in model.tensors else None for name in node.input]
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "DequantizeLinear" and known[0] is not None and known[1] is not None:
            levels, axis, block = known[0].astype(np.float64), given.get("axis", 1), given.get("block_size", 0)
            zero = known[2] if len(known) > 2 and known[2] is not None else np.zeros_like(known[1])
            try:
                sides = [_spread(side.astype(np.float64), levels, axis, block) for side in (known[1], zero)]
            except (ValueError, IndexError):
                raise InputError(
                    f"{model.where}: DequantizeLinear node {node.name!r} has scales {list(known[1].shape)} for a "
                    f"weight {list(levels.shape)}, axis {axis}, block size {block}: they do not fit, and no runtime "
                    "takes it. Quantize with other settings."
                ) from None
            kind = onnx.TensorProto.DataType.Name(model.tensors[node.input[0]].data_type)
            if levels.ndim > 1 and kind in _BITS:
                yield node.input[0], _BITS[kind], levels, *sides
        elif node.op_type == "MatMulNBits" and known[1] is not None and known[2] is not None:
            width, outputs, block, bits = given["K"], given["N"], given["block_size"], given.get("bits", 4)
            blocks = -(-width // block)
            levels = _unpacked(known[1], bits).reshape(outputs, blocks * block)[:, :width] - 2.0 ** (bits - 1)
            zero = np.zeros((outputs, blocks))
            if len(known) > 3 and known[3] is not None:
                packed = known[3].dtype == np.uint8
                zero = _unpacked(known[3].reshape(outputs, -1), bits) if packed else known[3].reshape(outputs, -1)
                zero = zero[:, :blocks] - 2.0 ** (bits - 1)
            sides = [np.repeat(side, block, 1)[:, :width] for side in (known[2].reshape(outputs, blocks), zero)]
            yield node.input[1], bits, levels.T, *(side.T.astype(np.float64) for side in sides)


def _unpacked(array: Array, bits: int) -> Array:
    """Integers of fewer bits than a byte, the lowest bits first."""
    parts = [array >> np.uint8(shift) & np.uint8(2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*array.shape[:-1], -1)


def _spread(side: Array, levels: Array, axis: int, block: int) -> Array:
    """Scales or zero points in the shape of the levels."""
    if block:
        return np.repeat(side, block, axis).take(range(levels.shape[axis]), axis).reshape(levels.shape)
    if side.size > 1:
        side = side.reshape([-1 if k == axis % levels.ndim else 1 for k in range(levels.ndim)])
    return np.broadcast_to(side, levels.shape)
