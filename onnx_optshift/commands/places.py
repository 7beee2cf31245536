"""Where a run may write: never over what it reads, and not over a file that is no model unless that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from onnx_optshift.errors import InputError
from onnx_optshift.write.atomic import system_errors

# The tag of a model's first field, the IR version: no other file that is likely to lie here begins with this byte.
_MODEL_START = b"\x08"


def check_places(
    out: Path | None,
    reports: Sequence[Path],
    reads: Iterable[object],
    *,
    force: bool,
    checkpoint: str | None = None,
) -> None:
    """Refuses files to be written that would cost the user something.

    The run reads `reads` besides the model itself, which OUT may replace: paths, scripts with `:function`, folders, and
    other things that are no files. With `force` a file that is no ONNX model may be replaced. The folder `checkpoint`
    may be removed at any time, so that nothing else may lie in it.

    Raises:
        InputError: OUT or a report is one of these, or two of them are one file; or a folder holds both a checkpoint
            and one of these.
    """
    reads = list(reads)
    if checkpoint is not None:
        _check_apart(Path(checkpoint), ([out] if out is not None else []) + list(reports), reads)
    files = [path for path in reports if str(path) != "-"]
    for path in ([out] if out is not None else []) + files:
        used = next((source for source in reads if _same(path, source)), None)
        if used is not None:
            raise InputError(f"{path}: this run reads it ({used}), and would replace it. Choose another output path.")
    if out is None:
        return
    if str(out) == "-":
        raise InputError("OUT: a model cannot be written to standard output. Give a file name.")
    if any(_same(out, path) for path in files):
        raise InputError(f"{out}: is OUT and --report at once. Give the report another name.")
    if not force and out.is_file() and not _is_model(out):
        raise InputError(
            f"{out}: exists and is no ONNX model. Was OUT left out, or a file named twice? Choose another output path, "
            "or replace it with --force."
        )


def _check_apart(folder: Path, writes: Iterable[Path], reads: Iterable[object]) -> None:
    here = folder.resolve()
    for path in writes:
        if here in {path.resolve(), *path.resolve().parents}:
            raise InputError(
                f"--checkpoint {folder}: {path} would lie in it, and a checkpoint may be removed at any time. Give it "
                "a folder of its own."
            )
    for source in reads:
        place = Path(source) if isinstance(source, (str, PathLike)) else None
        if place is not None and place.is_dir() and place.resolve() in {here, *here.parents}:
            raise InputError(
                f"--checkpoint {folder}: this run reads the folder {place} that it would lie in. Give it a folder of "
                "its own."
            )


def _same(path: Path, source: object) -> bool:
    """Whether a path is a source, or a file in a folder that is one."""
    if not isinstance(source, (str, PathLike)):
        return False
    given = Path(source)
    script = str(source).rpartition(":")[0]
    places = [given, Path(script)] if script.endswith(".py") else [given]
    here = path.resolve()
    return any(
        here == place.resolve() or (place.is_dir() and here.parent == place.resolve() and here.exists())
        for place in places
    )


def _is_model(path: Path) -> bool:
    with system_errors(path), path.open("rb") as file:
        start = file.read(1)
    return start in {b"", _MODEL_START}
