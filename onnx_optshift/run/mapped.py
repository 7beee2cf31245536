"""Arrays that live in a file: the system loads their pages when they are read, and drops them when it needs the room.

What a run holds for a model of gigabytes (new weights, reference outputs) is as large as the model itself. Here it
costs disk space and no memory that could not be given up at any time.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.errors import InputError

# Arrays share files of at least this size, as each file costs a descriptor. The space is taken as it is filled.
SEGMENT = 1 << 28
# Smaller arrays stay in memory: a page of a file each would save nothing.
MAPPED_FROM = 1 << 14
_ALIGNMENT = 4096


class MappedStore:
    """Puts arrays into nameless temporary files. The space is free again once no array of a file is alive.

    The files lie in the system's folder for temporary files (`TMPDIR`).
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None
        self._close: Callable[[], object] = lambda: None
        self._used = 0
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def keep(self, array: NDArray[Any], least: int = MAPPED_FROM) -> NDArray[Any]:
        """The same array, read only, in a file; those of fewer bytes, and of Python objects, as they are.

        Raises:
            InputError: There is no space left for it.
        """
        if array.nbytes < least or array.dtype.hasobject:
            return array
        data = np.ascontiguousarray(array)
        try:
            if self._map is None or self._used + data.nbytes > len(self._map):
                self._open(max(SEGMENT, data.nbytes))
            assert self._file is not None
            assert self._map is not None
            self._file.seek(self._used)
            # Written, not copied into the mapping: pages written there count as this process's own.
            self._file.write(data.reshape(-1).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: {data.nbytes} bytes of a model's new weights or outputs cannot be put "
                f"there: {error.strerror or error}. Free some space, or name another folder in TMPDIR."
            ) from error
        flat = np.frombuffer(self._map, np.uint8, data.nbytes, self._used)
        self._used += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
        return flat.view(data.dtype).reshape(data.shape)

    def let_go(self) -> None:
        """Takes the pages that were read so far out of this process, where the system can; the arrays stay valid."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in list(self._maps):
                mapping.madvise(mmap.MADV_DONTNEED)

    def free_space(self) -> int:
        """Bytes that there is room for on disk."""
        return shutil.disk_usage(tempfile.gettempdir()).free

    def _open(self, size: int) -> None:
        """Starts the next file; the last one stays as long as its arrays do."""
        self._close()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the next call, or with the store
        self._close = weakref.finalize(self, self._file.close)
        self._file.truncate(size)  # a hole: takes no space yet
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        self._maps.add(self._map)
        self._used = 0
