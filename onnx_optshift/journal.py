"""What a run tells while it runs: its stage and its unfinished files, for the process that waits for it.

The records outlive a crash: they are in a nameless file that both processes hold. Without one nothing is recorded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_file: int | None = None
_stages: list[str] = []


@dataclass
class Record:
    """What stood in the journal at the end.

    Attributes:
        place: The last stage as words, such as "during capture"; "at the start" before the first.
        unfinished: Files and folders that are debris now, whether or not they still exist.
        placed: The last file that was put in its final place; None when there was none.
    """

    place: str = "at the start"
    unfinished: set[Path] = field(default_factory=set)
    placed: Path | None = None


def open_new() -> int:
    """Opens an empty journal.

    Returns:
        Its descriptor, to be given to `write_to` in the process that is watched and to `read` in the one that waits.

    Raises:
        OSError: The system has no room for it.
    """
    if sys.platform == "linux":
        return os.memfd_create("journal")  # also where every disk is full
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_to(descriptor: int) -> None:
    """Makes this process record what it does, for good.

    Args:
        descriptor: Of `open_new`.
    """
    global _file
    _file = descriptor


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Records that the block is one stage of the work; stages may lie in stages.

    Args:
        name: As the user is told.
    """
    _stages.append(name)
    _add("place", f"during {name}")
    try:
        yield
    finally:
        _stages.pop()
        _add("place", f"during {_stages[-1]}" if _stages else f"after {name}")


def unfinished(path: Path) -> None:
    """Records a file or folder before it is made: debris if this process dies before it removes or places it."""
    _add("unfinished", os.path.abspath(path))


def removed(*paths: Path) -> None:
    """Records that unfinished files are gone, so that their names may be taken by somebody else."""
    _add("removed", *map(os.path.abspath, paths))


def placing(temporary: Path, final: Path, data_files: list[Path]) -> None:
    """Records that a rename is about to happen: once `temporary` has gone, the others are finished.

    Args:
        temporary: The file's name before.
        final: And after.
        data_files: Unfinished files that belong to it.
    """
    _add("placing", *map(os.path.abspath, (temporary, final, *data_files)))


def _add(kind: str, *words: str) -> None:
    if _file is not None:
        with suppress(OSError):  # a run does not fail for want of its journal
            os.write(_file, json.dumps([kind, *words]).encode() + b"\n")


def read(descriptor: int) -> Record:
    """Reads the journal of a process that has ended.

    Args:
        descriptor: Of `open_new`.
    """
    record = Record()
    placings: dict[Path, tuple[Path, set[Path]]] = {}
    whole, _, _ = os.pread(descriptor, os.fstat(descriptor).st_size, 0).rpartition(b"\n")
    for line in whole.splitlines():
        kind, *words = json.loads(line)
        paths = list(map(Path, words))
        if kind == "place":
            record.place = words[0]
        elif kind == "unfinished":
            record.unfinished.update(paths)
        elif kind == "removed":
            record.unfinished.difference_update(paths)
            for path in paths:
                placings.pop(path, None)
        else:
            temporary, final, *data_files = paths
            placings[temporary] = (final, set(data_files))
    for temporary, (final, belonging) in placings.items():
        if not temporary.exists():
            record.unfinished -= belonging
            record.placed = final
    return record
