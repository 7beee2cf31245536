"""The door: sources of any kind to `Samples`, and data that lies beside a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from pathlib import Path

from onnx_optshift.calibration.checks import Entries, Entry, check
from onnx_optshift.calibration.files import find_test_sets, path_entries
from onnx_optshift.calibration.inputs import InputSpec, describe, fixed_batch
from onnx_optshift.calibration.readers import object_entries, script_entries
from onnx_optshift.calibration.source import Feeds, Part, Samples
from onnx_optshift.errors import InputError

_SCRIPT = re.compile(r"(?P<path>.+\.py)(:(?P<function>[^:/\\]*))?")


def load(
    sources: Sequence[object],
    inputs: Sequence[InputSpec],
    *,
    labels_name: str = "labels",
    labels_required: bool = False,
) -> Samples:
    """Reads and checks calibration data, at least one sample; several sources are chained.

    Args:
        sources: Paths, scripts (`script.py[:function]`), arrays, dicts, readers, iterables, callables; or one
            `Samples`, which is given back. In a .npz, a .npy and a dict of arrays axis 0 numbers the samples, unless
            the shapes rule that out. Each dict of an iterable, each Polygraphy iteration and each `test_data_set_*`
            folder is one feed.
        inputs: The model's inputs.
        labels_name: Name of the array with labels.
        labels_required: Whether data without that array is an error, because the user named it.

    Raises:
        InputError: There is no data, or it does not fit the model.
    """
    if isinstance(sources, (str, PathLike)):  # would otherwise be read as a list of letters
        sources = [sources]
    if not inputs:
        raise InputError("the model has no inputs, so that no calibration data can reach its layers.")
    if not sources or "" in [source for source in sources if isinstance(source, str)]:
        raise InputError(f"no calibration data given. Expected arrays for {describe(inputs)}.")
    if len(sources) == 1 and isinstance(sources[0], Samples):
        return sources[0]
    names: list[str] = []
    parts: list[Part] = []
    notes: dict[str, None] = {}  # ordered, and the same note of a thousand files once

    def checked(entry: Entry) -> Part:
        part, said = check(entry, inputs, labels_name=labels_name, labels_required=labels_required)
        notes.update(dict.fromkeys(said))
        return part

    for source in sources:
        name, entries = _opened(source, inputs)
        names.append(name)
        with closing(entries):  # a script's import path ends with its generator
            parts += [_read_again(checked(e), e, checked) if e.lazy else checked(e) for e in entries]
    return Samples(parts, source=", ".join(names), batch=fixed_batch(inputs), notes=list(notes))


def beside(model_path: Path, inputs: Sequence[InputSpec]) -> list[Path]:
    """Calibration data that lies in the model's folder: the first of three kinds that is there.

    `<stem>.calibration.npz`, then `calibration.npz`, then all `test_data_set_*` folders with a file for each input.
    """
    for name in (f"{model_path.stem}.calibration.npz", "calibration.npz"):
        if (model_path.parent / name).is_file():
            return [model_path.parent / name]
    return find_test_sets(model_path.parent, len(inputs)) if inputs else []


def _opened(source: object, inputs: Sequence[InputSpec]) -> tuple[str, Entries]:
    """The source's name for the report, and what it holds."""
    if not isinstance(source, (str, PathLike)):
        name = f"Python {getattr(source, '__qualname__', None) or type(source).__name__}"
        return name, object_entries(source, name, inputs)
    script = _SCRIPT.fullmatch(str(source))
    if not script:
        return str(source), path_entries(Path(source), inputs)
    path, function = Path(script["path"]), script["function"] or "load_data"
    return f"{path}:{function}", script_entries(path, function, inputs)


def _read_again(part: Part, entry: Entry, checked: Callable[[Entry], Part]) -> Part:
    """A checked part without its arrays: they are read and checked again on every pass."""
    rows, stacked = part.rows, part.stacked

    def again() -> Feeds:
        now = checked(entry)
        if (now.rows, now.stacked) != (rows, stacked):
            raise InputError(f"{entry.where}: changed while it was in use ({rows} samples, now {now.rows}). Run again.")
        return now.read()

    return replace(part, read=again)
