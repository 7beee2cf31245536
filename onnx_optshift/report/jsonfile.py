"""The report as a JSON file: valid JSON in any case, and never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from onnx_optshift.errors import InputError
from onnx_optshift.report.model import Report

SUFFIX = ".json"


def check_path(path: Path) -> None:
    """Refuses a report file that could not be written, before the run starts.

    Args:
        path: Where the report shall go.

    Raises:
        InputError: The suffix is not `.json`, or the place cannot be written to.
    """
    if path.suffix.lower() != SUFFIX:
        found = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise InputError(f"--report {path}: expected a file name that ends in {SUFFIX}, found {found}.")
    if path.is_dir():
        raise InputError(f"--report {path}: expected a file, found a directory. Name a file in it.")
    if not path.parent.is_dir():
        raise InputError(f"--report {path}: the directory {path.parent} does not exist. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--report {path}: the directory {path.parent} cannot be written to. Take another one.")


def to_json(report: Report) -> str:
    """The report as JSON text, indented, with a final newline."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(report: Report, path: Path) -> None:
    """Writes the report beside its place, then renames it there.

    Args:
        report: What to write.
        path: A file name that `check_path` accepts.

    Raises:
        InputError: The file cannot be written.
    """
    text = to_json(report)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Names in a model may hold halves of surrogate pairs, which UTF-8 refuses.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(path)
    except OSError as error:
        raise InputError(f"--report {path}: cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)
