"""Proof that a written model differs from the original in nothing but the payloads it was meant to differ in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_optshift.errors import OptShiftError
from onnx_optshift.graph.external import locate, payload
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.tensors import PAYLOAD_FIELDS, all_tensors, is_external, named_tensors

_CHUNK = 1 << 22


class PatchError(OptShiftError):
    """A written file is not what it was meant to be. It is discarded."""


def holds(original: ModelFile, written: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Compares a written model byte by byte: with these arrays at tensors of their names, elsewhere with its original.

    Where a tensor is stored may differ (inline or in which external file), what it holds may not.

    Raises:
        PatchError: Something differs, or a patched tensor is not finite.
    """
    copy = ModelFile.load(written)
    if _skeleton(original.proto) != _skeleton(copy.proto):
        raise PatchError(f"{written}: the written model differs from {original.where} in more than tensor payloads.")
    # Equal skeletons hold equally many tensors, in the same order and under the same names.
    for (name, old), (_, new) in zip(named_tensors(original.proto), named_tensors(copy.proto), strict=True):
        what = f"{written}: tensor {name or new.name!r}"
        inline = not is_external(old) and not is_external(new)
        if inline and _storage(old) != _storage(new):
            raise PatchError(f"{what} is stored in {_storage(new)}, before in {_storage(old)}.")
        if not (name and name in arrays):
            if not _same_payload(old, original.folder, new, copy.folder):
                raise PatchError(f"{what} differs from the original, but was not to be changed.")
            continue
        array = copy.initializer(name)
        if not _all_finite(array):
            raise PatchError(f"{what} would hold values that are not finite.")
        if not _same_bytes(array, arrays[name]):
            raise PatchError(f"{what} does not hold what was to be written there.")


def _skeleton(proto: onnx.ModelProto) -> bytes:
    """The serialized model without payloads."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for tensor in all_tensors(bare):
        for name in (*PAYLOAD_FIELDS, "external_data", "data_location"):
            tensor.ClearField(name)
    return bytes(bare.SerializeToString(deterministic=True))


def _storage(tensor: onnx.TensorProto) -> list[str]:
    return [field.name for field, _ in tensor.ListFields() if field.name in PAYLOAD_FIELDS]


def _same_payload(a: onnx.TensorProto, a_folder: Path | None, b: onnx.TensorProto, b_folder: Path | None) -> bool:
    if not is_external(a) and not is_external(b):
        # As bytes: numbers that are no numbers differ from themselves.
        return bool(a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True))
    if a_folder == b_folder and is_external(a) and is_external(b) and locate(a, a_folder) == locate(b, b_folder):
        return True
    return _same_bytes(payload(a, a_folder), payload(b, b_folder))


def _same_bytes(one: NDArray[np.generic], two: NDArray[np.generic]) -> bool:
    if one.nbytes != two.nbytes:
        return False
    a, b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, two))
    return all(np.array_equal(a[k : k + _CHUNK], b[k : k + _CHUNK]) for k in range(0, a.size, _CHUNK))


def _all_finite(array: NDArray[np.generic]) -> bool:
    flat = array.reshape(-1)
    return all(
        bool(np.isfinite(flat[start : start + _CHUNK].astype(np.float64)).all())
        for start in range(0, flat.size, _CHUNK)
    )
