"""Calibration data in files: .npz, .npy, `test_data_set_*` folders, Polygraphy JSON, and folders of these.

One file is read into memory whole; the files of a folder are read once to check them and again on every pass, one at a
time. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_optshift.calibration.collect import Collector
from onnx_optshift.calibration.source import Array, InputSpec, describe
from onnx_optshift.errors import InputError, closest

TEST_SETS = "test_data_set_*"
_PB_INPUT = re.compile(r"input_(\d+)\.pb")
_KINDS = (
    f"a .npz or .npy file, a folder of such files, a {TEST_SETS} folder (input_<i>.pb) or a folder of those, a "
    "Polygraphy JSON file or folder, or script.py[:function]"
)
# Marks that Polygraphy versions put on encoded values.
_MARKS = ("polygraphy_class", "__polygraphy_encoded_ndarray", "__polygraphy_encoded_LazyArray")


def add_path(collector: Collector, path: Path) -> None:
    """Adds what a file or a folder holds.

    Args:
        collector: Where it goes.
        path: The file or folder.

    Raises:
        InputError: It does not exist, cannot be read, or does not fit the model.
    """
    if path.is_dir():
        _add_folder(collector, path)
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder.{_close_by(path)} Expected {_KINDS}.")
    elif path.suffix == ".npz":
        collector.add(read_npz(path), str(path))
    elif path.suffix == ".npy":
        collector.add({single_input(collector.inputs, str(path)): read_npy(path)}, str(path))
    elif path.suffix == ".json":
        _add_json(collector, path)
    else:
        raise InputError(f"{path}: this kind of file is not read as calibration data. Expected {_KINDS}.")


def single_input(inputs: Sequence[InputSpec], where: str) -> str:
    """Name of the model's only input, for an array that comes without a name.

    Args:
        inputs: The model's inputs.
        where: Where the array comes from, for the message.

    Raises:
        InputError: The model has several inputs.
    """
    if len(inputs) != 1:
        raise InputError(
            f"{where}: one array without a name, but the model has {len(inputs)} inputs: {describe(inputs)}. Give a "
            ".npz (in Python: a dict) with one array for each, named as the inputs."
        )
    return inputs[0].name


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of a .npz file.

    Args:
        path: The file.

    Raises:
        InputError: It is damaged, or holds something other than arrays.
    """
    # numpy leaves a file open that it opened by name and found damaged, so both readers open it themselves.
    with _reading(path, "a .npz file"), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise InputError(f"{path}: expected a .npz archive, found a single .npy array. Rename it to .npy.")
        with loaded:
            arrays: dict[str, Array] = {name: loaded[name] for name in loaded.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path}: member {name!r} is not an array. Write the file with np.savez.")
    return arrays


def read_npy(path: Path) -> Array:
    """The array of a .npy file.

    Args:
        path: The file.

    Raises:
        InputError: It is damaged, or holds something other than one array.
    """
    with _reading(path, "a .npy file"), path.open("rb") as file:
        array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: expected one .npy array, found a .npz archive. Rename it to .npz.")
    return array


def test_sets(folder: Path, inputs: int) -> list[Path]:
    """The `test_data_set_*` folders in a folder that hold a file for each of the model's inputs, in natural order.

    Args:
        folder: Where to look.
        inputs: Number of the model's inputs.
    """
    return [f for f in sorted(folder.glob(TEST_SETS), key=_natural) if f.is_dir() and len(_pb_files(f)) >= inputs]


test_sets.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def _add_folder(collector: Collector, folder: Path) -> None:
    if _pb_files(folder):
        _add_test_set(collector, folder)
        return
    entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=_natural)
    sets = [entry for entry in entries if entry.is_dir() and _pb_files(entry)]
    files = {suffix: [e for e in entries if e.suffix == suffix and e.is_file()] for suffix in (".npz", ".npy", ".json")}
    per_input = [folder / spec.name for spec in collector.inputs]
    by_input = all(sub.is_dir() and any(sub.glob("*.npy")) for sub in per_input)
    present = [suffix for suffix, found in files.items() if found] + [TEST_SETS] * bool(sets)
    if len(present) + by_input != 1:
        found = ", ".join(present + ["sub-folders named as inputs"] * by_input) or f"{len(entries)} other entries"
        raise InputError(
            f"{folder}: expected a folder of one kind of calibration data, found {found}. It may be {_KINDS}."
        )
    for entry in sets:
        _add_test_set(collector, entry)
    for entry in files[".npz"]:
        collector.add_lazy(partial(read_npz, entry), str(entry))
    for entry in files[".json"]:
        _add_json(collector, entry, lazily=True)
    if files[".npy"]:
        _add_npy_files(collector, folder, files[".npy"])
    if by_input:
        _add_npy_folders(collector, folder, per_input)


def _add_npy_files(collector: Collector, folder: Path, files: Sequence[Path]) -> None:
    """Either one file for each input, named as it, or any number of files for a model's only input.

    Raises:
        InputError: The files fit neither.
    """
    named = {file.stem: file for file in files}
    if all(spec.name in named for spec in collector.inputs):
        collector.add_lazy(lambda: {name: read_npy(file) for name, file in named.items()}, str(folder))
        return
    labels = [file for file in files if file.stem == collector.labels_name]
    if labels:
        raise InputError(
            f"{labels[0]}: labels beside several arrays cannot be told apart by file. Name the data's file as the "
            f"model's input ({describe(collector.inputs)}), or put data and labels into one .npz."
        )
    name = single_input(collector.inputs, str(folder))
    for file in files:
        collector.add_lazy(partial(_named, name, file), str(file))


def _named(name: str, file: Path) -> dict[str, Array]:
    return {name: read_npy(file)}


def _add_npy_folders(collector: Collector, folder: Path, per_input: Sequence[Path]) -> None:
    """A sub-folder for each input; the first files of all are read together, then the second, and so on.

    Raises:
        InputError: The sub-folders differ in their number of files.
    """
    columns = [sorted(sub.glob("*.npy"), key=_natural) for sub in per_input]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"{sub.name} {len(column)}" for sub, column in zip(per_input, columns, strict=True))
        raise InputError(
            f"{folder}: the inputs have different numbers of files: {counts}. Give as many for each input."
        )
    names = [spec.name for spec in collector.inputs]
    for row in zip(*columns, strict=True):
        collector.add_lazy(partial(_row, dict(zip(names, row, strict=True))), str(row[0]))


def _row(files: Mapping[str, Path]) -> dict[str, Array]:
    return {name: read_npy(file) for name, file in files.items()}


def _add_test_set(collector: Collector, folder: Path) -> None:
    collector.add_lazy(partial(_read_test_set, folder, collector.inputs), str(folder), feed=True)


def _read_test_set(folder: Path, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    """A tensor belongs to the input it is named as, or else to the one its file's number says.

    Raises:
        InputError: There is no such input, or two tensors for one.
    """
    names = [spec.name for spec in inputs]
    arrays: dict[str, Array] = {}
    for number, file in _pb_files(folder).items():
        name, array = _read_tensor(file)
        if name not in names:
            if number >= len(names):
                raise InputError(
                    f"{file}: a tensor for input {number}, but the model has {len(names)} inputs: {describe(inputs)}. "
                    "Remove the file, or give the model that it belongs to."
                )
            name = names[number]
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


def _add_json(collector: Collector, path: Path, *, lazily: bool = False) -> None:
    """Feeds of a Polygraphy JSON file: a list of them, or one. A file with one feed can be read lazily."""
    feeds = _read_json(path)
    if lazily and len(feeds) == 1:
        del feeds
        collector.add_lazy(lambda: _read_json(path)[0], str(path), feed=True)
        return
    for number, feed in enumerate(feeds):
        collector.add(feed, f"{path}, feed {number}", feed=True)


def _read_json(path: Path) -> list[dict[str, Array]]:
    with _reading(path, "a Polygraphy JSON file"):
        content = json.loads(path.read_text(encoding="utf-8"))
        feeds = content if isinstance(content, list) else [content]
        if not feeds:
            raise InputError(f"{path}: no feeds in the list. Expected dicts with {_encoded_hint()}")
        for feed in feeds:
            if not isinstance(feed, dict) or _is_encoded(feed):
                raise InputError(
                    f"{path}: expected a list of dicts, one array by input name each, found {type(feed).__name__}. "
                    f"Expected {_encoded_hint()}"
                )
        return [{name: _decoded(value, name, path) for name, value in feed.items()} for feed in feeds]


def _encoded_hint() -> str:
    return "arrays as `polygraphy run --save-inputs` writes them."


def _is_encoded(value: object) -> bool:
    return isinstance(value, dict) and any(mark in value for mark in _MARKS)


def _decoded(value: Any, name: str, path: Path) -> Array:
    while isinstance(value, dict) and "values" in value and _is_encoded(value):
        value = value["values"]  # a LazyArray is a shell around an array
    text = value.get("array") if isinstance(value, dict) and _is_encoded(value) else None
    if not isinstance(text, str):
        raise InputError(f"{path}: {name!r} is not an encoded array. Expected {_encoded_hint()}")
    array = _loaded(text)
    if isinstance(array, np.ndarray):
        return array
    with array:  # the first versions wrote an archive with a single member
        return np.asarray(array[array.files[0]])


def _loaded(text: str) -> Any:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = text.encode("latin-1")  # as older versions wrote it
    return np.load(io.BytesIO(data), allow_pickle=False)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever goes wrong with a file into one message.

    A damaged file fails in any of two dozen ways inside zipfile, zlib, numpy, json and protobuf, so that any exception
    counts; numpy's warnings about odd headers are no news beside the checks that follow.

    Raises:
        InputError: Anything failed.
    """
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
    return [int(text) if number else text for number, text in _tokens(path.name)]


def _tokens(name: str) -> list[tuple[bool, str]]:
    return [(bool(position % 2), text) for position, text in enumerate(re.split(r"(\d+)", name))]


def _close_by(path: Path) -> str:
    try:
        return closest(path.name, [entry.name for entry in path.absolute().parent.iterdir()])
    except OSError:
        return ""
