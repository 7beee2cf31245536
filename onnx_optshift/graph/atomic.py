"""Files that appear whole or not at all: written beside their final place, then renamed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from onnx_optshift import journal
from onnx_optshift.errors import InputError


@dataclass
class Written:
    """A finished model file beside its final place, with the data files it refers to.

    Data files have their final names already, so that the model can be loaded and tried before it gets its own. Those
    names are never in use before (they hold a hash of the content), so nobody misses them when all is discarded.

    Attributes:
        temp_path: The model; gone after `commit` or `discard`.
        final_path: Where `commit` puts it.
        data_files: External data files that were written for it.
        after: What is to be done once the model is in place.
    """

    temp_path: Path
    final_path: Path
    data_files: list[Path] = field(default_factory=list)
    after: Callable[[], None] = lambda: None
    _open: bool = True
    _renaming: bool = False

    def claim(self, data_file: Path) -> None:
        """Takes a data file's final name, before the file gets it."""
        journal.unfinished(data_file)
        self.data_files.append(data_file)

    def commit(self) -> None:
        """Puts the model in place, in one step that cannot be seen half done.

        Raises:
            InputError: The system refuses; nothing is left behind.
        """
        if not self._open:
            return
        try:
            with system_errors(self.final_path):
                if self.final_path.exists():
                    # A rewritten file keeps its permissions, as it would if it were written in place.
                    os.chmod(self.temp_path, stat.S_IMODE(self.final_path.stat().st_mode))
                sync(self.temp_path)
                # The names of the data files must be on disk before a model refers to them.
                for folder in {path.parent for path in self.data_files}:
                    sync_folder(folder)
                self._renaming = True
                journal.placing(self.temp_path, self.final_path, self.data_files)
                os.replace(self.temp_path, self.final_path)
                self._open = False
                sync_folder(self.final_path.parent)
            self.after()
        finally:
            self.discard()

    def discard(self) -> None:
        """Removes everything that was written. Does nothing once committed."""
        if not self._open:
            return
        self._open = False
        if self._renaming and not self.temp_path.exists():
            return  # interrupted just behind the rename: the model is in place and needs its data
        for path in (self.temp_path, *self.data_files):
            with suppress(OSError):
                path.unlink()
        journal.removed(self.temp_path, *self.data_files)

    def __enter__(self) -> Written:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()


def check_target(path: Path) -> None:
    """Insists that a file can be put at `path`.

    Raises:
        InputError: Its folder does not exist, or something else than a regular file is there.
    """
    with system_errors(path):
        if not path.parent.is_dir():
            raise InputError(f"{path}: its folder {path.parent} does not exist. Create it, or choose another.")
        # Also devices: renaming over /dev/null would take it away from everybody.
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: exists and is not a regular file. Choose another output path.")


def sync(path: Path) -> None:
    """Waits until a file's content is on disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk, where the system can do that."""
    with suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns what the system says while writing `path` into one message.

    Args:
        path: The file that was asked for.

    Raises:
        InputError: The system refused.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path}: cannot be written: {reason}. Nothing was written. Free some space, or choose another output path."
        ) from error
