"""External data: where a tensor's bytes lie outside the model file, and the refusal to follow them anywhere else."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_optshift.errors import InputError
from onnx_optshift.graph.tensors import raw_size, stored_dtype

_CHUNK: Final = 1 << 22
# What a system says that cannot copy between these two files by itself.
_NOT_IN_KERNEL: Final = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@dataclass(frozen=True)
class Span:
    """Bytes of one tensor in an external file.

    Attributes:
        path: The file, inside the model's folder.
        location: Its name as the model spells it.
        offset: First byte.
        length: Number of bytes.
    """

    path: Path
    location: str
    offset: int
    length: int

    def overlaps(self, other: Span) -> bool:
        """Whether two spans share bytes."""
        starts_before_end = self.offset < other.offset + other.length and other.offset < self.offset + self.length
        return self.path == other.path and starts_before_end


def locate(tensor: onnx.TensorProto, folder: Path | None) -> Span:
    """Resolves and checks the external reference of a tensor.

    A model is data, and data must not decide which files of the system are read: only regular files inside the
    model's own folder are, symbolic links resolved first.

    Args:
        tensor: A tensor whose payload is external.
        folder: The model's folder.

    Returns:
        The span, known to lie within an existing file.

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
    path = folder / location
    length = raw_size(tensor)
    offset = _number(entries.get("offset", "0"), what, "offset")
    stated = _number(entries.get("length") or str(length), what, "length")
    if stated != length:
        raise InputError(
            f"{what}: external length is {stated} bytes, but its type and shape {list(tensor.dims)} need {length}. "
            "Export the model again."
        )
    try:
        resolved, home = path.resolve(), folder.resolve()
        inside = resolved.is_relative_to(home)
        status = resolved.stat() if inside else None
    except FileNotFoundError as error:
        raise InputError(
            f"{what}: external data file {location!r} not found in {folder}. Put it beside the model."
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


def external_array(tensor: onnx.TensorProto, folder: Path | None) -> NDArray[np.generic]:
    """The external payload as a read-only view of its file, in the tensor's dtype and shape: nothing is loaded.

    Raises:
        InputError: The reference cannot be resolved, or the file cannot be mapped.
    """
    span = locate(tensor, folder)
    shape, dtype = tuple(tensor.dims), stored_dtype(tensor)
    if span.length == 0:
        return np.zeros(shape, dtype)  # an empty span cannot be mapped
    try:
        return np.memmap(span.path, dtype, mode="r", offset=span.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise InputError(f"tensor {tensor.name!r}: cannot map external data {span.path}: {error}.") from error


def copy_bytes(source: BinaryIO, offset: int, length: int, target: BinaryIO) -> None:
    """Appends a part of one file to another, at the target's position, without holding it in memory.

    The kernel copies where it can; file systems that share blocks then copy nothing at all.

    Args:
        source: Open for reading.
        offset: First byte.
        length: Number of bytes.
        target: Open for writing; its position is behind the copy afterwards.

    Raises:
        OSError: The system cannot read or write.
        InputError: The source is shorter than that.
    """
    target.flush()
    position = target.tell()
    done = _copied_by_kernel(source, offset, length, target, position)
    target.seek(position + done)
    source.seek(offset + done)
    while done < length:
        chunk = source.read(min(length - done, _CHUNK))
        if not chunk:
            raise InputError(f"{source.name}: became shorter while it was read. Run again.")
        target.write(chunk)
        done += len(chunk)


def _copied_by_kernel(source: BinaryIO, offset: int, length: int, target: BinaryIO, position: int) -> int:
    """Bytes that the kernel has copied; the rest is left to the caller.

    Raises:
        OSError: The system cannot read or write.
    """
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    try:
        while done < length:
            count = os.copy_file_range(source.fileno(), target.fileno(), length - done, offset + done, position + done)
            if not count:
                break
            done += count
    except OSError as error:
        if error.errno not in _NOT_IN_KERNEL:
            raise
    return done


def _number(text: str, what: str, key: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise InputError(f"{what}: external {key} {text!r} is not a number of bytes. Export the model again.")
    return int(text)
