"""Outputs of the original are computed once and kept: in little memory, then in files, as far as there is room."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import tiny_models as tiny

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
from onnx_optshift.capture.session import Session, resolve_device
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run import mapped, outputs
from onnx_optshift.run.bench import Bench

WIDE, BATCH, SAMPLES = 3000, 4, 22


@pytest.fixture
def bench_and_samples():
    text = f"g (float[B, 5] x) => (float[B, {WIDE}] y) {{ y = MatMul(x, W) }}"
    model = ModelFile.load(tiny.model(text, {"W": tiny.weight(5, WIDE)}))
    weights, _ = discover(model, Selection())
    x = np.random.default_rng(0).normal(size=(SAMPLES, 5)).astype(np.float32)
    specs = [InputSpec(spec.name, spec.dtype, spec.shape) for spec in model.inputs]
    return Bench.open(model, weights, resolve_device("cpu"), batch_size=BATCH), load([{"x": x}], specs)


@pytest.fixture
def runs(monkeypatch):
    """Samples that each run of a session was given."""
    counts, run = [], Session.run
    monkeypatch.setattr(Session, "run", lambda self, feeds, *a: counts.append(len(feeds["x"])) or run(self, feeds, *a))
    return counts


def values(bench, samples):
    return np.concatenate([found["y"] for _, found in bench.outputs.reference(samples)])


@pytest.mark.parametrize("room", [0, 2 * BATCH * WIDE * 4, 2**30], ids=["files", "both", "memory"])
def test_outputs_are_computed_once_wherever_they_are_kept(bench_and_samples, runs, room):
    bench, samples = bench_and_samples
    bench.outputs._room = room
    first = values(bench, samples)
    assert sum(runs) == SAMPLES
    assert np.array_equal(values(bench, samples), first)
    assert sum(runs) == SAMPLES
    (kept,) = bench.outputs._kept.values()
    assert kept.memory <= room
    assert kept.memory + kept.files == first.nbytes
    in_files = [not found["y"].flags.writeable for found in kept.batches]
    assert in_files == sorted(in_files)
    assert any(in_files) == (room < first.nbytes)


def test_another_set_of_samples_shares_the_room(bench_and_samples):
    bench, samples = bench_and_samples
    bench.outputs._room = SAMPLES * WIDE * 4
    values(bench, samples)
    values(bench, samples.select(range(3)))
    assert sum(kept.memory for kept in bench.outputs._kept.values()) == bench.outputs._room


def test_outputs_that_fit_nowhere_are_computed_again(bench_and_samples, runs, monkeypatch):
    bench, samples = bench_and_samples
    bench.outputs._room = BATCH * WIDE * 4
    monkeypatch.setattr(outputs, "KEPT_IN_FILES", 2 * BATCH * WIDE * 4)
    first = values(bench, samples)
    assert not bench.outputs._kept
    assert np.array_equal(values(bench, samples), first)
    assert sum(runs) == 2 * SAMPLES


def test_a_full_disk_is_left_alone(bench_and_samples, monkeypatch):
    bench, samples = bench_and_samples
    bench.outputs._room = 0
    monkeypatch.setattr(mapped.MappedStore, "free_space", lambda _: BATCH * WIDE * 4)
    values(bench, samples)
    assert not bench.outputs._kept


MEASURED = """
import sys
import onnx_optshift
from onnx_optshift.run import budget, bench, prepare
if len(sys.argv) > 3:
    budget.KEPT_OUTPUT_BYTES = int(sys.argv[3])
files = [sys.argv[1] + "/model.onnx", sys.argv[1] + "/calibration.npz"]
report = onnx_optshift.shift(*files, max_samples=int(sys.argv[2])).report
assert report.verification.outputs, report.summary
print(report.peak_memory_bytes, report.predicted_memory_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what allocators hold differs")
def test_ten_times_the_samples_take_no_more_memory(tmp_path):
    wide, features = 2048, 64
    text = f"g (float[B, {features}] x) => (float[B, {wide}] y) {{ h = MatMul(x, U) a = Relu(h) y = MatMul(a, W) }}"
    weights = {"U": tiny.weight(features, 96), "W": tiny.weight(96, wide)}
    onnx.save(tiny.model(text, weights), tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(20_000, features)).astype(np.float32)
    x[:, ::4] = 0  # leaves freedom, so that outputs are compared
    np.savez(tmp_path / "calibration.npz", x=x)

    def peak(*words):
        run = [sys.executable, "-c", MEASURED, str(tmp_path), *map(str, words)]
        return [int(w) for w in subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()]

    (few, _), (many, predicted) = peak(2_000), peak(20_000)
    assert many <= predicted
    assert many <= 1.05 * few
    assert peak(20_000, 2**30)[0] > 1.1 * few  # negative control: 160 MB of outputs kept in memory
