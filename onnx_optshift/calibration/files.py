"""Calibration data in files: .npz, .npy, `test_data_set_*` folders, Polygraphy JSON, and folders of these.

A file of modest size is read into memory whole. Of a large one the rows are read in pieces where its format allows that
(.npy, .npz without compression), and the files of a folder one at a time: once to check them, and again on every pass.
Nothing is ever unpickled.

A new format is a function from a file to its arrays by name, or to a list of feeds, and a row in one of two tables.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnx_optshift.calibration.checks import UNNAMED, Entries, Entry
from onnx_optshift.calibration.inputs import InputSpec, describe, why_feeds
from onnx_optshift.calibration.source import Array, Feeds
from onnx_optshift.errors import InputError, closest

# Rows of a larger file are read in pieces of this many bytes.
PIECE_BYTES = 1 << 24
TEST_SETS = "test_data_set_*"
_PB_INPUT = re.compile(r"input_(\d+)\.pb")
_KINDS = (
    f"a .npz or .npy file, a folder of such files, a {TEST_SETS} folder (input_<i>.pb) or a folder of those, a "
    "Polygraphy JSON file or folder, or script.py[:function]"
)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_ENCODED = "Expected arrays as `polygraphy run --save-inputs` writes them."


def path_entries(path: Path, inputs: Sequence[InputSpec], *, lazy: bool = False) -> Entries:
    """What a file or a folder holds, in natural order of the files' names.

    Raises:
        InputError: It does not exist, is of no such kind, or cannot be read.
    """
    if path.is_dir():
        yield from _folder(path, inputs)
    elif path.suffix in _ARRAYS and path.exists():
        yield from _arrays(path, [path], inputs, lazy=lazy)
    elif path.suffix in _FEEDS and path.exists():
        feeds = _feeds(path)
        if lazy and len(feeds) == 1:  # a list of feeds is not read anew for each of them
            del feeds  # else they would live on while the next file is read
            yield Entry(str(path), lambda: _feeds(path)[0], feed=True, lazy=True)
        else:
            for number, feed in enumerate(feeds):
                yield Entry(f"{path}, feed {number}", partial(dict, feed), feed=True)
    elif path.exists():
        raise InputError(f"{path}: this kind of file is not read as calibration data. Expected {_KINDS}.")
    else:
        raise InputError(f"{path}: no such file or folder.{_neighbours(path)} Expected {_KINDS}.")


def find_test_sets(folder: Path, inputs: int) -> list[Path]:
    """The `test_data_set_*` folders in a folder that hold as many inputs as the model has, in natural order."""
    return [f for f in sorted(folder.glob(TEST_SETS), key=_natural) if f.is_dir() and len(_pb_files(f)) >= inputs]


def _folder(folder: Path, inputs: Sequence[InputSpec]) -> Entries:
    found = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=_natural)
    kinds = {suffix: [e for e in found if e.suffix == suffix and e.is_file()] for suffix in (*_ARRAYS, *_FEEDS)}
    kinds[TEST_SETS] = [folder] if _pb_files(folder) else [e for e in found if e.is_dir() and _pb_files(e)]
    present = [kind for kind, files in kinds.items() if files]
    if len(present) != 1:
        raise InputError(
            f"{folder}: expected a folder of one kind of calibration data, found "
            f"{', '.join(present) or f'{len(found)} other entries'}. It may be {_KINDS}."
        )
    files = kinds[present[0]]
    if present == [TEST_SETS]:
        yield from (Entry(str(e), partial(_read_test_set, e, inputs), feed=True, lazy=True) for e in files)
    elif present == [".npy"] and {spec.name for spec in inputs} <= {file.stem for file in files}:
        yield from _arrays(folder, files, inputs, lazy=True)
    else:
        for file in files:
            yield from path_entries(file, inputs, lazy=True)


def _arrays(where: Path, files: Sequence[Path], inputs: Sequence[InputSpec], *, lazy: bool) -> Entries:
    """The arrays of a file, or of several with one each; in pieces where that is large and they are stacked."""
    large = sum(file.stat().st_size for file in files) > PIECE_BYTES
    pieces = _pieces(files) if large and not why_feeds(inputs) else []
    for rows in pieces:
        yield Entry(str(where), partial(_rows, files, rows), lazy=True, start=rows.start)
    if not pieces:
        yield Entry(str(where), partial(_together, files), lazy=lazy)


def _together(files: Sequence[Path], *, mapped: bool = False) -> Feeds:
    found: Feeds = {}
    for file in files:
        with _reading(file):
            arrays = _ARRAYS[file.suffix](file, mapped)
        column = file.stem if len(files) > 1 else UNNAMED
        found |= {name or column: array for name, array in arrays.items()}
    return found


def _rows(files: Sequence[Path], rows: slice) -> Feeds:
    # Copied: pages that are mapped count as the process's own.
    return {name: np.array(array[rows]) for name, array in _together(files, mapped=True).items()}


def _pieces(files: Sequence[Path]) -> list[slice]:
    """Rows to be read together; none where arrays have different lengths, or no row can be read without the rest."""
    arrays = _together(files, mapped=True)
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or not all(isinstance(array, np.memmap) for array in arrays.values()):
        return []
    for file in filter(zipfile.is_zipfile, files):
        _check_sums(file)
    count = lengths.pop()
    step = max(1, PIECE_BYTES * count // sum(array.nbytes for array in arrays.values()))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _check_sums(path: Path) -> None:
    # Nobody else looks at the checksums of what is mapped.
    with _reading(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {damaged!r}")


def _feeds(path: Path) -> list[Feeds]:
    with _reading(path):
        return _FEEDS[path.suffix](path)


def _numpy(path: Path, mapped: bool) -> Feeds:
    # numpy goes by the content, not by the suffix; a damaged file that it opened by name it would leave open.
    with path.open("rb") as file:
        if mapped and file.read(6) == b"\x93NUMPY":
            return {UNNAMED: np.lib.format.open_memmap(path, mode="r")}
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {UNNAMED: loaded}
        with loaded:
            return {name: _member(loaded, name, file if mapped else None) for name in loaded.files}


def _member(loaded: Any, name: str, file: IO[bytes] | None) -> Any:
    """An array of a .npz; mapped where its file is given and has it neither compressed nor in an odd layout."""
    info = loaded.zip.NameToInfo.get(f"{name}.npy")
    if file is None or info is None or info.compress_type != zipfile.ZIP_STORED:
        return loaded[name]
    with loaded.zip.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            return loaded[name]
        shape, fortran, dtype = _HEADERS[version](member)
        start = member.tell()
    if dtype.hasobject or 0 in shape:
        return loaded[name]
    file.seek(info.header_offset + 26)  # of the lengths of name and extra field, after which the member begins
    start += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")


def _read_test_set(folder: Path, inputs: Sequence[InputSpec]) -> Feeds:
    # A tensor belongs to the input it is named as, or else to the one its file's number says.
    names = [spec.name for spec in inputs]
    arrays: Feeds = {}
    for number, file in _pb_files(folder).items():
        name, array = _read_tensor(file)
        if name not in names and number >= len(names):
            raise InputError(
                f"{file}: a tensor for input {number}, but the model has {len(names)} inputs: {describe(inputs)}. "
                "Remove the file, or give the model that it belongs to."
            )
        name = name if name in names else names[number]
        if name in arrays:
            raise InputError(f"{file}: a second tensor for input {name!r} in {folder}. Expected one for each input.")
        arrays[name] = array
    return arrays


def _read_tensor(path: Path) -> tuple[str, Array]:
    with _reading(path):
        from onnx import TensorProto, numpy_helper  # noqa: TID251  # loaded only where there are .pb files

        tensor = TensorProto()
        tensor.ParseFromString(path.read_bytes())
        if tensor.data_location == TensorProto.EXTERNAL:
            raise InputError(f"{path}: the tensor's data lies in another file, which is not read. Store it inline.")
        if not tensor.data_type or tensor.HasField("segment"):
            # What a sequence or an optional looks like when it is read as a tensor.
            raise InputError(f"{path}: expected one tensor. Sequence and optional inputs are not supported.")
        return tensor.name, numpy_helper.to_array(tensor)


def _pb_files(folder: Path) -> dict[int, Path]:
    """`input_<i>.pb` files by i, ascending."""
    found = ((match, file) for file in folder.iterdir() if (match := _PB_INPUT.fullmatch(file.name)))
    return dict(sorted((int(match[1]), file) for match, file in found))


def _json(path: Path) -> list[Feeds]:
    # A list of feeds, or one.
    content = json.loads(path.read_text(encoding="utf-8"))
    feeds = content if isinstance(content, list) else [content]
    if not feeds or not all(isinstance(feed, dict) for feed in feeds):
        raise InputError(f"{path}: expected a list of dicts, one array by input name each. {_ENCODED}")
    return [{name: _decoded(value, name, path) for name, value in feed.items()} for feed in feeds]


def _decoded(value: Any, name: str, path: Path) -> Array:
    text = value.get("array") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{path}: {name!r} is not an encoded array. {_ENCODED}")
    return np.asarray(np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False))


# By suffix: files that hold one set of arrays, stacked unless the model rules that out; and files that hold feeds.
_ARRAYS: Mapping[str, Callable[[Path, bool], Feeds]] = {".npz": _numpy, ".npy": _numpy}
_FEEDS: Mapping[str, Callable[[Path], list[Feeds]]] = {".json": _json}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    # A damaged file fails in any of two dozen ways inside zipfile, zlib, numpy, json and protobuf, so any exception
    # counts; numpy's warnings about odd headers are no news beside the checks that follow.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if "pickle" in reason:
            reason = "it holds Python objects or is no such file, and objects are never loaded"
        raise InputError(
            f"{path}: cannot be read as a {path.suffix} file: {reason}. Write the file again, or leave it out."
        ) from error


def _natural(path: Path) -> list[str | int]:
    """Sort key by which `x_2` comes before `x_10`."""
    return [int(text) if position % 2 else text for position, text in enumerate(re.split(r"(\d+)", path.name))]


def _neighbours(path: Path) -> str:
    try:
        return closest(path.name, [entry.name for entry in path.absolute().parent.iterdir()])
    except OSError:
        return ""
