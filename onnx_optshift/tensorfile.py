"""Arrays in files of the safetensors format: a header in JSON that says where each lies, and then their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

# numpy has no bfloat16 of its own: two bytes that whoever knows better may see as something else.
_TYPES = (
    {"BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8"}
    | {"I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "V2"}
)  # fmt: skip
_NAMES = {np.dtype(code).name: name for name, code in _TYPES.items()} | {"bfloat16": "BF16"}
_HASH = "sha256"
_BLANK = "0" * 64


def views(data: NDArray[np.uint8]) -> Arrays:
    """The arrays of a file, as views of its bytes `[n]`.

    Raises:
        ValueError: It is no such file, or damaged. Other errors of JSON and numpy say so too.
    """
    return _read(data)[0]


def write(file: IO[bytes], arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
    """Writes arrays, some words about them, and a hash of all of it, every byte but its own."""
    entries: dict[str, Any] = {"__metadata__": {**about, _HASH: _BLANK}}
    pieces, end = [], 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": _NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
        pieces.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    for piece in pieces:
        digest.update(piece)
    # Quotes inside of other words are escaped, so that this stands there once.
    file.write(head.replace(_sealed(_BLANK), _sealed(digest.hexdigest()), 1))
    for piece in pieces:
        file.write(piece)


def read(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays and the words of a file that `write` wrote.

    Raises:
        ValueError: A byte is not as it was written.
        OSError: The system refuses.
    """
    data = np.fromfile(path, np.uint8)
    try:
        arrays, about = _read(data)
        found = about.pop(_HASH)
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        digest = hashlib.sha256(data[:begin].tobytes().replace(_sealed(found), _sealed(_BLANK), 1))
    except Exception as error:  # whatever may come of bytes that mean nothing
        raise ValueError("it is no file of this kind, or cut short") from error
    digest.update(data[begin:].data)
    if digest.hexdigest() != found:
        raise ValueError("its content does not fit its hash")
    return arrays, about


def words(path: Path) -> dict[str, str]:
    """The words of a file, whose arrays are neither read nor checked.

    Raises:
        ValueError: It is no such file. A TypeError or KeyError says so too.
        OSError: The system refuses.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is cut short")
        found = json.loads(file.read(length))
    return {str(key): str(value) for key, value in dict(found["__metadata__"]).items()}


def _read(data: NDArray[np.uint8]) -> tuple[Arrays, dict[str, str]]:
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < begin:
        raise ValueError("it is cut short")
    header = json.loads(data[8:begin].tobytes())
    about = header.pop("__metadata__", {})
    found: Arrays = {}
    for name, tensor in header.items():
        start, stop = (begin + offset for offset in tensor["data_offsets"])
        found[name] = data[start:stop].view(_TYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return found, about


def _sealed(digest: str) -> bytes:
    return f'"{_HASH}":"{digest}"'.encode()
