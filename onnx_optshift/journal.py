"""What a run tells the process that waits for it: its stage, its hidden names, and what it puts in place.

It lies in memory that both share, so that it outlives a crash and needs no disk. Unless shared nothing is recorded.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# Bytes of address space; pages that nobody writes to take no memory.
_SIZE = 1 << 24
_shared: mmap.mmap | None = None
_stages: list[str] = []


@dataclass
class Record:
    """How far a run was, its hidden names, and final places with inode numbers of files about to be renamed."""

    stage: str = "at the start"
    hidden: list[str] = field(default_factory=list)
    renames: list[tuple[str, int]] = field(default_factory=list)

    @property
    def written(self) -> str:
        """Which files have got their final places, in words: a rename keeps the inode number."""
        placed = [path for path, inode in self.renames if os.path.exists(path) and os.stat(path).st_ino == inode]
        return f"{' and '.join(placed)} was written before" if placed else "nothing was written"


def share() -> None:
    """Opens an empty journal for this process and those that it forks; an OSError where there is no memory."""
    global _shared
    _shared = mmap.mmap(-1, _SIZE)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Records that the block is one stage of the work; stages may lie in stages."""
    _stages.append(name)
    _note("stage", f"during {name}")
    try:
        yield
    finally:
        _stages.pop()
        _note("stage", f"during {_stages[-1]}" if _stages else f"after {name}")


def hidden(name: Path) -> None:
    """Records a hidden name before anything of it is made: debris if this process dies."""
    _note("hidden", os.path.abspath(name))


def renaming(written: Path, final: Path) -> None:
    """Records that a file is about to be renamed."""
    _note("renames", (os.path.abspath(final), written.stat().st_ino))


def read() -> Record:
    """What stands in the journal; what a process was writing when it died does not count."""
    record = Record()
    whole = _shared[: _shared.find(b"\0")].rpartition(b"\n")[0] if _shared is not None else b""
    for kind, value in map(json.loads, whole.splitlines()):
        if kind == "stage":
            record.stage = value
        else:
            getattr(record, kind).append(value)
    return record


def _note(kind: str, value: object) -> None:
    if _shared is not None:
        with suppress(ValueError):  # full, which is no reason for a run to fail
            _shared.write(json.dumps([kind, value]).encode() + b"\n")
