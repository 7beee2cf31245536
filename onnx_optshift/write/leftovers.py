"""Work names: hidden, and telling whose they are, so that whatever an unfinished run leaves can be found and removed.

What exists of a work name is removed by the run itself, by the process that waits for it, or by a later run that finds
it left by a dead process. Data files get their final names before their model has its own (see `write.atomic`); they
are claimed in a list first. What is claimed is removed too, unless another file mentions it by then.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from onnx_optshift import journal

# What may exist of a work name: a scratch folder, the file, a data file that is being written, the list of claims.
FOLDER, FILE, DATA, CLAIMS = "", ".new", ".data", ".claims"
# Protobuf allows no larger message, so a larger file is no model.
_LARGEST_MODEL: Final = 2**31


def work_name(folder: Path) -> Path:
    """A hidden name in a folder that nobody has; what dead processes have left there is removed on the way."""
    _sweep(folder)
    name = folder / f"{_owner()}{os.getpid()}-{secrets.token_hex(6)}"
    journal.unfinished(name)
    return name


def scratch_folder() -> Path:
    """A new folder in the system's place for temporary files, for `remove`.

    Raises:
        OSError: The system refuses.
    """
    folder = work_name(Path(tempfile.gettempdir()))
    folder.mkdir(0o700)
    return folder


def part(name: Path, suffix: str) -> Path:
    """The file or folder of a work name with one of the suffixes above."""
    return name.with_name(name.name + suffix)


def claim(name: Path, location: str) -> None:
    """Notes that the data file of a work name, or a folder for it, is about to be put at `location` beside it.

    Raises:
        OSError: The system refuses.
    """
    status = part(name, DATA).stat()
    # A rename keeps both numbers, and what somebody else puts in its place has others.
    with part(name, CLAIMS).open("a", encoding="utf-8") as file:
        file.write(json.dumps([location, status.st_ino, status.st_mtime_ns]) + "\n")


def remove(name: Path) -> None:
    """Removes all there is of a work name, and what is claimed for it and mentioned by no other file."""
    for suffix in (FOLDER, FILE, DATA):
        path = part(name, suffix)
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    claims = part(name, CLAIMS)
    with suppress(OSError):
        for line in reversed(claims.read_text(encoding="utf-8").splitlines()):
            with suppress(OSError, ValueError):  # it was not made, is not empty, or may be needed; or half a line
                location, inode, modified = json.loads(line)
                path = name.parent / location
                if path.is_dir():
                    path.rmdir()
                elif (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, modified):
                    remove_unneeded(name.parent, location, since=modified, ignoring=claims)
        claims.unlink()


def remove_unneeded(folder: Path, location: str, *, since: int = 0, ignoring: Path | None = None) -> None:
    """Removes a data file unless a file in its models' folder mentions it: a copy of the model, or another run's.

    External data is only ever found in a model's own folder, so models elsewhere cannot need it.

    Args:
        folder: Of the models.
        location: The data file as models there spell it.
        since: Files that have not changed since then [ns] do not count: they cannot mention what was not there.
        ignoring: A file that does not count.

    Raises:
        OSError: A file cannot be read or removed; then it stays.
    """
    path = folder / location
    for other in folder.iterdir():
        with suppress(FileNotFoundError):  # gone by now, or a link that leads nowhere
            status = other.stat()
            if max(status.st_mtime_ns, status.st_ctime_ns) >= since and other not in {path, ignoring}:
                with content(other) as text:
                    if text.find(location.encode("utf-8", "surrogateescape")) >= 0:
                        return
    path.unlink()


@contextmanager
def content(path: Path) -> Iterator[mmap.mmap | bytes]:
    """What a file holds, mapped; nothing for what cannot be a model.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file() or not 0 < path.stat().st_size < _LARGEST_MODEL:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def _owner() -> str:
    """The start of all work names of this machine or container.

    A process number says nothing about processes elsewhere, whose unfinished files are none of our business.
    """
    where = os.uname().nodename if hasattr(os, "uname") else ""
    with suppress(OSError):
        where += os.readlink("/proc/self/ns/pid")
    return f".onnx-optshift-{zlib.crc32(where.encode('utf-8', 'surrogateescape')):08x}-"


def _sweep(folder: Path) -> None:
    """Removes what dead processes have left. Of this user only: nobody else's claims may have us remove a file."""
    if os.name != "posix":  # elsewhere asking whether a process lives may end it
        return
    pattern = re.compile(rf"({re.escape(_owner())}(\d+)-[0-9a-f]{{12}})(|{FILE}|{DATA}|{CLAIMS})")
    found = set()
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and entry.stat(follow_symlinks=False).st_uid == os.geteuid() and not _lives(int(match[2])):
                found.add(match[1])
    for name in found:
        remove(folder / name)


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
