"""Several processes give what one gives, and end together: with one message, and without a trace, where one fails."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from several import FAULTY, MODULE, SECONDS, TORCHRUN, finished, ours, started, torchrun

from onnx_optshift.commands import shift
from onnx_optshift.settings import Settings

MODELS = Path(__file__).parents[1] / "models"
# Sums of the same products in another order, and solutions rounded to float32: half a unit in the last place is 6e-8.
CLOSE = 1e-6
linux = pytest.mark.skipif(sys.platform != "linux", reason="a process dies without its parent only on Linux")
# name: model, its options on the command line, and the same in Python.
MODES = {
    "exact": ("digits_mlp", "", {}),
    "tolerance": ("digits_transformer", "--tolerance 0.02", {"tolerance": 0.02}),
    "rounded": (
        "digits_cnn",
        "--objective range --tolerance auto --quantization-bits 4",
        {"objective": "range", "tolerance": "auto", "quantization_bits": (4,)},
    ),
    "all": ("digits_mlp", "--heldout none", {}),
    "stochastic": ("digits_mlp", "--stochastic 48 --heldout none", {"stochastic": 48}),
    "curvature": (
        "digits_mlp",
        "--objective curvature --tolerance 0.01 --heldout none",
        {"objective": "curvature", "tolerance": 0.01},
    ),
}


def given(name, folder, *more):
    model = MODELS / name
    return [model / "model.onnx", folder / "out.onnx", "--calib", model / "calibration.npz", "--quiet", *more]


def weights(path):
    proto = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in proto.graph.initializer}


def alone(mode, folder, **more):
    """Weights and report of one process."""
    name, options, settings = MODES[mode]
    heldout = ["none"] if "--heldout none" in options else None
    calibration, path = MODELS / name / "calibration.npz", folder / "alone.onnx"
    settings = Settings(device="cpu", **{**settings, **more})
    report = shift.run(MODELS / name / "model.onnx", path, [calibration], heldout, settings).report
    return weights(path), report.to_dict()


def check_same(mode, folder, count, *, max_samples=None, program=("-m", "onnx_optshift")):
    """Runs one mode in one process and in several, and holds both results against one another."""
    name, options, _ = MODES[mode]
    few = [] if max_samples is None else ["--max-samples", max_samples, "--force"]
    words = given(name, folder, "--device", "cpu", "--report", folder / "report.json", *options.split(), *few)
    done = torchrun(count, *words, program=program)
    assert (done.returncode, done.stdout, ours(done.stderr)) == (0, "", [])
    force = {} if max_samples is None else {"max_samples": max_samples, "force": True}
    expected, reference = alone(mode, folder, **force)
    found, report = weights(folder / "out.onnx"), json.loads((folder / "report.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"out.onnx", "alone.onnx", "report.json"}
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        assert np.linalg.norm(found[tensor] - array) <= CLOSE * np.linalg.norm(array), tensor
    # Not because nothing had moved.
    before = weights(MODELS / name / "model.onnx")
    moved = [layer["weight"] for layer in reference["layers"] if layer["status"] == "shifted"]
    assert moved
    assert all(np.linalg.norm(before[w] - found[w]) > 100 * CLOSE * np.linalg.norm(before[w]) for w in moved)
    for key in ("name", "status", "reason", "rows", "rank", "free", "growing"):
        assert [layer[key] for layer in report["layers"]] == [layer[key] for layer in reference["layers"]], key
    assert report["calibration"] == reference["calibration"]
    tried, judged = ((r["heldout_result"] or {}).get("tried", []) for r in (report, reference))
    assert [(t["what"], t["accepted"]) for t in tried] == [(t["what"], t["accepted"]) for t in judged]
    outputs, others = (r["verification"]["outputs"] for r in (report, reference))
    assert [(o["name"], o["samples"], o["passed"]) for o in outputs] == [
        (o["name"], o["samples"], o["passed"]) for o in others
    ]


def test_two_processes_give_what_one_gives(tmp_path):
    check_same("exact", tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_give_what_one_gives(mode, count, tmp_path):
    # 4 processes: more than the layers of the MLP; 2 are fewer than any model's. 25 batches make uneven shares for 4.
    check_same(mode, tmp_path, count)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "rounded"])
def test_processes_without_data_take_part(mode, tmp_path):
    # One batch: three of four processes have no sample, and of those held out none but the first has one.
    check_same(mode, tmp_path, 4, max_samples=24)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "tolerance", "rounded"])
def test_layers_in_passes_of_their_own(mode, tmp_path):
    check_same(mode, tmp_path, 2, program=FAULTY)


def test_a_wrong_option_is_told_once(tmp_path):
    with started(2, *given("digits_mlp", tmp_path, "--tolerence", "1")) as (first, second):
        _, message = first.communicate(timeout=SECONDS)
        assert first.returncode == 2
        assert len(ours(message)) == 1
        assert "--tolerence" in message
        # The other one leaves it time to say so; torchrun ends it sooner.
        assert second.communicate(timeout=SECONDS) == ("", "")
        assert second.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["--calib", "nothing.npz"], ["--tolerance", "1e-9", "--nodes-to-include", "no such layer"]]
)
def test_what_all_meet_is_told_once(words, tmp_path):
    done = torchrun(3, *given("digits_mlp", tmp_path), *words)
    assert done.returncode != 0
    assert len(ours(done.stderr)) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_commands_of_one_process_say_so():
    done = torchrun(2, "inspect", MODELS / "digits_mlp" / "model.onnx")
    assert ours(done.stderr) == ["error: inspect runs in one process. Start it without torchrun."]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["capture", "solve", "proof"])
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSEGV", "error"])
def test_one_that_fails_ends_all(what, stage, rank, tmp_path):
    done = torchrun(2, *given("digits_mlp", tmp_path), program=FAULTY, fault=f"{rank} {stage} {what}")
    assert done.returncode != 0
    (message,) = ours(done.stderr)
    during = "verify" if stage == "proof" else stage
    expected = {
        "error": "error: this is the one message.",
        "SIGKILL": f"error: killed (SIGKILL) during {during}; nothing was written.",
        "SIGSEGV": f"error: a native library crashed (SIGSEGV) during {during}; nothing was written",
    }
    assert message.startswith(expected[what])
    assert not list(tmp_path.iterdir())


@linux
@pytest.mark.slow
def test_without_a_watch_the_others_end_too(tmp_path):
    # Nobody ends the first process: it sees that the other one is gone, and says so.
    done = finished(2, *given("digits_mlp", tmp_path), program=FAULTY, FAULT="1 solve SIGKILL", PATIENCE="1")
    assert [status for status, _, _ in done] == [2, 2]
    assert done[1][2].startswith("error: killed (SIGKILL) during solve")
    assert done[0][2].startswith("error: the connection to another process was lost during solve; nothing was written.")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@linux
def test_one_that_hangs_is_missed(tmp_path):
    words = given("digits_mlp", tmp_path)
    with started(2, *words, program=FAULTY, FAULT="1 solve SIGSTOP", SILENCE="2") as (first, second):
        _, text = first.communicate(timeout=200)
        assert second.poll() is None
    assert first.returncode == 2
    assert text.startswith(
        "error: process 1 of 2 has shown no sign of life for 2 s, during solve; nothing was written."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_they_leave_nothing(number, tmp_path):
    words = given("digits_mlp", tmp_path)
    with started(2, *words, program=FAULTY, FAULT="1 proof SIGSTOP") as processes:
        while not any(name.endswith(".new") for name in os.listdir(tmp_path)):
            assert processes[0].poll() is None
        for process in processes:
            process.send_signal(number)
        _, text = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 128 + number
    assert text == ("interrupted: nothing was written\n" if number == signal.SIGINT else "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@linux
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_moment(seed, tmp_path):
    psutil = pytest.importorskip("psutil")
    generator = np.random.default_rng(seed)
    command = [*TORCHRUN, "2", *MODULE, *map(str, given("digits_mlp", tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        workers = []
        while len(workers) < 2:  # torchrun, then one that waits for each process, then these
            assert job.poll() is None
            waiting = psutil.Process(job.pid).children()
            workers = [worker for one in waiting for worker in one.children()]
        time.sleep(generator.uniform(0, 6))
        with suppress(psutil.NoSuchProcess):
            workers[generator.integers(2)].kill()
        _, text = job.communicate(timeout=SECONDS)
    if job.returncode == 0:  # it was over
        assert not ours(text)
        assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
        return
    (message,) = ours(text)
    assert "killed (SIGKILL)" in message
    # Once the file has its place only the report is left to do.
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"] * ("out.onnx was written before" in message)


@pytest.mark.slow
def test_a_checkpoint_serves_the_same_number_of_processes(tmp_path):
    found = {}
    for name, count in (("first", 2), ("again", 2), ("alone", 1)):
        folder = tmp_path / name
        folder.mkdir()
        options = ["--checkpoint", tmp_path / "kept", "--report", folder / "report.json", "--tolerance", "0.02"]
        done = torchrun(count, *given("digits_mlp", folder, *options))
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((folder / "report.json").read_text())["checkpoint"]
    outs = [(tmp_path / name / "out.onnx").read_bytes() for name in ("first", "again")]
    assert outs[0] == outs[1]
    assert found["first"]["used"] == 0 < found["first"]["saved"]
    assert found["again"]["used"] > 0
    assert not found["again"]["rejected"]
    assert found["alone"]["used"] == 0
    assert "another number of processes" in " ".join(found["alone"]["rejected"])


@pytest.mark.slow
def test_other_data_in_one_process_is_noticed(tmp_path):
    script = tmp_path / "data.py"
    script.write_text(
        "import os, numpy as np\n"
        "def data():\n"
        "    x = np.random.default_rng(int(os.environ['RANK'])).random((64, 64), np.float32)\n"
        "    return [{'pixels': x}]\n"
    )
    before = {path.name for path in tmp_path.iterdir()}
    name = onnx.load(MODELS / "digits_mlp" / "model.onnx").graph.input[0].name
    script.write_text(script.read_text().replace("pixels", name))
    words = [MODELS / "digits_mlp" / "model.onnx", tmp_path / "out.onnx", "--calib", f"{script}:data", "--force"]
    done = torchrun(2, *words, "--quiet")
    assert done.returncode != 0
    (message,) = ours(done.stderr)
    assert "finds another calibration set than process" in message
    assert before == {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
