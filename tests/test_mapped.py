"""Arrays in files: the same content, no memory, and no space once they are gone."""

import gc
import os
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnx_optshift.errors import InputError
from onnx_optshift.run import mapped
from onnx_optshift.run.mapped import MappedStore


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
@pytest.mark.parametrize("order", ["C", "F"])
def test_content_dtype_and_shape_stay(dtype, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, (3, 70, 301)).astype(dtype), order=order)
    kept = MappedStore().keep(array)
    assert kept is not array
    assert kept.dtype == array.dtype
    assert np.array_equal(kept, array)
    assert not kept.flags.writeable


def test_small_arrays_and_objects_stay_as_they_are():
    store = MappedStore()
    for array in (np.zeros(10), np.array(["a", "b" * 10**5], dtype=object)):
        assert store.keep(array) is array


def test_arrays_outlive_the_next_file_and_the_store(monkeypatch):
    monkeypatch.setattr(mapped, "SEGMENT", 1 << 16)
    store = MappedStore()
    arrays = [np.full(1 << 14, number, np.float32) for number in range(5)]  # each fills a file
    kept = [store.keep(array) for array in arrays]
    store.let_go()
    del store
    gc.collect()
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_space_and_pages_are_given_back(monkeypatch):
    monkeypatch.setattr(mapped, "SEGMENT", 1 << 20)
    size = 1 << 26
    store = MappedStore()
    kept = store.keep(np.ones(size, np.uint8))
    before = _resident()
    assert int(kept.sum(dtype=np.int64)) == size
    assert _resident() - before > size / 2  # negative control: what is read is resident
    store.let_go()
    assert _resident() - before < size / 4
    assert len(_open_files()) == 1
    del kept
    store.keep(np.ones(1 << 20, np.uint8))  # the next file
    gc.collect()
    assert sum(_open_files()) < size


def _resident() -> int:
    """Bytes of mapped files in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def _open_files() -> set[int]:
    """Sizes of temporary files that are open, told apart by their inode."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target, status = os.readlink(entry), entry.stat()
        except OSError:
            continue
        if target.startswith(tempfile.gettempdir()) and target.endswith("(deleted)") and status.st_size >= 1 << 20:
            found[status.st_ino] = status.st_size
    return set(found.values())


def test_a_full_disk_is_one_message(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(InputError, match=r"No space left on device. Free some space, or name another folder in TMPDIR"):
        MappedStore().keep(np.zeros(10**5))
