import itertools
import subprocess
import sys
import tracemalloc
from collections import deque

import numpy as np
import pytest
from calibration_cases import (
    FILES,
    FILES_WITHOUT_LABELS,
    INPUTS,
    PYTHON,
    Reader,
    X,
    arrays,
    feeds,
    write_json_folder,
    write_npz,
    write_npz_folder,
    write_test_sets,
)

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import beside, load
from onnx_optshift.errors import InputError


@pytest.mark.parametrize("kind", FILES | FILES_WITHOUT_LABELS)
def test_every_kind_of_file_gives_the_same_samples(kind, tmp_path):
    data = arrays(labels=kind in FILES)
    samples = load([(FILES | FILES_WITHOUT_LABELS)[kind](tmp_path, data)], INPUTS)
    same_as_memory(samples, data)


@pytest.mark.parametrize("kind", PYTHON)
def test_every_kind_of_object_gives_the_same_samples(kind):
    data = arrays(labels=True)
    same_as_memory(load([PYTHON[kind](data)], INPUTS), data)


def same_as_memory(samples, data):
    assert len(samples) == 6
    assert samples.fingerprint == load([data], INPUTS).fingerprint
    for _ in range(2):  # re-iterable, whatever it came from
        batches = list(samples.batches(4))
        for name in ("x", "ids"):
            np.testing.assert_array_equal(np.concatenate([batch.feeds[name] for batch in batches]), data[name])
    if "labels" in data:
        np.testing.assert_array_equal(samples.labels, data["labels"])
        assert samples.classes == 3
    else:
        assert samples.labels is None
    picked = samples.select([4, 0]).batches(1)
    np.testing.assert_array_equal(next(picked).feeds["x"], data["x"][[4]])
    assert not samples.synthetic
    assert not samples.notes


def test_chained_files_are_one_collection(tmp_path):
    data = arrays(labels=True)
    samples = load([write_npz(tmp_path, data), write_json_folder(tmp_path, data)], INPUTS)
    assert len(samples) == 12
    assert samples.source == f"{tmp_path / 'data.npz'}, {tmp_path / 'json'}"
    assert samples.select(range(6)).fingerprint == samples.select(range(6, 12)).fingerprint
    assert len(list(samples.batches(4))) == 2 + 6  # JSON holds feeds, which are run one by one


def test_one_array_for_a_model_with_one_input(tmp_path):
    x = arrays()["x"]
    np.save(tmp_path / "anything.npy", x)
    (tmp_path / "many").mkdir()
    for i in range(6):
        np.save(tmp_path / "many" / f"{i + 7}.npy", x[i : i + 1])
    prints = {load([s], [X]).fingerprint for s in (x, tmp_path / "anything.npy", tmp_path / "many", list(x[:, None]))}
    assert prints == {load([{"x": x}], [X]).fingerprint}
    for source in (x, tmp_path / "anything.npy", [x]):
        with pytest.raises(InputError, match="without a name, but the model has 2 inputs: x: float32"):
            load([source], INPUTS)


def test_samples_pass_through():
    samples = load([arrays()], INPUTS)
    assert load([samples], INPUTS) is samples
    with pytest.raises(InputError, match="not calibration data"):
        load([samples, arrays()], INPUTS)


@pytest.mark.parametrize("write", [write_npz_folder, write_json_folder, write_test_sets])
def test_folders_are_read_one_file_at_a_time(write, tmp_path):
    wide = InputSpec("x", X.dtype, ("batch", 250_000))  # 1 MB a sample
    folder = write(tmp_path, {"x": np.ones((12, 250_000), np.float32)})
    per_file = 8e6 if write is write_json_folder else 4e6  # text, its bytes and the array together

    def peak(use):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        use()
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        found = []
        assert peak(lambda: found.append(load([folder], [wide]))) < per_file
        (samples,) = found
        assert peak(lambda: deque(samples.batches(1), maxlen=0)) < per_file
        assert peak(lambda: samples.fingerprint) < per_file
        assert peak(lambda: list(samples.batches(1))) > 11e6  # what the bound looks like when every batch is kept
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays_given", "name", "message"),
    [
        (
            arrays(labels=True),
            "label",
            r"no array 'label' with labels.*found 'x', 'ids', 'labels'\. Close matches: 'lab",
        ),
        (arrays(), "y", r"data\.npz: no array 'y' with labels"),
        (arrays(labels=True), "ids", "no array 'ids' with labels. Expected it beside the model's inputs"),
    ],
)
def test_labels_that_were_asked_for_must_be_there(arrays_given, name, message, tmp_path):
    path = write_npz(tmp_path, arrays_given)
    assert load([path], INPUTS, labels_name=name).labels is None
    with pytest.raises(InputError, match=message):
        load([path], INPUTS, labels_name=name, labels_required=True)


def test_labels_that_were_asked_for_and_are_there():
    found = load([arrays(labels=True)], INPUTS, labels_name="labels", labels_required=True).labels
    np.testing.assert_array_equal(found, arrays(labels=True)["labels"])


def test_a_folder_file_damaged_later_is_an_input_error(tmp_path):
    folder = write_npz_folder(tmp_path, arrays())
    samples = load([folder], INPUTS)
    last = folder / "part_11.npz"
    original = last.read_bytes()
    last.write_bytes(original[:-30])
    with pytest.raises(InputError, match=f"{last.name}: cannot be read as a .npz file"):
        list(samples.batches(2))
    np.savez(last, **{name: np.concatenate([array] * 2) for name, array in arrays().items()})
    with pytest.raises(InputError, match="changed while it was in use"):
        _ = samples.fingerprint
    last.write_bytes(original)
    assert len(list(samples.batches(6))) == 1


def test_a_file_with_a_different_axis_in_each_input_is_one_feed(tmp_path):
    specs = [type(X)("x", X.dtype, ("nodes", 3)), type(X)("edges", np.dtype(np.int64), (2, "edges"))]
    for i, nodes in enumerate((4, 2, 7)):
        np.savez(tmp_path / f"{i}.npz", x=np.ones((nodes, 3), np.float32), edges=np.zeros((2, nodes + 1), int))
    samples = load([tmp_path], specs)
    assert [len(batch.feeds["x"]) for batch in samples.batches(64)] == [4, 2, 7]
    assert "one feed and counts as one sample" in samples.notes[0]


def test_nothing_given():
    for sources, inputs, text in (([], INPUTS, "x: float32"), ([arrays()], [], "no inputs")):
        with pytest.raises(InputError, match=text):
            load(sources, inputs)
    with pytest.raises(InputError, match="no such file"):
        load("data.npz", INPUTS)  # a lone path is not a list of letters


def test_missing_path_names_its_neighbours(tmp_path):
    write_npz(tmp_path, arrays())
    with pytest.raises(InputError, match=r"no such file or folder\. Close matches: 'data.npz'"):
        load([tmp_path / "date.npz"], INPUTS)


def test_unknown_and_mixed_folders(tmp_path):
    with pytest.raises(InputError, match="found 0 other entries"):
        load([tmp_path], INPUTS)
    write_npz(tmp_path, arrays())
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match=r"one kind of calibration data, found \.npz, \.json"):
        load([tmp_path], INPUTS)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(InputError, match="not read as calibration data"):
        load([tmp_path / "a.csv"], INPUTS)


def test_beside_takes_the_first_kind_there_is(tmp_path):
    model = tmp_path / "net.onnx"
    assert beside(model, INPUTS) == []
    sets = write_test_sets(tmp_path, arrays(12))
    for one in sets.iterdir():
        one.rename(tmp_path / one.name)
    (tmp_path / "test_data_set_99").mkdir()  # holds no inputs
    found = beside(model, INPUTS)
    assert [path.name for path in found] == [f"test_data_set_{i + 8}" for i in range(12)]  # 8, 9, 10: natural order
    same = load([arrays(12)], INPUTS).fingerprint
    assert load(found, INPUTS).fingerprint == same
    assert beside(model, [*INPUTS, X]) == []
    for name in ("calibration.npz", "net.calibration.npz"):
        np.savez(tmp_path / name, **arrays())
        assert beside(model, INPUTS) == [tmp_path / name]
    np.savez(tmp_path / "other.calibration.npz", **arrays())
    assert beside(model, INPUTS) == [tmp_path / "net.calibration.npz"]


def test_a_reader_is_read_once_and_to_its_end():
    reader = Reader(arrays())
    samples = load([reader], INPUTS)
    assert reader.get_next() is None
    assert len(list(itertools.chain(samples.batches(1), samples.batches(1)))) == 12
    with pytest.raises(InputError, match="gave no samples"):
        load([reader], INPUTS)


def test_feeds_in_python_may_hold_lists_and_scalars():
    specs = [X, type(X)("rate", np.dtype(np.int64), ())]
    samples = load([[{"x": [[1.0, 2, 3]], "rate": 16000}]], specs)
    assert samples.select([0]).batches(1).__next__().feeds["rate"].shape == ()
    assert len(feeds(arrays())) == 6


def test_importing_it_loads_numpy_alone():
    code = (
        "import sys\n"
        "from onnx_optshift.calibration import load, split, synthetic\n"
        "print(sorted({'onnx', 'torch', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['numpy']"
