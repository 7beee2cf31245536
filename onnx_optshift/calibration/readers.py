"""Calibration data given in Python: arrays, dicts, readers with `get_next`, iterables, callables, and scripts.

Readers and generators can be read only once, so what they give is copied and kept.
"""

from __future__ import annotations

import re
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_optshift.calibration.checks import UNNAMED, Entries, Entry
from onnx_optshift.calibration.inputs import InputSpec, describe
from onnx_optshift.errors import InputError, closest


def object_entries(source: Any, name: str, inputs: Sequence[InputSpec], script: Path | None = None) -> Entries:
    """What an array, a dict of arrays, a reader, an iterable of dicts (each one feed) or a callable holds or gives.

    Messages call it by `name`, and errors name the line of the `script` that it comes from.

    Raises:
        InputError: It is of no such kind, or fails.
    """
    # A reader's truth value and length may be undefined or wrong, and copying one breaks it: only get_next is called.
    reads = callable(getattr(source, "get_next", None))
    if isinstance(source, type) or (callable(source) and not reads and not isinstance(source, Iterable)):
        with _running(name, script):
            source = source()
    if callable(getattr(source, "get_next", None)):
        yield from _feeds(_until_empty(source), name, inputs, script)
    elif isinstance(source, np.ndarray):
        yield Entry(name, lambda: {UNNAMED: source})
    elif isinstance(source, Mapping):
        yield Entry(name, lambda: source)
    elif isinstance(source, Iterable) and not isinstance(source, (str, bytes)):
        yield from _feeds(iter(source), name, inputs, script, kept=isinstance(source, (list, tuple)))
    else:
        raise InputError(
            f"{name}: not calibration data. Expected a path, arrays, a dict of arrays, an iterable of dicts, an object "
            f"with get_next(), or a function that gives one of these; arrays named as {describe(inputs)}."
        )


def script_entries(path: Path, function: str, inputs: Sequence[InputSpec]) -> Entries:
    """Runs a script with the user's own rights, and takes what its function gives.

    Modules beside the script can be imported; no `__pycache__` of it is left there.

    Raises:
        InputError: There is no such script or function, or it fails.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such script. Expected a Python file with a function {function}().")
    code = path.read_bytes()  # where that is not permitted, the code is not at fault
    module = types.ModuleType(f"_calibration_script_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}")
    module.__file__ = str(path)
    folder = str(path.absolute().parent)
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    sys.path.insert(0, folder)
    try:
        with _running(str(path), path):
            exec(compile(code, str(path), "exec"), module.__dict__)
        loader = vars(module).get(function)
        if not callable(loader):
            known = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
            raise InputError(
                f"{path}: no function {function!r}; found {', '.join(known) or 'none'}.{closest(function, known)} Name "
                f"it after the script: {path.name}:<function>."
            )
        yield from object_entries(loader, f"{path}:{function}", inputs, path)
    finally:
        if folder in sys.path:  # the script may have changed it
            sys.path.remove(folder)
        sys.modules.pop(module.__name__, None)


def _feeds(
    feeds: Iterator[Any], name: str, inputs: Sequence[InputSpec], script: Path | None, *, kept: bool = False
) -> Entries:
    # Each item is one feed. What does not keep its items may hand out the same buffer again and again: it is copied.
    number = 0
    while True:
        with _running(name, script):
            feed = next(feeds, None)
        if feed is None:
            break
        where = f"{name}, feed {number}"
        feed = {UNNAMED: feed} if isinstance(feed, np.ndarray) else feed
        if not isinstance(feed, Mapping):
            raise InputError(
                f"{where}: expected a dict with an array for each of {describe(inputs)}, found {type(feed).__name__}."
            )
        yield Entry(where, partial(dict, feed) if kept else partial(_copied, feed), feed=True)
        number += 1
    if number == 0:
        raise InputError(
            f"{name}: gave no samples. If it was read before, make a new one: a reader gives its data once."
        )


def _copied(feed: Mapping[str, object]) -> dict[str, object]:
    return {name: np.array(value) for name, value in feed.items()}


def _until_empty(reader: Any) -> Iterator[Any]:
    while (feed := reader.get_next()) is not None and not (isinstance(feed, Mapping) and not feed):
        yield feed


@contextmanager
def _running(name: str, script: Path | None) -> Iterator[None]:
    # Errors of the user's own code become one message that says where they came from. What a script prints is no part
    # of a report on standard output.
    try:
        with nullcontext() if script is None else redirect_stdout(sys.stderr):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((str(error.filename), error.lineno))
        if script is not None:
            places = [place for place in places if place[0] == str(script)] or [(str(script), None)]
        file, line = places[-1]
        at = file if line is None else f"{file}, line {line}"
        raise InputError(f"{at}: {type(error).__name__}: {error}, in {name}. Correct the code.") from error
