"""The example models are what their SOURCE.md says."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
# Held-out accuracy: about a point below what a first training reached, so that another torch version's roundings pass.
FLOORS = {"digits_mlp": 0.95, "digits_transformer": 0.94, "digits_cnn": 0.94, "noisy_mlp": 0.80}
FILES = ("model.onnx", "calibration.npz", "heldout.npz")


def stated_accuracy(folder, part):
    return float(re.search(rf"^\| {part} \| ([0-9.]+) \|$", (folder / "SOURCE.md").read_text(), re.MULTILINE)[1])


def stated_files(folder):
    """{file name: (bytes, sha256)}"""
    rows = re.findall(r"^\| (\S+) \| (\d+) \| ([0-9a-f]{64}) \|$", (folder / "SOURCE.md").read_text(), re.MULTILINE)
    return {name: (int(size), digest) for name, size, digest in rows}


def found_files(folder):
    contents = {name: (folder / name).read_bytes() for name in FILES}
    return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}


def accuracy(folder, part, corrupt=lambda model: None):
    model = onnx.load(folder / "model.onnx")
    corrupt(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with np.load(folder / f"{part}.npz") as data:
        (scores,) = session.run(None, {i.name: data[i.name] for i in session.get_inputs()})
        return float((scores.argmax(axis=1) == data["labels"]).mean())


def architecture(folder):
    model = onnx.load(folder / "model.onnx")
    nodes = [(n.op_type, n.name, list(n.input), [(a.name, str(a)) for a in n.attribute]) for n in model.graph.node]
    return nodes, [(t.name, t.data_type, tuple(t.dims)) for t in model.graph.initializer]


def test_every_folder_has_a_floor():
    assert {folder.name for folder in MODELS.iterdir() if folder.is_dir()} >= FLOORS.keys()


@pytest.mark.parametrize("name", FLOORS)
def test_model_is_valid_and_named(name):
    model = onnx.load(MODELS / name / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert model.doc_string
    with np.load(MODELS / name / "calibration.npz") as seen, np.load(MODELS / name / "heldout.npz") as unseen:
        assert set(seen) == set(unseen) == {model.graph.input[0].name, "labels"}
        assert seen["labels"].dtype == unseen["labels"].dtype == np.int64
        key = model.graph.input[0].name
        known = {row.tobytes() for row in seen[key]}
        assert not any(row.tobytes() in known for row in unseen[key])  # never mixed
        assert any(row.tobytes() in known for row in seen[key][:1])  # the comparison can find a row


@pytest.mark.parametrize("name", FLOORS)
def test_source_matches_files(name, tmp_path):
    assert set(stated_files(MODELS / name)) == set(FILES)
    assert found_files(MODELS / name) == stated_files(MODELS / name)
    assert sum(file.stat().st_size for file in (MODELS / name).iterdir()) < 2**20
    for file in FILES:
        content = bytearray((MODELS / name / file).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / file).write_bytes(content)
    assert found_files(tmp_path) != stated_files(MODELS / name)


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.parametrize("part", ["calibration", "heldout"])
def test_stated_accuracy_is_reached(name, part):
    folder = MODELS / name
    stated = stated_accuracy(folder, part.replace("heldout", "held-out"))
    # A tie or two may fall the other way on another processor.
    assert accuracy(folder, part) == pytest.approx(stated, abs=2 / 797)
    if part == "heldout":
        assert stated >= FLOORS[name]


@pytest.mark.parametrize("name", FLOORS)
def test_accuracy_comes_from_the_weights(name):
    def zero_classifier(model):
        # The last float matrix is the classifier in every graph.
        weight = [t for t in model.graph.initializer if len(t.dims) == 2][-1]
        weight.raw_data = bytes(len(weight.raw_data))

    assert accuracy(MODELS / name, "heldout", zero_classifier) < 0.3


def test_noise_is_in_the_calibration_labels_only():
    clean, noisy = (np.load(MODELS / name / "calibration.npz") for name in ("digits_mlp", "noisy_mlp"))
    np.testing.assert_array_equal(clean["pixels"], noisy["pixels"])
    assert np.mean(clean["labels"] != noisy["labels"]) == pytest.approx(0.2)
    clean, noisy = (np.load(MODELS / name / "heldout.npz") for name in ("digits_mlp", "noisy_mlp"))
    np.testing.assert_array_equal(clean["labels"], noisy["labels"])
    assert stated_accuracy(MODELS / "noisy_mlp", "calibration") > 0.99
    assert "wrong on purpose" in (MODELS / "noisy_mlp" / "SOURCE.md").read_text()
    assert "wrong on purpose" not in (MODELS / "digits_mlp" / "SOURCE.md").read_text()


def test_forms_of_linear_layers():
    def attributes(name, op_type, attribute):
        nodes = [n for n in onnx.load(MODELS / name / "model.onnx").graph.node if n.op_type == op_type]
        return [a.i or list(a.ints) for n in nodes for a in n.attribute if a.name == attribute]

    assert attributes("digits_mlp", "Gemm", "transB") == [1, [], 1]  # 0 reads as []
    assert attributes("digits_cnn", "Conv", "group") == [1, 1, 32, 1]
    assert attributes("digits_cnn", "Conv", "strides")[1] == [2, 2]
    nodes = onnx.load(MODELS / "digits_transformer" / "model.onnx").graph.node
    readers = [n.input[0] for n in nodes if n.name in {f"attention.{part}.matmul" for part in "qkv"}]
    assert readers == ["attention.norm"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_rebuild(name, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "make_models.py"), name, "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    rebuilt = tmp_path / name
    assert architecture(rebuilt) == architecture(MODELS / name)
    for part in ("calibration", "heldout"):
        with np.load(rebuilt / f"{part}.npz") as new, np.load(MODELS / name / f"{part}.npz") as old:
            assert set(new) == set(old)
            for key in old:
                np.testing.assert_array_equal(new[key], old[key])
    assert accuracy(rebuilt, "heldout") >= FLOORS[name]
    assert found_files(rebuilt) == stated_files(rebuilt)
