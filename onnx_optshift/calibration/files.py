"""Calibration data in files: .npz, .npy, .safetensors, `test_data_set_*`, Polygraphy JSON, and folders of these.

A file of modest size is read whole and kept. Rows of a large one are read in pieces where its format allows that (not
.npz with compression), and the files of a folder one at a time: once to check them, and again on every pass. Nothing is
ever unpickled. A new format is a function here, and a row in one of the two tables at the end.
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
from onnx_optshift.tensorfile import views

# Rows of a file larger than this are read in pieces of about as many bytes.
PIECE_BYTES = 1 << 24
TEST_SETS = "test_data_set_*"
_PB_INPUT = re.compile(r"input_(\d+)\.pb")
_KINDS = (
    f"a .npz, .npy or .safetensors file, a folder of such files, a {TEST_SETS} folder (input_<i>.pb) or a folder of "
    "those, a Polygraphy JSON file or folder, or script.py[:function]"
)
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def path_entries(path: Path, inputs: Sequence[InputSpec], *, lazy: bool = False) -> Entries:
    """What a file or a folder holds, in natural order of the files' names.

    Raises:
        InputError: It does not exist, is of no such kind, or cannot be read.
    """
    if path.is_dir():
        with _reading(path):
            found = sorted((entry for entry in path.iterdir() if not entry.name.startswith(".")), key=_natural)
        yield from _folder(path, found, inputs)
    elif not path.exists():
        hint = closest(path.name, [entry.name for entry in path.absolute().parent.glob("*")])
        raise InputError(f"{path}: no such file or folder.{hint} Expected {_KINDS}.")
    elif not path.is_file():
        raise InputError(
            f"{path}: a pipe or a device, which cannot be read again on each pass. Save the data as a file."
        )
    elif path.suffix in _ARRAYS:
        yield from _arrays(path, [path], inputs, lazy=lazy)
    elif path.suffix in _FEEDS:
        feeds = _read_feeds(path)
        if lazy and len(feeds) == 1:  # of a list, the whole file would be read again for each
            del feeds  # else they would live on while the next file is read
            yield Entry(str(path), lambda: _read_feeds(path)[0], feed=True, lazy=True)
        else:
            yield from (Entry(f"{path}, feed {i}", partial(dict, feed), feed=True) for i, feed in enumerate(feeds))
    else:
        raise InputError(f"{path}: this kind of file is not read as calibration data. Expected {_KINDS}.")


def find_test_sets(folder: Path, inputs: int) -> list[Path]:
    """The `test_data_set_*` folders in a folder that hold as many inputs as the model has, in natural order."""
    return [f for f in sorted(folder.glob(TEST_SETS), key=_natural) if f.is_dir() and len(_pb_files(f)) >= inputs]


def _folder(folder: Path, found: Sequence[Path], inputs: Sequence[InputSpec]) -> Entries:
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
    """The arrays of a file, or of several with one each; in pieces where they are large and stacked."""
    large = sum(file.stat().st_size for file in files) > PIECE_BYTES
    pieces = _pieces(files) if large and not why_feeds(inputs) else []
    for rows in pieces:
        yield Entry(str(where), partial(_rows, files, rows), lazy=True, start=rows.start)
    if not pieces:
        yield Entry(str(where), partial(_read_arrays, files), lazy=lazy)


def _pieces(files: Sequence[Path]) -> list[slice]:
    """Rows to be read together; none where arrays have different lengths, or no row can be read without the rest."""
    arrays = _read_arrays(files, mapped=True)
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or not all(isinstance(array, np.memmap) for array in arrays.values()):
        return []
    for file in filter(zipfile.is_zipfile, files):
        _check_sums(file)
    count = lengths.pop()
    step = max(1, PIECE_BYTES * count // sum(array.nbytes for array in arrays.values()))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _rows(files: Sequence[Path], rows: slice) -> Feeds:
    # Copied: pages that are mapped count as the process's own.
    return {name: np.array(array[rows]) for name, array in _read_arrays(files, mapped=True).items()}


def _check_sums(path: Path) -> None:
    # Nobody else looks at the checksums of what is mapped.
    with _reading(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {damaged!r}")


def _read_arrays(files: Sequence[Path], *, mapped: bool = False) -> Feeds:
    found: Feeds = {}
    for file in files:
        with _reading(file):
            arrays = _ARRAYS[file.suffix](file, mapped)
        column = file.stem if len(files) > 1 else UNNAMED
        found |= {name or column: array for name, array in arrays.items()}
    return found


def _read_feeds(path: Path) -> list[Feeds]:
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
            return {name: _member(loaded, name, file) if mapped else loaded[name] for name in loaded.files}


def _member(loaded: Any, name: str, file: IO[bytes]) -> Any:
    """An array of a .npz file; mapped, unless it is compressed or of an odd layout."""
    info = loaded.zip.NameToInfo.get(f"{name}.npy")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        return loaded[name]
    with loaded.zip.open(info) as member:
        header = _NPY_HEADERS.get(np.lib.format.read_magic(member))
        shape, fortran, dtype = header(member) if header else ((0,), False, np.dtype(object))
        start = member.tell()
    if dtype.hasobject or 0 in shape:
        return loaded[name]
    file.seek(info.header_offset + 26)  # of the lengths of name and extra field, after which the member begins
    start += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")


def _safetensors(path: Path, mapped: bool) -> Feeds:
    return views(np.memmap(path, np.uint8, "r") if mapped else np.fromfile(path, np.uint8))


def _json(path: Path) -> list[Feeds]:
    content = json.loads(path.read_text(encoding="utf-8"))
    feeds = content if isinstance(content, list) else [content]
    expected = "Expected arrays as `polygraphy run --save-inputs` writes them."
    if not feeds or not all(isinstance(feed, dict) for feed in feeds):
        raise InputError(f"{path}: expected a list of dicts, one array by input name each. {expected}")
    found: list[Feeds] = [{} for _ in feeds]
    for arrays, feed in zip(found, feeds, strict=True):
        for name, value in feed.items():
            text = value.get("array") if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise InputError(f"{path}: {name!r} is not an encoded array. {expected}")
            arrays[name] = np.asarray(np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False))
    return found


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
        kind = f"as a {path.suffix} file" if path.suffix else "as calibration data"
        if isinstance(error, PermissionError):
            raise InputError(f"{path}: {reason.lower()}. Choose data that you may read.") from error
        if "pickle" in reason:
            reason = "it holds Python objects or is no such file, and objects are never loaded"
        raise InputError(f"{path}: cannot be read {kind}: {reason}. Write the file again, or leave it out.") from error


def _natural(path: Path) -> list[str | int]:
    """Sort key by which `x_2` comes before `x_10`."""
    return [int(text) if position % 2 else text for position, text in enumerate(re.split(r"(\d+)", path.name))]


# By suffix: files of one set of arrays each, stacked unless the model rules that out; and files of feeds.
_ARRAYS: Mapping[str, Callable[[Path, bool], Feeds]] = {".npz": _numpy, ".npy": _numpy, ".safetensors": _safetensors}
_FEEDS: Mapping[str, Callable[[Path], list[Feeds]]] = {".json": _json}
