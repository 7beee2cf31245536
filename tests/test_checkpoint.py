"""A run that was killed goes on where it was and gives the bytes of one that was not; what does not fit is not used."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tiny_models as tiny

import onnx_optshift
from onnx_optshift import tensorfile
from onnx_optshift.errors import InputError, ToleranceError
from onnx_optshift.run import checkpoint_folder, prepare
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.layers import Layers

# 4 samples a batch: 12 batches fit and 3 judge; the rows of the wider layer become a Gram matrix in the middle of it.
# The last inputs are always 0: freedom for an exact shift.
DATA = {"x": tiny.weight(60, 24, seed=1) * (np.arange(24) < 15), "labels": np.arange(60) % 3}
DATA["x"] = DATA["x"].astype(np.float32)
WAYS = {
    "exact": {},
    "tolerance": {"tolerance": 0.05},
    "on a grid": {"tolerance": "auto", "objective": "range", "quantization_bits": 4},
    "stochastic": {"stochastic": 12, "heldout": "none"},
    "curvature": {"objective": "curvature", "tolerance": 0.05},
}


class Killed(BaseException):
    """As if the process had died here: nobody catches it."""


@pytest.fixture(name="model")
def fixture_model(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(tiny.two_layers(width=24), path)
    return path


@pytest.fixture(name="often")
def fixture_often(monkeypatch):
    """Sums of a pass are kept after every batch."""
    monkeypatch.setattr(checkpoint_folder, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint_folder, "LEAST_SHARE", 0)


def run(model, folder=None, data=DATA, *, batch_size=4, **options):
    """The bytes of the shifted model, and the report."""
    result = onnx_optshift.shift(model, data, batch_size=batch_size, checkpoint=folder, **options)
    return result.path.read_bytes(), result.report


def killed_after(monkeypatch, saves, model, folder, **options):
    """A run that dies after so many saves; whether it came to that."""
    save, count = checkpoint_folder.Folder._save, 0

    def dying(self, name, entry):
        nonlocal count
        save(self, name, entry)
        count += 1
        if count == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.Folder, "_save", dying)
        try:
            run(model, folder, **options)
        except Killed:
            return True
    return False


def entries(folder, kind=""):
    return sorted(folder.glob(f"*/{kind}*.safetensors"))


def captures(monkeypatch):
    """Counts batches that are really run for statistics."""
    seen, capture = [], Bench.capture

    def counting(self, taps, samples, stage, spanning, begun):
        seen.append((len(samples), begun.done))
        return capture(self, taps, samples, stage, spanning, begun)

    monkeypatch.setattr(Bench, "capture", counting)
    return seen


def every_save(way, model, tmp_path, monkeypatch, step):
    """Kills after each of some saves, until a run comes to its end; the number of kills."""
    undisturbed, _ = run(model, **WAYS[way])
    assert undisturbed != model.read_bytes()
    saves = 2  # the first one is the plan
    while killed_after(monkeypatch, saves, model, tmp_path / f"kept{saves}", **WAYS[way]):
        resumed, report = run(model, tmp_path / f"kept{saves}", **WAYS[way])
        assert resumed == undisturbed
        assert report.checkpoint.used > 0
        assert report.checkpoint.rejected == ()
        saves += step
    return saves // step


@pytest.mark.parametrize("way", [*WAYS][:4])
def test_killed_and_taken_up_again_it_gives_the_same_bytes(way, model, tmp_path, monkeypatch, often):
    assert every_save(way, model, tmp_path, monkeypatch, step=29) > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_after_any_save_it_gives_the_same_bytes(way, model, tmp_path, monkeypatch, often):
    assert every_save(way, model, tmp_path, monkeypatch, step=5 if way == "curvature" else 1) > 10


def test_killed_again_and_again_it_still_comes_to_the_same_end(model, tmp_path, monkeypatch, often):
    undisturbed, _ = run(model, tolerance=0.05)
    kills = 0
    while killed_after(monkeypatch, 4, model, tmp_path / "kept", tolerance=0.05):
        kills += 1
    assert kills > 2
    assert run(model, tmp_path / "kept", tolerance=0.05)[0] == undisturbed


def test_a_pass_goes_on_with_the_batch_after_the_last_that_was_kept(model, tmp_path, monkeypatch, often):
    seen = captures(monkeypatch)
    assert killed_after(monkeypatch, 3, model, tmp_path / "kept")
    assert killed_after(monkeypatch, 4, model, tmp_path / "kept")
    run(model, tmp_path / "kept")
    assert [begun for _, begun in seen][:3] == [0, 2, 6]


def test_a_pass_that_ends_with_full_rank_goes_on_with_what_it_knew(tmp_path, monkeypatch, often):
    # One layer spans after some batches, and is looked at anew when its rows have grown; one never does.
    path, data = tmp_path / "model.onnx", {"x": np.concatenate([tiny.weight(200, 16, seed=1), np.zeros((200, 8))], 1)}
    data["x"] = data["x"].astype(np.float32)
    onnx.save(tiny.two_layers(width=24), path)
    undisturbed, whole = run(path, data=data)
    assert [layer.free for layer in whole.layers] == [8, 0]
    for saves in (2, 9, 17, 37):
        assert killed_after(monkeypatch, saves, path, tmp_path / f"kept{saves}", data=data)
        resumed, report = run(path, tmp_path / f"kept{saves}", data=data)
        assert resumed == undisturbed
        assert report.to_dict()["layers"] == whole.to_dict()["layers"]
    # Finished statistics bring the factorizations back too.
    assert run(path, tmp_path / "kept2", data=data)[1].to_dict()["layers"] == whole.to_dict()["layers"]


def test_patches_of_images_that_are_thinned_go_on_in_phase(tmp_path, monkeypatch, often):
    text = "g (float[N,1,24,24] x) => (float[N,4] y) { h = Conv(x, W, b)  r = Relu(h)  p = GlobalAveragePool(r) "
    text += "f = Flatten(p)  y = MatMul(f, V) }"
    tensors = {"W": tiny.weight(6, 1, 3, 3), "b": tiny.weight(6), "V": tiny.weight(6, 4)}
    path, data = tmp_path / "conv.onnx", {"x": tiny.weight(40, 1, 24, 24)}
    onnx.save(tiny.model(text, tensors), path)
    thinned, observe = [], onnx_optshift.run.bench.observe

    def watched(*args, every=1, phase=0):
        thinned.append((every, phase))
        observe(*args, every=every, phase=phase)

    monkeypatch.setattr(onnx_optshift.run.bench, "observe", watched)
    way = {"data": data, **WAYS["on a grid"]}
    undisturbed, _ = run(path, **way)
    assert {phase for every, phase in thinned if every > 1} >= {0, 1, 5}
    assert killed_after(monkeypatch, 4, path, tmp_path / "kept", **way)
    assert run(path, tmp_path / "kept", **way)[0] == undisturbed


def test_finished_statistics_serve_other_options(model, tmp_path, monkeypatch):
    seen = captures(monkeypatch)
    _, first = run(model, tmp_path / "kept", tolerance=0.02, row_weighting="none")
    assert first.checkpoint.used == 0
    assert len(seen) == 2
    bytes_, report = run(model, tmp_path / "kept", tolerance=0.05, row_weighting="none")
    assert report.checkpoint.used == 2
    assert report.checkpoint.rejected == ()
    assert len(seen) == 2
    assert bytes_ == run(model, tolerance=0.05, row_weighting="none")[0]
    assert report.settings["checkpoint"] == str(tmp_path / "kept")
    assert {path.name.partition("-")[0] for path in entries(tmp_path / "kept")} == {"plan", "statistics"}


def test_the_plan_of_a_killed_run_is_kept_though_other_memory_is_free(model, tmp_path, monkeypatch, often):
    make_plan = prepare.make_plan

    def free(size):
        """As if so many samples a batch were what the free memory allows."""

        def planned(costs, weights, batch_size, budget, former=None):
            return former or replace(make_plan(costs, weights, batch_size, budget), batch_size=size)

        monkeypatch.setattr(prepare, "make_plan", planned)

    seen, way = captures(monkeypatch), {"batch_size": None, "tolerance": 0.05}
    free(3)
    undisturbed, _ = run(model, **way)
    assert killed_after(monkeypatch, 6, model, tmp_path / "kept", **way)
    free(8)
    resumed, report = run(model, tmp_path / "kept", **way)
    assert resumed == undisturbed
    assert report.checkpoint.used == 1
    assert seen[-2] == (48, 5)  # batches of the first pass, the plan being the first entry


def test_what_is_found_is_really_used(model, tmp_path):
    # The negative control of all tests above: an entry with a valid hash and other content changes the bytes.
    undisturbed, _ = run(model, tmp_path / "kept", tolerance=0.05)
    for file in entries(tmp_path / "kept", "statistics"):
        arrays, about = tensorfile.read(file)
        with file.open("wb") as opened:
            scaled = {
                name: a * np.linspace(1, 9, a.shape[-1]) if a.dtype.kind == "f" else a for name, a in arrays.items()
            }
            tensorfile.write(opened, scaled, about)
    poisoned, report = run(model, tmp_path / "kept", tolerance=0.05)
    assert report.checkpoint.used == 2
    assert report.checkpoint.rejected == ()
    assert poisoned != undisturbed


@pytest.mark.parametrize("way", [WAYS["exact"], {**WAYS["on a grid"], "recapture": "none"}])
def test_finished_solutions_are_not_solved_again(way, model, tmp_path, monkeypatch):
    solved, solve, snap = [], Layers.solve, Layers.snap
    monkeypatch.setattr(Layers, "solve", lambda *args: solved.append("solve") or solve(*args))
    monkeypatch.setattr(Layers, "snap", lambda *args: solved.append("snap") or snap(*args))
    undisturbed, whole = run(model, **way)
    all_of_them = len(solved)
    saves = next(n for n in range(3, 20) if _kept_a_solution(monkeypatch, n, model, tmp_path / f"kept{n}", way))
    kept, solved[:] = tmp_path / f"kept{saves}", []
    resumed, report = run(model, kept, **way)
    assert resumed == undisturbed
    assert report.to_dict()["layers"] == whole.to_dict()["layers"]
    assert len(solved) < all_of_them
    assert not entries(kept, "solution")  # they serve no other run


def test_kept_solutions_are_really_used(model, tmp_path, monkeypatch):
    undisturbed, _ = run(model)
    saves = next(n for n in range(3, 20) if _kept_a_solution(monkeypatch, n, model, tmp_path / f"kept{n}", {}))
    kept = tmp_path / f"kept{saves}"
    for file in entries(kept, "solution"):
        arrays, about = tensorfile.read(file)
        with file.open("wb") as opened:
            tensorfile.write(opened, {name: array[::-1] * 0.5 for name, array in arrays.items()}, about)
    with suppress(ToleranceError):  # another layer may be reverted, or none be left
        assert run(model, kept)[0] != undisturbed


def _kept_a_solution(monkeypatch, saves, model, folder, way):
    assert killed_after(monkeypatch, saves, model, folder, **way)
    return any(tensorfile.read(file)[0] for file in entries(folder, "solution"))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


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
