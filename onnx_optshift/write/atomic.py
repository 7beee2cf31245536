"""Files that appear whole or not at all: written beside their final place under a hidden name, then renamed.

External data must lie in its model's folder, may not be a link, and much of it may be shared with the original. So a
model can only be loaded and tried where it is going to be, under another name, with its new data files in their final
places. Their names hold a hash of the content, and nobody refers to them before the model is in place.

A hidden name has a record, made first and removed last, which lists those data files before they get there. It is
locked as long as its process lives. What a run cannot remove itself (a crash, a kill) is removed by the process that
waits for it; what that cannot (a power cut), by the next run that finds the record without its lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Final, Self

from onnx_optshift import journal
from onnx_optshift.errors import InputError

if sys.platform != "win32":
    import fcntl

_HOST = os.uname().nodename if sys.platform != "win32" else ""
# Locks say nothing about processes on other machines, whose unfinished files are none of our business.
_PREFIX: Final = f".onnx-optshift-{zlib.crc32(_HOST.encode('utf-8', 'surrogateescape')):08x}-"
_HASH: Final = 16  # hexadecimal digits of SHA-256
_LONGEST_NAME: Final = 255  # bytes, on nearly every file system
# Protobuf allows no larger message, so a larger file is no model.
_LARGEST_MODEL: Final = 2**31
_FREE = "Free some space, or choose another output path."
_ALLOWED = "Choose a folder that you may write to."
_HINTS: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FREE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ALLOWED),
}


class Written:
    """A file that is not in its final place yet, with the data files that it refers to. Discarded unless committed.

    Attributes:
        temp_path: The file, in its final folder; the caller writes it.
        temp_data: Where a data file is written, for `place_data`.
        temp_folder: For what is not to be kept; the caller makes it.
        final_path: Where `commit` puts the file.
    """

    def __init__(self, final_path: Path) -> None:
        self.final_path = final_path
        _sweep(final_path.parent)
        while True:
            self._record = final_path.parent / f"{_PREFIX}{secrets.token_hex(6)}"
            journal.hidden(self._record)
            self._file = self._record.open("xb", buffering=0)
            with suppress(OSError):  # a file system without locks: then it is never swept
                lock(self._file, wait=True)
            if os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()  # somebody's sweep has come between
        self.temp_path, self.temp_data, self.temp_folder = _parts(self._record)

    def place_data(self, location: str) -> None:
        """Gives the file at `temp_data` its final name, relative to the model's folder; drops it if an equal one is.

        Raises:
            InputError: A file of other content has that name.
            OSError: The system refuses.
        """
        home = self.final_path.parent
        final = home / location
        if final.exists():
            if digest(final) != digest(self.temp_data):
                raise InputError(
                    f"{final}: exists with other content, and the model needs external data of that name. Choose an "
                    "empty folder, or --save-as-external-data."
                )
            self.temp_data.unlink()
            return
        sync(self.temp_data)
        for folder in reversed(final.parents):
            if not folder.exists():
                self._claim(folder.relative_to(home).as_posix())
                folder.mkdir()
        self._claim(location)
        os.replace(self.temp_data, final)
        sync(final.parent)  # the name must be on disk before a model refers to it

    def commit(self) -> None:
        """Puts the file in place, in one step that cannot be seen half done. Does nothing once discarded.

        Data files of the model that was there before are removed where nobody else can need them.

        Raises:
            InputError: The system refuses; nothing is left behind.
        """
        if self._file.closed:
            return
        try:
            with system_errors(self.final_path):
                replaced = data_files(self.final_path)
                if self.final_path.exists():
                    # A rewritten file keeps its permissions, as it would if it were written in place.
                    os.chmod(self.temp_path, stat.S_IMODE(self.final_path.stat().st_mode))
                sync(self.temp_path)
                journal.renaming(self.temp_path, self.final_path)
                os.replace(self.temp_path, self.final_path)
                self._file.truncate(0)  # it has no claims any more
                sync(self.final_path.parent)
        finally:
            self.discard()
        for path in replaced:
            with suppress(OSError):
                if path.name == data_name(self.final_path, digest(path)):
                    _remove_unneeded(path.parent, path.name)

    def discard(self) -> None:
        """Removes everything that was written. Does nothing once committed."""
        if not self._file.closed:
            self._file.close()
            remove(self._record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def _claim(self, location: str) -> None:
        """Notes in the record that the data file, or a folder for it, is about to be put there."""
        status = self.temp_data.stat()
        # A rename keeps both numbers, and what somebody else puts in its place has others.
        self._file.write(json.dumps([location, status.st_ino, status.st_mtime_ns]).encode() + b"\n")


def remove(record: Path) -> None:
    """Removes all there is of a hidden name, and what its record claims unless another file mentions it by then."""
    *files, folder = _parts(record)
    for path in files:
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for line in reversed(record.read_bytes().splitlines()):
            with suppress(OSError, ValueError):  # it was not made, is not empty, or may be needed; or half a line
                location, inode, modified = json.loads(line)
                path = record.parent / location
                if path.is_dir():
                    path.rmdir()
                elif (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, modified):
                    _remove_unneeded(record.parent, location, record, modified)
        record.unlink()


def _remove_unneeded(folder: Path, location: str, record: Path | None = None, since: int = 0) -> None:
    """Removes a data file unless a file in its models' folder mentions it: a copy of the model, or another run's.

    External data is only ever found in a model's own folder, so models elsewhere cannot need it. Files that have not
    changed since then [ns] cannot mention what was not there. Where a file cannot be read the data stays.
    """
    data, mention = folder / location, location.encode("utf-8", "surrogateescape")
    for other in folder.iterdir():
        with suppress(FileNotFoundError):  # gone by now, or a link that leads nowhere
            status = other.stat()
            if max(status.st_mtime_ns, status.st_ctime_ns) >= since and other not in {data, record}:
                with _content(other) as text:
                    if text.find(mention) >= 0:
                        return
    data.unlink()


@contextmanager
def _content(path: Path) -> Iterator[mmap.mmap | bytes]:
    """What a file holds, mapped; nothing for what cannot be a model."""
    if not path.is_file() or not 0 < path.stat().st_size < _LARGEST_MODEL:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def _parts(record: Path) -> list[Path]:
    """What may exist of a hidden name beside its record: the file, a data file that is being written, a folder."""
    return [record.with_name(record.name + suffix) for suffix in (".new", ".data", ".folder")]


def lock(file: IO[bytes], *, wait: bool) -> None:
    """Holds a file as long as it is open, or fails where another process does, or the file system has no locks."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(folder: Path) -> None:
    """Removes what dead processes have left. Of this user only: nobody else's record may have us remove a file."""
    if sys.platform == "win32":  # nothing is locked there
        return
    pattern = re.compile(re.escape(_PREFIX) + "[0-9a-f]{12}")
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if pattern.fullmatch(path.name) and path.lstat().st_uid == os.geteuid():
                with suppress(OSError), path.open("r+b") as file:
                    lock(file, wait=False)
                    remove(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        InputError: The system refuses.
    """
    with system_errors(path), Written(path) as written:
        # Names in a model may hold halves of surrogate pairs, which UTF-8 refuses.
        written.temp_path.write_text(text, encoding="utf-8", errors="backslashreplace")
        written.commit()


def data_name(out: Path, content: str) -> str:
    """The name of a data file of the model `out`; `content` is the data file's `digest`."""
    return f"{_stem(out)}.{content[:_HASH]}.data"


def data_files(out: Path) -> list[Path]:
    """Data files with names of ours that the file at `out` mentions; none where it cannot be read."""
    names: set[bytes] = set()
    with suppress(OSError), _content(out) as content:
        names.update(re.findall(re.escape(_stem(out).encode()) + rb"\.[0-9a-f]{%d}\.data" % _HASH, content))
    return [path for name in names if (path := out.with_name(name.decode())).exists()]


def _stem(out: Path) -> str:
    """As much of a name as leaves room for the rest: in bytes, which file systems count, without half a character."""
    room = _LONGEST_NAME - _HASH - len("..data")
    return out.stem.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore")


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_target(path: Path) -> None:
    """Insists that a file can be put at `path`.

    Raises:
        InputError: Its folder does not exist or may not be written to, or something else than a regular file is there.
    """
    with system_errors(path):
        if not path.parent.is_dir():
            raise InputError(f"{path}: its folder {path.parent} does not exist. Create it, or choose another.")
        with suppress(FileNotFoundError):
            # Also devices: renaming over /dev/null would take it away from everybody.
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError(f"{path}: exists and is not a regular file. Choose another output path.")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(_refused(path, errno.EACCES, os.strerror(errno.EACCES)))


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns what the system says while writing `path` into one message.

    Raises:
        InputError: The system refused.
    """
    try:
        yield
    except OSError as error:
        raise InputError(_refused(path, error.errno, error.strerror or str(error))) from error


def _refused(path: Path, number: int | None, reason: str) -> str:
    hint = _HINTS.get(number or 0, "Choose another output path.")
    return f"{path}: cannot be written: {reason}. Nothing was changed there. {hint}"


def sync(path: Path) -> None:
    """Waits until a file's content is on disk, or the names in a folder where the system can do that."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # Windows opens no folders, some file systems sync none
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
