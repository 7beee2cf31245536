"""Files that appear whole or not at all: written beside their final place under a work name, then renamed.

External data must lie in its model's folder, and the ONNX checker refuses hard links. So for a model to be loaded and
tried before its commit, its data files get their final names early. Those hold a hash of the content, and nobody refers
to them before the model is in place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from onnx_optshift import journal
from onnx_optshift.errors import InputError
from onnx_optshift.write import leftovers

_HASH: Final = 16  # hexadecimal digits of SHA-256
_LONGEST_NAME: Final = 255  # bytes, on nearly every file system
_FREE = "Free some space, or choose another output path."
_ALLOWED = "Choose a folder that you may write to."
_HINTS: Final = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.EROFS: _ALLOWED,
}


class Written:
    """A file that is not in its final place yet, with the data files that it refers to. Discarded unless committed.

    Attributes:
        temp_path: The file, in its final folder; gone after `commit` or `discard`.
        temp_data: Where a data file is written, for `place_data`.
        final_path: Where `commit` puts the file.
    """

    def __init__(self, final_path: Path) -> None:
        """Takes a work name; the caller writes `temp_path`."""
        self._name = leftovers.work_name(final_path.parent)
        self.temp_path = leftovers.part(self._name, leftovers.FILE)
        self.temp_data = leftovers.part(self._name, leftovers.DATA)
        self.final_path = final_path
        self._open = True
        self._data_folders: set[Path] = set()

    def place_data(self, location: str) -> None:
        """Gives the file at `temp_data` its final name, or drops it where an equal one is.

        Args:
            location: The final name, relative to the model's folder.

        Raises:
            InputError: A file of other content has that name.
            OSError: The system refuses.
        """
        final = self.final_path.parent / location
        if final.exists():
            if digest(final) != digest(self.temp_data):
                raise InputError(
                    f"{final}: exists with other content, and the model needs external data of that name. Choose an "
                    "empty folder, or --save-as-external-data."
                )
            self.temp_data.unlink()
            return
        _sync(self.temp_data)
        for folder in reversed(final.parents):
            if not folder.exists():
                leftovers.claim(self._name, folder.relative_to(self.final_path.parent).as_posix())
                folder.mkdir()
        leftovers.claim(self._name, location)
        os.replace(self.temp_data, final)
        self._data_folders.add(final.parent)

    def commit(self) -> None:
        """Puts the file in place, in one step that cannot be seen half done. Does nothing once discarded.

        Data files of the model that was there before are removed where nobody else can need them.

        Raises:
            InputError: The system refuses; nothing is left behind.
        """
        if not self._open:
            return
        try:
            with system_errors(self.final_path):
                replaced = data_files(self.final_path)
                if self.final_path.exists():
                    # A rewritten file keeps its permissions, as it would if it were written in place.
                    os.chmod(self.temp_path, stat.S_IMODE(self.final_path.stat().st_mode))
                _sync(self.temp_path)
                # The names of the data files must be on disk before a model refers to them.
                for folder in self._data_folders:
                    _sync_folder(folder)
                journal.placing(self.temp_path, self.final_path)
                os.replace(self.temp_path, self.final_path)
                leftovers.part(self._name, leftovers.CLAIMS).unlink(missing_ok=True)
                _sync_folder(self.final_path.parent)
            for path in replaced:
                with suppress(OSError):
                    if path.name == data_name(self.final_path, digest(path)):
                        leftovers.remove_unneeded(path.parent, path.name)
        finally:
            self.discard()

    def discard(self) -> None:
        """Removes everything that was written. Does nothing once committed."""
        if self._open:
            self._open = False
            leftovers.remove(self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


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
    with suppress(OSError), leftovers.content(out) as content:
        names.update(re.findall(re.escape(_stem(out).encode()) + rb"\.[0-9a-f]{%d}\.data" % _HASH, content))
    return [path for name in names if (path := out.with_name(name.decode())).exists()]


def _stem(out: Path) -> str:
    """As much of a name as leaves room for the rest: in bytes, which file systems count, without half a character."""
    room = _LONGEST_NAME - _HASH - len("..data")
    return out.stem.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore")


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal.

    Raises:
        OSError: It cannot be read.
    """
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


def _sync(path: Path) -> None:
    """Waits until a file's content is on disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk, where the system can do that."""
    with suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
