"""From decision to file: shifts that break a promise are put back, or nothing is written at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnx_optshift.calibration.load import load
from onnx_optshift.data import input_specs
from onnx_optshift.decide.choose import Decision
from onnx_optshift.errors import ToleranceError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.layers import Candidate, Layers
from onnx_optshift.publish import write_and_prove
from onnx_optshift.settings import Settings
from onnx_optshift.workbench import open_model, open_workbench

MODEL = Path(__file__).parent.parent / "models" / "digits_mlp"


@pytest.fixture(name="bench", scope="module")
def fixture_bench():
    model, weights, _ = open_model(MODEL / "model.onnx", Settings())
    return open_workbench(model, weights, Settings(device="cpu"))


@pytest.fixture(name="samples", scope="module")
def fixture_samples(bench):
    with np.load(MODEL / "calibration.npz") as data:
        arrays = {name: data[name][:64] for name in data.files}
    return load([arrays], input_specs(bench.model))


@pytest.fixture(name="layers", scope="module")
def fixture_layers(bench, samples):
    return Layers(bench.weights, bench.collect(samples), bench.model.initializer)


def broken(candidate, names, size=0.05):
    """The same candidate with noise in some arrays, as a defect of a solver would leave it."""
    rng = np.random.default_rng(0)
    solved = dict(candidate.solved)
    for name in names:
        array = solved[name].array
        noise = size * rng.standard_normal(array.shape).astype(array.dtype)
        solved[name] = replace(solved[name], array=array + noise)
    return Candidate(solved, candidate.tolerance)


def prove(bench, layers, decision, out):
    return write_and_prove(bench, decision, layers, out, external=False, seed=0)


def test_a_sound_candidate_is_proved_at_the_first_attempt(bench, layers, samples, tmp_path):
    decision = Decision(layers.candidate(0.0), 0.0, samples)
    with prove(bench, layers, decision, tmp_path / "out.onnx") as proved:
        assert proved.verification.passed
        assert proved.verification.attempts == 1
        assert not (tmp_path / "out.onnx").exists()  # not before the caller commits
        proved.written.commit()
    assert ModelFile.load(tmp_path / "out.onnx").sha256 == proved.sha256


def test_a_layer_that_breaks_the_outputs_is_put_back_and_the_others_stay(bench, layers, samples, tmp_path):
    candidate = layers.candidate(0.0)
    gains = {n: s.shift.norm_before**2 - s.shift.norm_after**2 for n, s in candidate.solved.items()}
    least = min(gains, key=gains.get)
    decision = Decision(broken(candidate, [least]), 0.0, samples)
    with prove(bench, layers, decision, tmp_path / "out.onnx") as proved:
        assert proved.verification.passed
        assert proved.verification.attempts == 2
        assert proved.reverted == (least,)
        assert set(proved.candidate.arrays) == set(gains) - {least}


def test_a_missed_tolerance_is_solved_again_within_it(bench, layers, samples, tmp_path):
    decision = Decision(layers.candidate(0.2), 0.05, samples)
    over = bench.deviation(samples, decision.candidate.arrays).largest_rel()
    assert over > 0.05  # negative control
    with prove(bench, layers, decision, tmp_path / "out.onnx") as proved:
        (output,) = proved.verification.outputs
        assert 0 < output.rel <= 0.05
        assert proved.candidate.tolerance < 0.2


def test_when_nothing_helps_nothing_is_written(bench, layers, samples, tmp_path, monkeypatch):
    monkeypatch.setattr("onnx_optshift.publish._revert", lambda bench, candidate, decision, floor: (candidate, ()))
    candidate = layers.candidate(0.0)
    decision = Decision(broken(candidate, list(candidate.arrays)), 0.0, samples)
    with pytest.raises(ToleranceError, match=r"deviates by .* Nothing was written"):
        prove(bench, layers, decision, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []
