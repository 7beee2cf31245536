"""Files of the report: the suffix names the form, "-" is JSON on standard output, and there is never half a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from onnx_optshift.errors import InputError
from onnx_optshift.report.model import Report

STDOUT = Path("-")
_SUFFIXES = (".json", ".html")


def check_path(path: Path) -> None:
    """Refuses a report file that could not be written, before the run starts; `STDOUT` is always accepted.

    Raises:
        InputError: The suffix names no form of report, or the place cannot be written to.
    """
    if path == STDOUT:
        return
    if path.suffix.lower() not in _SUFFIXES:
        found = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise InputError(
            f"--report {path}: expected a file name that ends in {' or '.join(_SUFFIXES)}, or - for JSON on standard "
            f"output, found {found}."
        )
    folder, obstacle = path.parent, ""
    try:
        if path.is_dir():
            obstacle = "expected a file, found a directory. Name a file in it."
        elif not folder.is_dir():
            obstacle = f"the directory {folder} does not exist. Make it first."
        elif not os.access(folder, os.W_OK):
            obstacle = f"the directory {folder} cannot be written to. Take another one."
        # Asks the system about the name too, which may be longer than it takes.
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        obstacle = f"cannot be written: {error.strerror or error}. Take another name."
    if obstacle:
        raise InputError(f"--report {path}: {obstacle}")


def write(report: Report, path: Path) -> None:
    """Writes the report beside its place, then renames it there; to standard output as it is.

    Raises:
        InputError: The file cannot be written.
    """
    if path.suffix.lower() == ".html":
        from onnx_optshift.report import htmlpage  # its libraries are slow to load

        content = htmlpage.render(report)
    else:
        content = to_json(report)
    if path == STDOUT:
        sys.stdout.write(content)
        sys.stdout.flush()
        return
    from onnx_optshift.write.atomic import write_text

    try:
        write_text(path, content)
    except InputError as error:
        raise InputError(f"--report {error}") from error


def to_json(report: Report) -> str:
    """The report as JSON text, indented, with a final newline: valid in any case."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
