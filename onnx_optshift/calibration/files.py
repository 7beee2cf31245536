"""Calibration data in files: .npz, .npy, `test_data_set_*` folders, Polygraphy JSON, and folders of these.

A single file is read into memory whole; the files of a folder are read once to check them and again on every pass, one
at a time. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_optshift.calibration.checks import UNNAMED, Entries, Entry
from onnx_optshift.calibration.inputs import InputSpec, describe
from onnx_optshift.calibration.source import Array
from onnx_optshift.errors import InputError, closest

TEST_SETS = "test_data_set_*"
_PB_INPUT = re.compile(r"input_(\d+)\.pb")
_KINDS = (
    f"a .npz or .npy file, a folder of such files, a {TEST_SETS} folder (input_<i>.pb) or a folder of those, a "
    "Polygraphy JSON file or folder, or script.py[:function]"
)
_ENCODED = "Expected arrays as `polygraphy run --save-inputs` writes them."


def path_entries(path: Path, inputs: Sequence[InputSpec]) -> Entries:
    """What a file or a folder holds, in natural order of the files' names.

    Raises:
        InputError: It does not exist, is of no such kind, or cannot be read.
    """
    if path.is_dir():
        yield from _folder(path, inputs)
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder.{_neighbours(path)} Expected {_KINDS}.")
    elif path.suffix in (".npz", ".npy"):
        yield Entry(str(path), partial(_read_numpy, path))
    elif path.suffix == ".json":
        yield from _json_feeds(path)
    else:
        raise InputError(f"{path}: this kind of file is not read as calibration data. Expected {_KINDS}.")


def find_test_sets(folder: Path, inputs: int) -> list[Path]:
    """The `test_data_set_*` folders in a folder that hold as many inputs as the model has, in natural order."""
    return [f for f in sorted(folder.glob(TEST_SETS), key=_natural) if f.is_dir() and len(_pb_files(f)) >= inputs]


def _folder(folder: Path, inputs: Sequence[InputSpec]) -> Entries:
    found = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=_natural)
    kinds = {suffix: [e for e in found if e.suffix == suffix and e.is_file()] for suffix in (".npz", ".npy", ".json")}
    kinds[TEST_SETS] = [folder] if _pb_files(folder) else [e for e in found if e.is_dir() and _pb_files(e)]
    present = [kind for kind, files in kinds.items() if files]
    if len(present) != 1:
        raise InputError(
            f"{folder}: expected a folder of one kind of calibration data, found "
            f"{', '.join(present) or f'{len(found)} other entries'}. It may be {_KINDS}."
        )
    for entry in kinds[TEST_SETS]:
        yield Entry(str(entry), partial(_read_test_set, entry, inputs), feed=True, lazy=True)
    for entry in kinds[".json"]:
        yield from _json_feeds(entry, lazy=True)
    arrays = kinds[".npz"] or kinds[".npy"]
    if {spec.name for spec in inputs} <= {file.stem for file in kinds[".npy"]}:
        yield Entry(str(folder), partial(_read_columns, arrays), lazy=True)
    else:
        for file in arrays:
            yield Entry(str(file), partial(_read_numpy, file), lazy=True)


def _read_numpy(path: Path) -> dict[str, Array]:
    # numpy goes by the content, not by the suffix; a damaged file that it opened by name it would leave open.
    with _reading(path, f"a {path.suffix} file"), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {UNNAMED: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}


def _read_columns(files: Sequence[Path]) -> dict[str, Array]:
    return {file.stem: array for file in files for array in _read_numpy(file).values()}


def _read_test_set(folder: Path, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    # A tensor belongs to the input it is named as, or else to the one its file's number says.
    names = [spec.name for spec in inputs]
    arrays: dict[str, Array] = {}
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
    with _reading(path, "an ONNX TensorProto"):
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


def _json_feeds(path: Path, *, lazy: bool = False) -> Entries:
    """The feeds of a Polygraphy JSON file: a list of them, or one. Only a file of one feed can be read lazily."""
    feeds = _read_json(path)
    if lazy and len(feeds) == 1:
        del feeds  # else they would live on while the next file is read
        yield Entry(str(path), lambda: _read_json(path)[0], feed=True, lazy=True)
        return
    for number, feed in enumerate(feeds):
        yield Entry(f"{path}, feed {number}", partial(dict, feed), feed=True)


def _read_json(path: Path) -> list[dict[str, Array]]:
    with _reading(path, "a Polygraphy JSON file"):
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


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
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
            f"{path}: cannot be read as {kind}: {reason}. Write the file again, or leave it out."
        ) from error


def _natural(path: Path) -> list[str | int]:
    """Sort key by which `x_2` comes before `x_10`."""
    return [int(text) if position % 2 else text for position, text in enumerate(re.split(r"(\d+)", path.name))]


def _neighbours(path: Path) -> str:
    try:
        return closest(path.name, [entry.name for entry in path.absolute().parent.iterdir()])
    except OSError:
        return ""
