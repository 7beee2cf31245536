import json
import os

import numpy as np
import onnx
import pytest
from calibration_cases import (
    INPUTS,
    X,
    arrays,
    encoded,
    feeds,
    write_json,
    write_json_folder,
    write_npz,
    write_safetensors,
    write_test_sets,
)
from onnx import numpy_helper

from onnx_optshift.calibration.load import load
from onnx_optshift.errors import InputError

MUTATIONS = 200


def damaged(content, rng):
    """A file with a few flipped bits, a run of other bytes, or its end missing."""
    data = bytearray(content)
    kind = rng.integers(3)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        start = rng.integers(len(data))
        data[start : start + 8] = rng.bytes(8)
    else:
        del data[rng.integers(len(data)) :]
    return bytes(data)


def one_npy(folder, data):
    np.save(folder / "x.npy", data["x"])
    return folder / "x.npy"


def compressed(folder, data):
    np.savez_compressed(folder / "data.npz", **data)
    return folder / "data.npz"


def pb(folder, data):
    return next(write_test_sets(folder, {k: v[:1] for k, v in data.items()}).iterdir()) / "input_0.pb"


@pytest.mark.parametrize("write", [write_npz, compressed, one_npy, write_safetensors, write_json, pb])
def test_damaged_files_load_or_are_input_errors(write, tmp_path):
    path = write(tmp_path, arrays(labels=write is not pb))
    source = path.parent if write is pb else path
    inputs = [X] if write is one_npy else INPUTS
    load([source], inputs)
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(MUTATIONS):
        path.write_bytes(damaged(original, rng))
        try:
            samples = load([source], inputs)
        except InputError:
            refused += 1
            continue
        assert all(np.isfinite(batch.feeds["x"]).all() for batch in samples.batches(4))
    assert refused > MUTATIONS // 5  # the damage is real


def test_flipped_payload_of_a_npz_never_passes_for_data(tmp_path):
    path = write_npz(tmp_path, arrays())
    original = path.read_bytes()
    place = original.index(arrays()["x"].tobytes()[:8])
    for offset in range(0, 72, 5):
        path.write_bytes(
            original[: place + offset] + bytes([original[place + offset] ^ 1]) + original[place + offset + 1 :]
        )
        with pytest.raises(InputError, match="Bad CRC-32"):
            load([path], INPUTS)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.safetensors", "a.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"not data at all", b"PK\x03\x04", b"\x93NUMPY", b"[]", b"[1]", b"{}"]
)
def test_files_of_another_kind(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load([tmp_path / name], [X])


def test_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    np.savez(tmp_path / "a.npz", x=np.array([Trap()], dtype=object))
    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    for name in ("a.npz", "a.npy"):
        with pytest.raises(InputError, match="objects are never loaded"):
            load([tmp_path / name], [X])
    assert not (tmp_path / "sprung").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as trap:
        _ = trap["x"]
    assert (tmp_path / "sprung").exists()  # the trap works where it is let


def test_npz_and_npy_under_each_others_name_are_what_they_hold(tmp_path):
    np.save(tmp_path / "a.npy", arrays()["x"])
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    write_npz(tmp_path, {"x": arrays()["x"]}).rename(tmp_path / "b.npy")
    assert load([tmp_path / "a.npz"], [X]).fingerprint == load([tmp_path / "b.npy"], [X]).fingerprint


def test_a_json_file_may_hold_one_feed(tmp_path):
    data = feeds(arrays())[0]
    (tmp_path / "one.json").write_text(json.dumps({name: encoded(array) for name, array in data.items()}))
    assert load([tmp_path / "one.json"], INPUTS).fingerprint == load([[data]], INPUTS).fingerprint


@pytest.mark.parametrize("value", [[1.0, 2.0], {"array": 3, "polygraphy_class": "ndarray"}, None])
def test_json_that_is_no_encoded_array(value, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"x": value}]))
    with pytest.raises(InputError, match="'x' is not an encoded array"):
        load([tmp_path / "a.json"], [X])


def test_a_json_folder_may_hold_lists(tmp_path):
    data = arrays()
    folder = write_json_folder(tmp_path, data)
    write_json(folder, data).rename(folder / "99.json")
    samples = load([folder], INPUTS)
    assert len(samples) == 12
    assert samples.select(range(6)).fingerprint == samples.select(range(6, 12)).fingerprint


def save_pb(path, array, name=""):
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def test_a_tensor_belongs_to_the_input_it_is_named_as(tmp_path):
    data = feeds(arrays())[0]
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    save_pb(folder / "input_0.pb", data["ids"], "ids")
    save_pb(folder / "input_1.pb", data["x"], "x")
    assert load([folder], INPUTS).fingerprint == load([[data]], INPUTS).fingerprint
    save_pb(folder / "input_1.pb", data["x"], "unknown to the model")
    with pytest.raises(InputError, match="a second tensor for input 'ids'"):
        load([folder], INPUTS)
    save_pb(folder / "input_0.pb", data["x"])
    save_pb(folder / "input_1.pb", data["ids"])
    save_pb(folder / "input_2.pb", data["ids"])
    with pytest.raises(InputError, match="a tensor for input 2, but the model has 2 inputs"):
        load([folder], INPUTS)
    (folder / "input_2.pb").unlink()
    (folder / "input_1.pb").unlink()
    with pytest.raises(InputError, match="array 'ids' missing"):
        load([folder], INPUTS)


def test_a_tensor_that_points_to_another_file_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(12))
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[1, 3], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(InputError, match="lies in another file"):
        load([tmp_path], [X])
