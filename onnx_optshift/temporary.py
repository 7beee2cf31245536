"""Temporary names beside a final place: findable by the process that took them, so that leftovers can be told."""

from __future__ import annotations

import os
import re
import secrets
import zlib
from contextlib import suppress
from pathlib import Path

from onnx_optshift import journal

LONGEST_NAME = 255  # bytes, on nearly every file system
_REST = re.compile(r"(\d+)-[0-9a-f]{12}\.tmp")


def beside(path: Path) -> Path:
    """An unused hidden name in the same folder, so that a rename to `path` stays within one file system.

    What killed runs have left for the same `path` is removed on the way.

    Args:
        path: The final place.
    """
    start = f".{cut(path.name, 100)}.{_tag(path.name)}-"
    _sweep(path.parent, start)
    temporary = path.with_name(f"{start}{os.getpid()}-{secrets.token_hex(6)}.tmp")
    journal.unfinished(temporary)
    return temporary


def cut(name: str, length: int) -> str:
    """A file name's start.

    Args:
        name: The whole name.
        length: In bytes of UTF-8, which is what file systems count.
    """
    return name.encode("utf-8", "surrogateescape")[:length].decode("utf-8", "ignore")


def _tag(name: str) -> str:
    """Tells names with the same start apart, and machines and containers that share a folder: 8 hexadecimal digits.

    A process number says nothing about processes elsewhere, whose unfinished files are none of our business.
    """
    where = ""
    if hasattr(os, "uname"):
        where = os.uname().nodename
    with suppress(OSError):
        where += os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{where}/{name}'.encode('utf-8', 'surrogateescape')):08x}"


def _sweep(folder: Path, start: str) -> None:
    """Removes temporary files whose process is dead."""
    if os.name != "posix":  # elsewhere asking whether a process lives may end it
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            rest = _REST.fullmatch(entry.name.removeprefix(start)) if entry.name.startswith(start) else None
            if rest and not _lives(int(rest[1])):
                with suppress(OSError):
                    os.unlink(entry.path)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no number that a process can have: not ours to judge
        return True
    with suppress(OSError, IndexError):  # dead, and nobody has asked for its status yet
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return True
