"""External data: where a tensor's bytes lie outside the model file, and the refusal to follow them anywhere else."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.graph.tensors import inline_array, is_external, raw_size


@dataclass(frozen=True)
class Span:
    """Bytes of one tensor in an external file."""

    path: Path  # the file, inside the model's folder
    location: str  # its name as the model spells it
    offset: int  # bytes before the first
    length: int  # bytes

    def overlaps(self, other: Span) -> bool:
        """Whether two spans share bytes."""
        starts_before_end = self.offset < other.offset + other.length and other.offset < self.offset + self.length
        return self.path == other.path and starts_before_end


def locate(tensor: onnx.TensorProto, folder: Path | None) -> Span:
    """The place of an external payload of a model in `folder`, known to lie within an existing file.

    A model is data, and data must not decide which files of the system are read: only regular files inside the
    model's own folder are, symbolic links resolved first.

    Raises:
        InputError: The reference is malformed, leaves the folder, or names bytes that are not there.
    """
    what = f"tensor {tensor.name!r}"
    if folder is None:
        raise InputError(
            f"{what}: its data is in an external file, but a model given as an object has no folder to find it in. "
            "Give the model's path, or load its external data first."
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or "\0" in location:
        raise InputError(f"{what}: external data without a usable file name. Export the model again.")
    # Both flavours: a model written on one system must not escape on the other.
    if PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        raise InputError(
            f"{what}: external data at the absolute path {location!r} is refused. "
            "Put the file beside the model and refer to it by its relative name."
        )
    length = raw_size(tensor)
    offset = _number(entries.get("offset", "0"), what, "offset")
    stated = _number(entries.get("length") or str(length), what, "length")
    if stated != length:
        raise InputError(
            f"{what}: external length is {stated} bytes, but its type and shape {list(tensor.dims)} need {length}. "
            "Export the model again."
        )
    path = folder / location
    try:
        resolved, home = path.resolve(), folder.resolve()
        status = resolved.stat() if resolved.is_relative_to(home) else None
    except FileNotFoundError as error:
        raise InputError(
            f"{what}: external data file {str(folder / location)!r} not found. Put it beside the model."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{what}: external data file {path} cannot be read: {error}.") from error
    if status is None:
        raise InputError(
            f"{what}: external data {location!r} leads to {resolved}, outside the model's folder {home}: refused. "
            "Put the file itself, not a link, beside the model."
        )
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{what}: external data {path} is not a regular file. Put the data file beside the model.")
    if status.st_size < offset + length:
        raise InputError(
            f"{what}: external data file {path} has {status.st_size} bytes, but bytes {offset} to {offset + length} "
            "are needed. The file is cut short or of another model; copy it again."
        )
    return Span(resolved, location, offset, length)


def payload(tensor: onnx.TensorProto, folder: Path | None) -> NDArray[np.uint8]:
    """A tensor's raw little-endian bytes `[n]`, wherever they are; those of an external file are mapped, not loaded.

    Raises:
        InputError: They are not where the tensor says, cannot be mapped, or do not fit its dims and type.
    """
    if not is_external(tensor):
        raw = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.from_array(inline_array(tensor)).raw_data
        return np.frombuffer(raw, np.uint8)
    span = locate(tensor, folder)
    if span.length == 0:
        return np.zeros(0, np.uint8)  # an empty span cannot be mapped
    try:
        return np.memmap(span.path, np.uint8, mode="r", offset=span.offset, shape=(span.length,))
    except (OSError, ValueError) as error:
        raise InputError(f"tensor {tensor.name!r}: cannot map external data {span.path}: {error}.") from error


def _number(text: str, what: str, key: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise InputError(f"{what}: external {key} {text!r} is not a number of bytes. Export the model again.")
    return int(text)
