"""Arrays against the model's inputs: everything that can be wrong with data is found here, before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnx_optshift.calibration.inputs import InputSpec, describe, why_feeds
from onnx_optshift.calibration.source import Array, Feeds, Part
from onnx_optshift.errors import InputError, closest

# The name of an array that came without one: it is meant for the model's only input.
UNNAMED = ""
_TEXT = "OUS"
_FLOAT64_EXACT = 2**53  # every integer up to here is a float64


@dataclass(frozen=True)
class Entry:
    """A set of named arrays as a source holds it, not looked at yet.

    Attributes:
        where: The file or object it comes from, for messages.
        read: Gives the arrays by name, labels among them; lists and scalars count as arrays.
        feed: Whether it is one feed; otherwise stacked samples, if the shapes allow.
        lazy: Whether it is read again on every pass; otherwise it stays in memory.
        start: Number of its first sample there, for messages.
    """

    where: str
    read: Callable[[], Mapping[str, object]]
    feed: bool = False
    lazy: bool = False
    start: int = 0


Entries: TypeAlias = Generator[Entry, None, None]


def check(
    entry: Entry, inputs: Sequence[InputSpec], *, labels_name: str, labels_required: bool = False
) -> tuple[Part, list[str]]:
    """Reads one entry, checks it, and converts element types where no value changes.

    Axis 0 of its arrays numbers the samples, unless it is a feed or the shapes of arrays and inputs rule that out. The
    array called `labels_name` holds labels, unless an input is called so.

    Returns:
        The arrays, in memory, in the model's order and types, with labels as int64 (classes) or float64 (targets); and
        what was converted or left out, one sentence each.

    Raises:
        InputError: An array is missing, or has a wrong type, shape or value; the labels do not fit; no samples.
    """
    where, names = entry.where, [spec.name for spec in inputs]
    found = {str(name): _as_array(value, str(name), where) for name, value in entry.read().items()}
    if found.keys() == {UNNAMED} and UNNAMED not in names:
        if len(names) != 1:
            raise InputError(
                f"{where}: one array without a name, but the model has {len(names)} inputs: {describe(inputs)}. Give a "
                ".npz (in Python: a dict) with one array for each, named as the inputs."
            )
        found = {names[0]: found[UNNAMED]}
    spare = [name for name in found if name not in names]
    missing = [name for name in names if name not in found]
    listed = ", ".join(map(repr, found)) or "nothing"
    if missing:
        hint = closest(missing[0], [name for name in spare if name != labels_name])
        raise InputError(
            f"{where}: array{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} missing. Expected "
            f"{describe(inputs)}; found {listed}.{hint} Name them as the model's inputs."
        )
    if labels_required and labels_name not in spare:
        raise InputError(
            f"{where}: no array {labels_name!r} with labels. Expected it beside the model's inputs; found {listed}."
            f"{closest(labels_name, spare)} Give the name of the labels' array, or no name to do without."
        )
    notes = [f"array {name!r} ignored: the model has no such input" for name in spare if name != labels_name]
    feeds = {spec.name: _typed(found[spec.name], spec.dtype) for spec in inputs}
    stacked = not entry.feed and _is_stacked(feeds, inputs, where)
    reason = "" if entry.feed or stacked else why_feeds(inputs) or "the arrays have no common axis of samples"
    if reason:
        notes.append(f"each set of arrays is one feed and counts as one sample: {reason}")
    for spec in inputs:
        wrong = _misshapen(feeds[spec.name], spec, reason, stacked=stacked)
        if wrong:
            raise InputError(f"{where}: {spec.name!r} has {wrong}")
    if all(array.size == 0 for array in feeds.values()) or (stacked and not len(feeds[names[0]])):
        raise InputError(f"{where}: no samples; the arrays are empty. Expected {describe(inputs)} with at least one.")
    start = entry.start if stacked else None
    for spec in inputs:
        array = feeds[spec.name]
        _check_finite(array, spec.name, where, start)
        feeds[spec.name] = _converted(array, spec, where)
        if _level(array.dtype) is not None and array.dtype != feeds[spec.name].dtype:
            notes.append(f"{spec.name!r}: {array.dtype.name} converted to {feeds[spec.name].dtype.name}")
    labels = None
    if labels_name in spare:
        _check_finite(found[labels_name], labels_name, where, start)
        labels = _labels(found[labels_name], feeds, f"{where}: labels {labels_name!r} have", stacked=stacked)
    return Part(len(feeds[names[0]]) if stacked else 1, stacked, lambda: feeds, labels), notes


def _as_array(value: object, name: str, where: str) -> Array:
    try:
        array = np.asarray(value)
    except Exception as error:  # tensors of other libraries refuse in their own ways
        raise InputError(f"{where}: {name!r} ({type(value).__name__}) is not an array: {error}") from error
    if array.dtype.kind == "O" and not all(isinstance(item, str) for item in array.flat):
        raise InputError(
            f"{where}: {name!r} holds Python objects, not numbers or text. Rows of different lengths cannot be one "
            "array: give such samples one by one, as separate feeds."
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _typed(array: Array, want: np.dtype[Any] | None) -> Array:
    # numpy saves a bfloat16 array as bytes without a type.
    bare = array.dtype.type is np.void and array.dtype.names is None
    if want is not None and bare and want.kind == "V" and want.itemsize == array.dtype.itemsize:
        return array.view(want)
    return array


def _is_stacked(given: Feeds, inputs: Sequence[InputSpec], where: str) -> bool:
    if why_feeds(inputs) or any(array.ndim == 0 for array in given.values()):
        return False
    lengths = {name: len(array) for name, array in given.items()}
    if len(set(lengths.values())) == 1:
        return True
    # Different lengths are a slip, unless the model itself says that the leading axes are different things.
    by_lead: dict[object, set[int]] = {}
    for spec in inputs:
        by_lead.setdefault(spec.dims[0] if spec.dims else None, set()).add(lengths[spec.name])
    if None not in by_lead and all(len(found) == 1 for found in by_lead.values()):
        return False
    shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
    raise InputError(
        f"{where}: the arrays have different numbers of samples along axis 0: {shown}. Expected the same for all of "
        f"{describe(inputs)}. Make them equally long; or, where an input has no axis of samples, give one file "
        "(in Python: one dict of an iterable) per run of the model."
    )


def _misshapen(array: Array, spec: InputSpec, reason: str, *, stacked: bool) -> str:
    """What is wrong with an array's shape, and what to do; empty where nothing is."""
    dims = array.shape if spec.dims is None else spec.dims
    shape = list(array.shape)
    expected = f"expected {spec} (read as one feed: {reason})" if reason else f"expected {spec}"
    if array.ndim != len(dims):
        hint = "Give one array axis for each of the input's axes."
        if array.ndim == len(dims) - 1:
            hint = "If this is a single sample, add the leading axis: array[None]."
        elif array.ndim == len(dims) + 1 and not stacked:
            hint = "If axis 0 numbers the samples, give each as a feed of its own."
        return f"rank {array.ndim}, shape {shape}; {expected}, rank {len(dims)}. {hint}"
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        if isinstance(dim, int) and dim != size and not (stacked and axis == 0):
            hint = "Prepare the data as the model's training did (axis order, crop, padding)."
            return f"shape {shape}; {expected}: size {dim} along axis {axis}, found {size}. {hint}"
    return ""


def _check_finite(array: Array, name: str, where: str, start: int | None) -> None:
    # `start` is the number of the first sample, None in a feed.
    if _level(array.dtype) != 2 and array.dtype.kind != "c":
        return
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        at = f"at {bad[0].tolist()}" if start is None else f"in sample {start + bad[0][0]}"
        raise InputError(
            f"{where}: {name!r} holds {len(bad)} values that are NaN or infinite, first {at}. Expected finite numbers. "
            "Remove these samples or repair them."
        )


def _level(dtype: np.dtype[Any]) -> int | None:
    """0 for bool, 1 for integers, 2 for real floats: a conversion may only go up or stay. None for anything else."""
    if dtype.kind == "V":  # the kind of float types that numpy itself lacks, and of plain records
        return 2 if "float" in dtype.name else None
    return {"b": 0, "i": 1, "u": 1, "f": 2}.get(dtype.kind)


def _converted(array: Array, spec: InputSpec, where: str) -> Array:
    # Integers and bools may become any type that holds their values exactly; floats any other float type (rounded,
    # never overflowing). A float is never cut to an integer: that is not a conversion but most often the wrong array.
    want, have = spec.dtype, array.dtype
    if want is None:
        if _level(have) is None and have.kind not in "OUSc":
            raise InputError(f"{where}: {spec.name!r} has type {have}, which no model takes. Expected {spec}.")
        return array
    if want == have or (want.kind in _TEXT and have.kind in _TEXT):
        return array
    levels, detail = (_level(have), _level(want)), ""
    if levels[0] is not None and levels[1] is not None and levels[0] <= levels[1]:
        with np.errstate(all="ignore"):
            converted: Array = array.astype(want)
        if _same_values(array, converted):
            return converted
        detail = f" Its values do not fit into {want.name}: they reach from {array.min()} to {array.max()}."
    name = "text" if want.kind in _TEXT else want.name
    raise InputError(
        f"{where}: {spec.name!r} has type {have.name}; expected {spec}.{detail} Save the array as {name}, if it is the "
        "right one."
    )


def _same_values(array: Array, converted: Array) -> bool:
    """Whether a conversion kept integers exactly, and floats finite."""
    if array.size == 0 or _level(array.dtype) == 2:
        return bool(np.isfinite(converted).all())
    low, high = int(array.min()), int(array.max())
    if _level(converted.dtype) == 1:
        bounds = np.iinfo(converted.dtype)
        return bounds.min <= low and high <= bounds.max
    exact = max(-low, high) <= _FLOAT64_EXACT
    return exact and bool(np.array_equal(array.astype(np.float64), converted.astype(np.float64)))


def _labels(labels: Array, feeds: Feeds, what: str, *, stacked: bool) -> Array:
    level = _level(labels.dtype)
    if level is None:
        raise InputError(
            f"{what} type {labels.dtype}; expected integer class labels (0, 1, ...) or float targets. Number the "
            "classes in the order of the model's output."
        )
    labels = labels.astype(np.float64 if level == 2 else np.int64)
    lengths = {len(array) for array in feeds.values() if array.ndim}
    if not stacked:
        labels, lengths = np.atleast_1d(labels), lengths | {1}
    if labels.ndim == 0 or len(labels) not in lengths:
        each = "sample" if stacked else "feed, or one for each of its rows"
        raise InputError(
            f"{what} shape {list(labels.shape)}; expected {' or '.join(map(str, sorted(lengths)))} along axis 0, one "
            f"for each {each}."
        )
    if level != 2 and labels.ndim != 1:
        raise InputError(
            f"{what} shape {list(labels.shape)}; expected one integer class for each sample, [samples]. From one-hot "
            "rows take labels.argmax(1)."
        )
    return labels
