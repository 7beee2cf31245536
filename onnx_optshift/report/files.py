"""Files of the report: the suffix names the form, and there is never half a file."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_optshift.errors import InputError
from onnx_optshift.report.model import Report
from onnx_optshift.temporary import beside

HTML = ".html"
SUFFIXES = (".json", HTML)


def check_path(path: Path) -> None:
    """Refuses a report file that could not be written, before the run starts.

    Args:
        path: Where the report shall go.

    Raises:
        InputError: The suffix names no form of report, what that form needs is not installed, or the place cannot be
            written to.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        found = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise InputError(f"--report {path}: expected a file name that ends in {' or '.join(SUFFIXES)}, found {found}.")
    if path.is_dir():
        raise InputError(f"--report {path}: expected a file, found a directory. Name a file in it.")
    if not path.parent.is_dir():
        raise InputError(f"--report {path}: the directory {path.parent} does not exist. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--report {path}: the directory {path.parent} cannot be written to. Take another one.")
    if suffix == HTML:
        from onnx_optshift.report import htmlpage

        htmlpage.check_installed()


def write(report: Report, path: Path) -> None:
    """Writes the report beside its place, then renames it there.

    Args:
        report: What to write.
        path: A file name that `check_path` accepts.

    Raises:
        InputError: The file cannot be written.
    """
    text = _text(report, path)
    temporary = beside(path)
    try:
        # Names in a model may hold halves of surrogate pairs, which UTF-8 refuses.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"--report {path}: cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _text(report: Report, path: Path) -> str:
    # Only the form that is asked for is loaded: a page brings libraries that need not be there.
    if path.suffix.lower() == HTML:
        from onnx_optshift.report import htmlpage

        return htmlpage.render(report)
    from onnx_optshift.report import jsonfile

    return jsonfile.to_json(report)
