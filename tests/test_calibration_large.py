"""Files larger than memory: rows are read in pieces, again on every pass, and are the same samples."""

import subprocess
import sys
import tracemalloc
import zipfile
from collections import deque

import ml_dtypes
import numpy as np
import pytest
from calibration_cases import write_safetensors

from onnx_optshift.calibration import files
from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
from onnx_optshift.errors import InputError

ROWS, WIDTH = 300, 10_000
X = InputSpec("x", np.dtype(np.float32), ("n", WIDTH))
IDS = InputSpec("ids", np.dtype(np.int64), ("n",))
PIECE = 1 << 20


def arrays():
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)  # 12 MB
    return {"x": x, "ids": np.arange(ROWS), "labels": np.arange(ROWS) % 7}


def npz(folder, data):
    np.savez(folder / "a.npz", **data)
    return folder / "a.npz"


def npz_in_a_folder(folder, data):
    (folder / "many").mkdir()
    np.savez(folder / "many" / "0.npz", **data)
    return folder / "many"


def npy_by_name(folder, data):
    (folder / "columns").mkdir()
    for name, array in data.items():
        np.save(folder / "columns" / f"{name}.npy", array)
    return folder / "columns"


def compressed(folder, data):
    np.savez_compressed(folder / "a.npz", **data)
    return folder / "a.npz"


def in_columns(folder, data):
    return npz(folder, {name: np.asfortranarray(array) for name, array in data.items()})


LARGE = [npz, npz_in_a_folder, npy_by_name, write_safetensors]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", PIECE)


def peak(use):
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    use()
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("write", [*LARGE, compressed])
def test_a_large_file_takes_the_memory_of_a_piece(write, tmp_path):
    source = write(tmp_path, arrays())
    tracemalloc.start()
    try:
        found = []
        peaks = [peak(lambda: found.append(load([source], [X, IDS])))]
        (samples,) = found
        peaks += [peak(lambda: deque(samples.batches(8), maxlen=0)), peak(lambda: samples.fingerprint)]
        if write is compressed:  # negative control: a format that has to be read whole
            assert peaks[0] > 12e6
        else:
            assert max(peaks) < 6 * PIECE
            assert peak(lambda: list(samples.batches(8))) > 12e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("write", [*LARGE, in_columns])
def test_they_are_the_samples_that_the_arrays_are_in_memory(write, tmp_path):
    data = arrays()
    samples, same = load([write(tmp_path, data)], [X, IDS]), load([data], [X, IDS])
    assert len(samples._parts) > 10
    assert (len(samples), samples.notes, samples.classes) == (ROWS, [], 7)
    assert samples.fingerprint == same.fingerprint
    np.testing.assert_array_equal(samples.labels, data["labels"])
    order = np.random.default_rng(1).permutation(ROWS)[:50]
    for batch, other in zip(samples.select(order).batches(8), same.select(order).batches(8), strict=True):
        np.testing.assert_array_equal(batch.feeds["x"], other.feeds["x"])
        np.testing.assert_array_equal(batch.labels, other.labels)


def test_one_large_array_without_a_name_and_of_another_type(tmp_path):
    data = arrays()["x"].astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "a.npy", data)  # which numpy saves without the type's name
    spec = InputSpec("x", np.dtype(ml_dtypes.bfloat16), ("n", WIDTH))
    samples = load([tmp_path / "a.npy"], [spec])
    assert len(samples._parts) > 5
    assert samples.fingerprint == load([data], [spec]).fingerprint
    samples = load([write_safetensors(tmp_path, {"x": data})], [spec])
    assert samples.fingerprint == load([data], [spec]).fingerprint
    wide = data.astype(">f8")
    np.save(tmp_path / "b.npy", wide)
    samples = load([tmp_path / "b.npy"], [X])
    assert samples.notes == ["'x': float64 converted to float32"]
    assert samples.fingerprint == load([wide.astype(np.float32)], [X]).fingerprint


def test_what_is_one_feed_is_not_cut(tmp_path):
    scalar = InputSpec("rate", np.dtype(np.int64), ())
    data = {"x": arrays()["x"], "rate": np.array(3)}
    np.savez(tmp_path / "a.npz", **data)
    (batch,) = load([tmp_path / "a.npz"], [X, scalar]).batches(8)
    np.testing.assert_array_equal(batch.feeds["x"], data["x"])
    mixed = [InputSpec("x", X.dtype, ("nodes", WIDTH)), InputSpec("e", IDS.dtype, ("edges",))]
    np.savez(tmp_path / "b.npz", x=data["x"], e=np.arange(9))
    assert len(load([tmp_path / "b.npz"], mixed)) == 1


def test_faults_are_found_in_every_piece_and_named_by_their_place_in_the_file(tmp_path):
    data = arrays()
    data["x"][231, 7] = np.nan
    with pytest.raises(InputError, match=r"a\.npz: 'x' holds 1 values that are NaN or infinite, first in sample 231"):
        load([npz(tmp_path, data)], [X, IDS])
    path = npz(tmp_path, arrays())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("x.npy").header_offset + 10_000_000
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"Bad CRC-32 for file 'x\.npy'"):
        load([path], [X, IDS])
    path.write_bytes(content[:-2_000_000])
    with pytest.raises(InputError, match=r"cannot be read as a \.npz file"):
        load([path], [X, IDS])


def test_python_objects_in_large_files_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([None] * PIECE, object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array(["text"] * PIECE, object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match=f"{name}: cannot be read.*[Oo]bjects"):
            load([tmp_path / name], [X])


@pytest.mark.parametrize(
    "change", [lambda data: {k: v[:-1] for k, v in data.items()}, lambda data: data | {"ids": data["x"]}]
)
def test_a_file_that_changes_while_it_is_in_use_is_an_error(change, tmp_path):
    path = npz(tmp_path, arrays())
    samples = load([path], [X, IDS])
    np.savez(path, **change(arrays()))
    with pytest.raises(InputError, match=r"a\.npz"):
        deque(samples.batches(8), maxlen=0)


RESIDENT = """
import sys
import numpy as np
from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

before = peak()
source = np.load(sys.argv[1]) if sys.argv[2] == "memory" else sys.argv[1]
samples = load([source], [InputSpec("x", np.dtype(np.float32), ("n", 1024))])
for batch in samples.batches(32):
    assert float(batch.feeds["x"].max()) == 1.0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_is_not_resident(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (40_000, 1024))  # 164 MB
    array[:, ::64] = 1
    array.flush()
    del array
    grown = {}
    for way in ("file", "memory"):
        command = [sys.executable, "-c", RESIDENT, str(tmp_path / "x.npy"), way]
        grown[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown["file"] < 100e6  # some pieces of 16 MiB
    assert grown["memory"] > 164e6  # negative control
