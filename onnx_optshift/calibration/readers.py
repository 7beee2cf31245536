"""Calibration data given in Python: arrays, dicts, readers with `get_next`, iterables, callables, and scripts.

Readers and generators can be read only once, so what they give is copied and kept.
"""

from __future__ import annotations

import re
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from onnx_optshift.calibration.collect import Collector
from onnx_optshift.calibration.files import add_path, single_input
from onnx_optshift.calibration.source import Samples, describe
from onnx_optshift.errors import InputError, closest

DEFAULT_FUNCTION = "load_data"
_SCRIPT = re.compile(r"(?P<path>.+\.py)(:(?P<function>[^:/\\]*))?")


def add_source(collector: Collector, source: object) -> str:
    """Adds a source of any kind.

    Args:
        collector: Where it goes.
        source: A path, script, array, dict of arrays (axis 0 numbers the samples), reader, iterable of dicts (each one
            feed), callable that gives one of these, or `Samples`.

    Returns:
        The source's name for the report.

    Raises:
        InputError: It is of no such kind, fails, or does not fit the model.
    """
    if isinstance(source, Samples):
        collector.add_samples(source)
        return source.source
    if isinstance(source, (str, PathLike)):
        script = _SCRIPT.fullmatch(str(source))
        if script:
            return _add_script(collector, Path(script["path"]), script["function"] or DEFAULT_FUNCTION)
        add_path(collector, Path(source))
        return str(source)
    name = _name(source)
    _add_object(collector, source, name)
    return name


def _add_object(collector: Collector, source: Any, name: str) -> None:
    # A reader's truth value and length may be undefined or wrong, and copying one breaks it: only get_next is called.
    if _is_factory(source):
        with _running(name):
            given = source()
        if _is_factory(given):
            raise InputError(f"{name}: expected arrays or an iterable of dicts, but calling it gave another callable.")
        _add_object(collector, given, name)
    elif callable(getattr(source, "get_next", None)):
        _add_feeds(collector, _reader_feeds(source), name, copy=True)
    elif isinstance(source, np.ndarray):
        collector.add({single_input(collector.inputs, name): source}, name)
    elif isinstance(source, Mapping):
        collector.add(source, name)
    elif isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, PathLike)) for item in source):
        for item in source:
            add_source(collector, item)
    elif isinstance(source, Iterable):
        _add_feeds(collector, iter(source), name, copy=not isinstance(source, (list, tuple)))
    else:
        raise InputError(
            f"{name}: not calibration data. Expected a path, arrays, a dict of arrays, an iterable of dicts, an object "
            f"with get_next(), or a function that gives one of these; arrays named as {describe(collector.inputs)}."
        )


def _is_factory(source: object) -> bool:
    """Whether something is to be called for its data; a class is, even of readers or iterables."""
    if isinstance(source, type):
        return True
    return callable(source) and not callable(getattr(source, "get_next", None)) and not isinstance(source, Iterable)


def _add_feeds(collector: Collector, feeds: Iterator[Any], name: str, *, copy: bool) -> None:
    """Each item is one feed. With `copy`, because a generator may hand out the same buffer again and again.

    Raises:
        InputError: An item is no feed of the model, or there is none.
    """
    number = 0
    while True:
        with _running(name):
            feed = next(feeds, None)
        if feed is None:
            break
        where = f"{name}, feed {number}"
        if isinstance(feed, np.ndarray):
            feed = {single_input(collector.inputs, where): feed}
        if not isinstance(feed, Mapping):
            raise InputError(
                f"{where}: expected a dict with an array for each of {describe(collector.inputs)}, found "
                f"{type(feed).__name__}."
            )
        collector.add({key: np.array(value) for key, value in feed.items()} if copy else feed, where, feed=True)
        number += 1
    if number == 0:
        raise InputError(
            f"{name}: gave no samples. If it was read before, make a new one: a reader gives its data once."
        )


def _reader_feeds(reader: Any) -> Iterator[Any]:
    while True:
        feed = reader.get_next()
        if feed is None or (isinstance(feed, Mapping) and not feed):
            return
        yield feed


def _name(source: object) -> str:
    name = getattr(source, "__qualname__", None) or type(source).__name__
    return f"Python {name}"


@contextmanager
def _running(name: str) -> Iterator[None]:
    """Errors of the user's own code become one message that says where they came from.

    Raises:
        InputError: The code failed.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{name}: failed while giving samples: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})."
        ) from error


def _add_script(collector: Collector, path: Path, function: str) -> str:
    """Runs a script with the user's own rights, and takes what its function gives.

    Raises:
        InputError: There is no such script or function, or it fails.
    """
    name = f"{path}:{function}"
    if not path.is_file():
        raise InputError(f"{path}: no such script. Expected a Python file with a function {function}().")
    with _script(path) as module:
        loader = vars(module).get(function)
        if not callable(loader):
            known = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
            raise InputError(
                f"{path}: no function {function!r}; found {', '.join(known) or 'none'}.{closest(function, known)} Name "
                f"it after the script: {path.name}:<function>."
            )
        _add_object(collector, loader, name)
    return name


@contextmanager
def _script(path: Path) -> Iterator[types.ModuleType]:
    """The script as a module, alive while its data is read: importable siblings, no __pycache__ left beside it.

    Raises:
        InputError: The script, or what it gave, failed.
    """
    module = types.ModuleType(f"_calibration_script_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}")
    module.__file__ = str(path)
    folder = str(path.absolute().parent)
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    sys.path.insert(0, folder)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        yield module
    except InputError as error:
        # What the script's function raised is reported by its own line.
        cause = error.__cause__
        line = _line(cause, path) if cause is not None else None
        if line is None:
            raise
        raise InputError(f"{path}, line {line}: {type(cause).__name__}: {cause}. Correct the script.") from cause
    except (Exception, SystemExit) as error:
        line = _line(error, path)
        at = f"{path}, line {line}" if line else str(path)
        raise InputError(f"{at}: {type(error).__name__}: {error}. Correct the script.") from error
    finally:
        if folder in sys.path:  # the script may have changed it
            sys.path.remove(folder)
        sys.modules.pop(module.__name__, None)


def _line(error: BaseException, path: Path) -> int | None:
    """The last line of the script that an error passed through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None
