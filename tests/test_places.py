"""No run writes over what it reads, and over nothing but a model unless that is asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny

from onnx_optshift.cli import main

MODEL = Path(__file__).parent.parent / "models" / "digits_mlp"
READS = "this run reads it"
NO_MODEL = "exists and is no ONNX model. Was OUT left out, or a file named twice?"


@pytest.fixture(name="folder")
def fixture_folder(tmp_path, monkeypatch):
    """A model with calibration data beside it, data elsewhere, a script, and a model with external data."""
    shutil.copy(MODEL / "model.onnx", tmp_path)
    with np.load(MODEL / "calibration.npz") as data:
        few = {name: data[name][:100] for name in data.files}
    for name in ("calibration.npz", "other.npz", "data/more.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / name, **few)
    (tmp_path / "feeds.py").write_text("import numpy as np\ndef load():\n    return dict(np.load('other.npz'))\n")
    shutil.copy(MODEL / "model.onnx", tmp_path / "model.json")
    (tmp_path / "notes.txt").write_text("notes")
    tiny.save_external(tiny.two_layers(), tmp_path / "large.onnx", {"W1": "large.data", "W2": "large.data"})
    np.savez(tmp_path / "x.npz", x=tiny.weight(20, 4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.onnx calibration.npz", READS),  # found beside the model
        ("model.onnx calibration.npz --force", READS),
        ("model.onnx other.npz --calib other.npz", READS),
        ("model.onnx other.npz --heldout other.npz --force", READS),
        ("model.onnx data/more.npz --calib data --force", READS),
        ("model.onnx feeds.py --calib feeds.py:load --force", READS),
        ("model.onnx ../{here}/other.npz --calib other.npz --force", READS),
        ("large.onnx large.data --calib x.npz --force", READS),
        ("model.onnx new.onnx --report model.json --calib model.json", READS),
        ("model.json new.onnx --report model.json", READS),
        ("inspect model.onnx --calib model.json --report model.json", READS),
        ("verify model.onnx model.json --report model.json", READS),
        ("verify model.onnx model.onnx --baseline model.json --report model.json", READS),
        ("diagnose model.onnx --heldout model.json --report model.json", READS),
        ("model.onnx new.json --report new.json", "is OUT and --report at once"),
        ("model.onnx -", "a model cannot be written to standard output"),
        ("model.onnx notes.txt", NO_MODEL),
        ("model.onnx other.npz", NO_MODEL),
    ],
)
def test_nothing_of_the_users_is_lost(words, message, folder, capsys):
    before = contents(folder)
    assert main(words.format(here=folder.name).split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert contents(folder) == before


@pytest.mark.parametrize("words", ["model.onnx model.onnx", "model.onnx notes.txt --force", "model.onnx large.onnx"])
def test_models_and_what_is_forced_are_replaced(words, folder, capsys):
    assert main([*words.split(), "--quiet", "--heldout", "none"]) == 0
    assert not capsys.readouterr().err
    assert (folder / words.split()[1]).read_bytes() != (MODEL / "model.onnx").read_bytes()
