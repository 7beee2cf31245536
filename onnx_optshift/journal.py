"""What a run tells while it runs: its stage, its unfinished files and what it has placed, for the process that waits.

The records outlive a crash: they are in a nameless file that both processes hold. Without one nothing is recorded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

_file: int | None = None
_stages: list[str] = []


@dataclass
class Record:
    """What stood in the journal at the end.

    Attributes:
        place: The last stage as words, such as "during capture"; "at the start" before the first.
        unfinished: Work names (of `write.atomic`) that were taken, whether or not anything of them still exists.
        placing: Final places and inode numbers of files whose rename was about to happen.
    """

    place: str = "at the start"
    unfinished: list[str] = field(default_factory=list)
    placing: list[tuple[str, int]] = field(default_factory=list)

    @property
    def placed(self) -> list[str]:
        """The files that got their final places: a rename keeps the inode number."""
        return [path for path, inode in self.placing if os.path.exists(path) and os.stat(path).st_ino == inode]


_record = Record()


def open_new() -> int:
    """Opens an empty journal.

    Returns:
        Its descriptor, to be given to `write_to` in the process that is watched and to `read` in the one that waits.

    Raises:
        OSError: The system has no room for it.
    """
    if hasattr(os, "memfd_create"):  # not in every build of Python for Linux
        return os.memfd_create("journal")  # also where every disk is full
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_to(descriptor: int) -> None:
    """Makes this process record what it does, for good; `descriptor` is of `open_new`."""
    global _file
    _file = descriptor


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Records that the block is one stage of the work, `name` as the user is told; stages may lie in stages."""
    _stages.append(name)
    _save(place=f"during {name}")
    try:
        yield
    finally:
        _stages.pop()
        _save(place=f"during {_stages[-1]}" if _stages else f"after {name}")


def unfinished(work_name: Path) -> None:
    """Records a work name before anything of it is made: debris if this process dies."""
    _save(unfinished=[*_record.unfinished, os.path.abspath(work_name)])


def placing(temporary: Path, final: Path) -> None:
    """Records that `temporary` is about to be renamed to `final`."""
    _save(placing=[*_record.placing, (os.path.abspath(final), temporary.stat().st_ino)])


def _save(**changed: object) -> None:
    """Appends the whole record: the last complete line is the one that counts."""
    if _file is None:
        return
    for name, value in changed.items():
        setattr(_record, name, value)
    with suppress(OSError):  # a run does not fail for want of its journal
        os.write(_file, json.dumps(asdict(_record)).encode() + b"\n")


def read(descriptor: int) -> Record:
    """Reads the journal of a process that has ended; `descriptor` is of `open_new`."""
    whole, _, _ = os.pread(descriptor, os.fstat(descriptor).st_size, 0).rpartition(b"\n")
    return Record(**json.loads(whole.rpartition(b"\n")[2])) if whole else Record()
