"""A run that was killed goes on where it was and gives the bytes of one that was not."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tiny_models as tiny
from checkpoint_cases import WAYS, captures, entries, killed_after, run

import onnx_optshift
from onnx_optshift import tensorfile
from onnx_optshift.errors import ToleranceError
from onnx_optshift.run import checkpoint_folder, prepare
from onnx_optshift.run.layers import Layers


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


@pytest.mark.parametrize("way", [*WAYS][:1])
def test_killed_and_taken_up_again_it_gives_the_same_bytes(way, model, tmp_path, monkeypatch, often):
    assert every_save(way, model, tmp_path, monkeypatch, step=29) > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_after_any_save_it_gives_the_same_bytes(way, model, tmp_path, monkeypatch, often):
    assert every_save(way, model, tmp_path, monkeypatch, step=5 if way == "curvature" else 1) > 10


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
