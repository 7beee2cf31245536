"""Data files that a model leaves behind when it is replaced: removed where it is certain that nobody else needs them.

Certain is: the old file at OUT refers to it; its name is one that this package gives, with the hash of its own content;
and no file beside it mentions that name, be it a copy of the old model or a run that has not finished. External data
is only ever found in a model's own folder, so models elsewhere cannot need it.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

import onnx

from onnx_optshift.graph.tensors import all_tensors, is_external
from onnx_optshift.temporary import LONGEST_NAME, cut

_HASH: Final = 16  # hexadecimal digits of SHA-256
_END: Final = re.compile(rf"\.([0-9a-f]{{{_HASH}}})\.data\Z")
# Protobuf allows no larger message, so a larger file is no model.
_LARGEST_MODEL: Final = 2**31


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_name(out: Path, content: str) -> str:
    """The name of a data file of the model `out`.

    Args:
        out: The model's final path.
        content: `digest` of the data file.
    """
    end = f".{content[:_HASH]}.data"
    return cut(out.stem, LONGEST_NAME - len(end)) + end


def data_files(out: Path) -> tuple[Path, ...]:
    """Data files of ours that the model at `out` refers to; none where there is no model."""
    proto = onnx.ModelProto()
    # Whatever stands there now is going to be replaced; if it cannot be read, nothing is known of its data.
    with suppress(Exception):
        if out.stat().st_size < _LARGEST_MODEL:
            proto.ParseFromString(out.read_bytes())
    external = (tensor for tensor in all_tensors(proto) if is_external(tensor))
    names = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    found = ((name, _END.search(name)) for name in names)
    return tuple(out.with_name(name) for name, end in found if end and name == data_name(out, end[1]))


def remove_unused(files: tuple[Path, ...]) -> None:
    """Removes data files that no file beside them mentions. What cannot be read or removed stays.

    Args:
        files: From `data_files`, before the model was replaced.
    """
    for file in files:
        with suppress(OSError, ValueError):
            end = _END.search(file.name)
            ours = end is not None and digest(file).startswith(end[1])
            if ours and not any(_mentions(other, file.name) for other in file.parent.iterdir() if other != file):
                file.unlink()


def _mentions(path: Path, name: str) -> bool:
    """Whether a file contains a name; those that are too large to be models do not count.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file() or not 0 < path.stat().st_size < _LARGEST_MODEL:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode("utf-8", "surrogateescape")) >= 0
