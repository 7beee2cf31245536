"""What is damaged, or made from anything else, is never used, and that is said; the folder is a checkpoint's alone."""

import json
import shutil

import numpy as np
import onnx
import pytest
import tiny_models as tiny
from checkpoint_cases import DATA, entries, flip, run

import onnx_optshift
from onnx_optshift import tensorfile
from onnx_optshift.errors import InputError


@pytest.fixture(name="model")
def fixture_model(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(tiny.two_layers(width=24), path)
    return path


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "cut to nothing": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"0"),
    "a byte of the data": lambda file: flip(file, -100),
    "a byte of the length": lambda file: flip(file, 0),
    "a high byte of the length": lambda file: flip(file, 7),
    "a byte of the header": lambda file: flip(file, file.read_bytes().index(b"F64")),
    "the hash": lambda file: flip(file, file.read_bytes().index(b'"sha256":"') + 12),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "another entry": lambda file: shutil.copy(next(f for f in entries(file.parents[1]) if f != file), file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_never_used_and_that_is_said(damage, model, tmp_path):
    undisturbed, _ = run(model, tmp_path / "kept")
    damaged = entries(tmp_path / "kept", "statistics")[0]
    DAMAGES[damage](damaged)
    again, report = run(model, tmp_path / "kept")
    assert again == undisturbed
    assert report.checkpoint.used == 1
    (said,) = report.checkpoint.rejected
    assert said.startswith(damaged.name)
    assert run(model, tmp_path / "kept")[1].checkpoint.used == 2  # mended


def test_every_byte_of_a_file_counts(tmp_path):
    file, arrays = tmp_path / "file", {"a": tiny.weight(3), "b": np.arange(2)}
    with file.open("wb") as opened:
        tensorfile.write(opened, arrays, {"word": '"sha256":"0"'})
    whole = file.read_bytes()
    found, about = tensorfile.read(file)
    assert about == {"word": '"sha256":"0"'}
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    for at in range(len(whole)):
        flip(file, at)
        with pytest.raises(ValueError, match=r"hash|cut short"):
            tensorfile.read(file)
        file.write_bytes(whole)


def another_model(path, monkeypatch):
    onnx.save(tiny.two_layers(seed=1, width=24), path)


def another_version(path, monkeypatch):
    monkeypatch.setattr(onnx_optshift.run.identity.metadata, "version", lambda _: "9.9.9")


def other_sources(path, monkeypatch):
    monkeypatch.setattr(onnx_optshift.run.identity, "_sources", lambda: "changed in place")


def another_torch(path, monkeypatch):
    monkeypatch.setattr(onnx_optshift.run.identity, "versions", lambda: ("1.99", "2.99"))


def other_threads(path, monkeypatch):
    monkeypatch.setattr(onnx_optshift.run.identity.torch, "get_num_threads", lambda: 77)


def other_data(path, monkeypatch):
    return {**DATA, "x": np.roll(DATA["x"], 1, axis=0)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_model, "another model"),
        (other_data, "other data"),
        (another_version, "another version of this package and another version of numpy"),
        (other_sources, "another version of this package"),
        (another_torch, "another version of torch and another version of onnxruntime"),
        (other_threads, "another machine or number of threads"),
    ],
)
def test_what_was_made_from_anything_else_is_left_alone_and_said(change, said, model, tmp_path, monkeypatch):
    run(model, tmp_path / "kept")
    before = {file: file.read_bytes() for file in entries(tmp_path / "kept")}
    data = change(model, monkeypatch) or DATA
    undisturbed, _ = run(model, data=data)
    again, report = run(model, tmp_path / "kept", data=data)
    assert again == undisturbed
    assert report.checkpoint.used == 0
    (reason,) = report.checkpoint.rejected
    assert reason.endswith(f"3 entries (0.0 MiB) for {said}")
    assert all(file.read_bytes() == content for file, content in before.items())


def test_external_data_counts_as_the_model(tmp_path):
    path = tmp_path / "model.onnx"
    tiny.save_external(tiny.two_layers(width=24), path, {"W1": "w.data", "W2": "w.data"})
    run(path, tmp_path / "kept")
    assert run(path, tmp_path / "kept")[1].checkpoint.used == 2
    flip(tmp_path / "w.data", 0)  # the model file stays as it was
    _, report = run(path, tmp_path / "kept")
    assert report.checkpoint.used == 0
    assert report.checkpoint.rejected[0].endswith("another model")


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 5}, {"seed": 1}, {"heldout_fraction": 0.3}, {"heldout": "none"}, {"nodes_to_exclude": "W1"}],
)
def test_entries_of_other_options_are_not_used_and_that_is_said(options, model, tmp_path):
    run(model, tmp_path / "kept")
    again, report = run(model, tmp_path / "kept", **options)
    assert again == run(model, **options)[0]
    assert report.checkpoint.used == 0
    (said,) = report.checkpoint.rejected
    assert said.endswith("of runs with other options")


def test_samples_that_are_run_one_by_one_are_other_data(model, tmp_path):
    run(model, tmp_path / "kept")
    feeds = [{"x": row[None]} for row in DATA["x"]]
    unlabelled = {"x": DATA["x"]}
    run(model, tmp_path / "kept", data=unlabelled)
    report = run(model, tmp_path / "kept", data=feeds)[1]
    assert report.calibration.fingerprint == run(model, data=unlabelled)[1].calibration.fingerprint
    assert report.checkpoint.used == 0


def test_what_dead_processes_left_is_cleared_away_and_the_living_keep_theirs(model, tmp_path):
    run(model, tmp_path / "kept")
    home = entries(tmp_path / "kept")[0].parent
    dead, alive = home / ".dead.new", home / ".alive.new"
    dead.write_bytes(b"half")
    with alive.open("wb") as file:
        onnx_optshift.write.atomic.lock(file, wait=True)
        run(model, tmp_path / "kept")
        assert not dead.exists()
        assert alive.exists()


def test_a_disk_that_is_full_ends_the_keeping_and_not_the_run(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "write", full)
    bytes_, report = run(model, tmp_path / "kept")
    assert bytes_ == run(model)[0]
    assert report.checkpoint.failed == "nothing more was kept: No space left on device"
    assert report.checkpoint.saved == 0


def test_a_folder_that_holds_anything_else_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"holds 'model.onnx', which is none of a checkpoint's"):
        run(model, tmp_path)
    with pytest.raises(InputError, match=r"model.onnx is a file. Give a folder"):
        run(model, model)
    with pytest.raises(InputError, match="checkpoint: expected a path"):
        run(model, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{at}/kept/out.onnx", "--checkpoint", "{at}/kept"], "would lie in it"),
        (["{at}/out.onnx", "--checkpoint", "{at}/kept", "--report", "{at}/kept/report.json"], "would lie in it"),
        (["{at}/out.onnx", "--checkpoint", "{at}/data/kept", "--calib", "{at}/data"], "this run reads the folder"),
        (["{at}/out.onnx", "--checkpoint", "{at}/data", "--calib", "{at}/data"], "this run reads the folder"),
        (["{at}/out.onnx", "--checkpoint", "{at}/other"], "holds 'x.npz', which is none of"),
        (["{at}/out.onnx", "--checkpoint", "{at}/model.onnx/kept"], "is a file. Give a folder"),
    ],
)
def test_the_folder_is_for_a_checkpoint_alone(words, said, model, tmp_path, capsys):
    from onnx_optshift.cli import main

    for folder in ("data", "other", "kept"):
        (tmp_path / folder).mkdir()
    for place in ("data/x.npz", "other/x.npz", "model.calibration.npz"):
        np.savez(tmp_path / place, **DATA)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(model), *(word.format(at=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_json_and_terminal_say_what_was_taken(model, tmp_path, capsys):
    from onnx_optshift.cli import main

    np.savez(tmp_path / "model.calibration.npz", **DATA)
    words = [str(model), str(tmp_path / "out.onnx"), "--checkpoint", str(tmp_path / "kept")]
    for _ in range(2):
        assert main([*words, "--report", str(tmp_path / "report.json")]) == 0
    assert f"2 finished or begun parts of the work taken from {tmp_path / 'kept'}" in capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    kept = str(tmp_path / "kept")
    assert found["settings"]["checkpoint"] == kept
    assert found["checkpoint"] == {"folder": kept, "used": 2, "saved": 3, "rejected": [], "failed": None}
    assert main(["inspect", *words[:1], *words[2:]]) == 0
