"""From decision to file: shifts that break a promise are put back, all that is written is judged, or nothing is."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnx_optshift.commands import publish
from onnx_optshift.commands.publish import published
from onnx_optshift.decide import back_off
from onnx_optshift.decide.back_off import REVERTED
from onnx_optshift.decide.decision import Decision, Way
from onnx_optshift.decide.grounds import grounds_of
from onnx_optshift.errors import ToleranceError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.prove.floor import Promise
from onnx_optshift.report.model import OutputComparison, Verification
from onnx_optshift.run.candidate import Candidate
from onnx_optshift.run.capture import captured
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import Norm

MODEL = Path(__file__).parent.parent / "models" / "digits_mlp"


def npz(name, rows):
    with np.load(MODEL / name) as data:
        return {key: data[key][rows] for key in data.files}


@pytest.fixture(name="prepared", scope="module")
def fixture_prepared():
    calibration, heldout = npz("calibration.npz", slice(0, 64)), npz("heldout.npz", slice(0, 200))
    return prepare(MODEL / "model.onnx", Settings(device="cpu"), [calibration], [heldout])


@pytest.fixture(name="layers", scope="module")
def fixture_layers(prepared):
    return captured(prepared, prepared.data, Norm())[0]


@pytest.fixture(name="grounds")
def fixture_grounds(prepared, layers):
    return replace(grounds_of(prepared, prepared.data, layers, layers), gate=None)


@pytest.fixture(name="judged")
def fixture_judged(prepared, layers):
    return grounds_of(prepared, prepared.data, layers, layers)


def broken(candidate, names, size=0.05):
    """The same candidate with noise in some arrays, as a defect of a solver would leave it."""
    rng = np.random.default_rng(0)
    solved = dict(candidate.solved)
    for name in names:
        array = solved[name].array
        noise = size * rng.standard_normal(array.shape).astype(array.dtype)
        solved[name] = replace(solved[name], array=array + noise)
    return replace(candidate, solved=solved)


def decision_of(candidate, grounds, tolerance=0.0, way=None):
    promise = Promise(tolerance, "tolerance" if tolerance else "noise", grounds.samples)
    return Decision(candidate, promise, way or Way("as given", lambda _: candidate, lambda _: candidate))


def gains(candidate):
    return {name: one.shift.norm_before**2 - one.shift.norm_after**2 for name, one in candidate.solved.items()}


def test_a_sound_candidate_is_proved_at_the_first_attempt(prepared, grounds, layers, tmp_path):
    decision = decision_of(layers.candidate(0.0), grounds)
    written, sha256, proof, _ = published(prepared, grounds, decision, tmp_path / "out.onnx")
    with written:
        assert proof.passed
        assert proof.attempts == 1
        assert not (tmp_path / "out.onnx").exists()  # not before the caller commits
        written.commit()
    assert ModelFile.load(tmp_path / "out.onnx").sha256 == sha256


def test_a_layer_that_breaks_the_outputs_is_put_back_and_the_others_stay(prepared, grounds, layers, tmp_path):
    candidate = layers.candidate(0.0)
    least = min(gains(candidate), key=gains(candidate).get)
    decision = decision_of(broken(candidate, [least]), grounds)
    written, _, proof, final = published(prepared, grounds, decision, tmp_path / "out.onnx")
    with written:
        assert proof.passed
        assert proof.attempts == 2
        assert proof.reverted == (least,)
        assert set(final.candidate.arrays) == set(candidate.arrays) - {least}
        assert final.rejected == {least: REVERTED}


def test_layers_put_back_at_different_attempts_are_all_told(prepared, grounds, layers, tmp_path, monkeypatch):
    """The proof refuses files twice whatever they hold: what was put back the first time is not forgotten."""
    candidate = layers.candidate(0.0)
    refusals = [True, True, False]
    prove = publish.Prover.prove

    def refuse(self, *arguments):
        sha256, proof = prove(self, *arguments)
        return sha256, replace(proof, passed=not refusals.pop(0))

    monkeypatch.setattr(publish.Prover, "prove", refuse)
    written, _, proof, final = published(prepared, grounds, decision_of(candidate, grounds), tmp_path / "out.onnx")
    with written:
        order = sorted(candidate.arrays, key=gains(candidate).get)
        assert proof.attempts == 3
        assert proof.reverted == tuple(order[:2])
        assert list(final.candidate.arrays) == order[2:]
        assert final.rejected == dict.fromkeys(order[:2], REVERTED)


def test_a_missed_tolerance_is_solved_again_within_it(prepared, grounds, layers, tmp_path):
    decision = decision_of(layers.candidate(0.2), grounds, 0.05, grounds.parallel)
    over = prepared.bench.outputs.deviation(grounds.samples, decision.candidate.arrays).largest_rel()
    assert over > 0.05  # negative control
    written, _, proof, final = published(prepared, grounds, decision, tmp_path / "out.onnx")
    with written:
        (output,) = proof.outputs
        assert 0 < output.rel <= 0.05
        assert final.candidate.tolerance < 0.2


def test_what_backing_off_writes_was_judged_as_it_is(prepared, judged, layers, tmp_path):
    """The verdict is of the weights in the file, not of the trial that came first."""
    decision = decision_of(layers.candidate(0.2), judged, 0.05, judged.parallel)
    first, _ = judged.gate.judge(decision.candidate.arrays, "first", 0.2)
    written, _, _, final = published(prepared, judged, replace(decision, verdict=first), tmp_path / "out.onnx")
    with written:
        file = ModelFile.load(written.temp_path)
        arrays = {name: file.initializer(name) for name in final.candidate.arrays}
    again = judged.gate.run(arrays).score
    assert arrays
    assert (final.verdict.loss, final.verdict.top1) == (again.loss, again.top1)
    assert final.verdict.loss != first.loss  # negative control


def test_backing_off_writes_nothing_that_held_out_data_rejects(prepared, judged, layers, tmp_path, monkeypatch):
    decision = decision_of(layers.candidate(0.2), judged, 0.05, judged.parallel)
    monkeypatch.setattr(type(judged.gate), "_objection", lambda *_: "no")
    written, _, proof, final = published(prepared, judged, decision, tmp_path / "out.onnx")
    with written:
        assert proof.identical_bytes
        assert not final.candidate.arrays
        assert set(final.rejected.values()) == {"gate: no"}


def test_when_nothing_helps_nothing_is_written(prepared, grounds, layers, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "reverted", lambda _, decision, __: decision)
    candidate = layers.candidate(0.0)
    decision = decision_of(broken(candidate, list(candidate.arrays)), grounds)
    with pytest.raises(ToleranceError, match=r"deviates by .* Nothing was written"):
        published(prepared, grounds, decision, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tolerance", "rel", "factor"),
    [(0.01, 0.03, 0.3), (0.01, math.inf, 0), (math.inf, math.inf, 0.9)],
)
def test_a_shift_shrinks_in_proportion_and_by_a_number(tolerance, rel, factor, prepared, monkeypatch):
    def told(grounds, way, residual, promise, *_, **__):
        return residual

    monkeypatch.setattr(back_off, "decided", told)
    output = OutputComparison("y", rel, rel, rel, None, 64, tolerance, passed=False)
    proof = Verification(passed=False, outputs=(output,), noise_floor=None)
    decision = Decision(Candidate({}, 0.5), Promise(tolerance, "tolerance", prepared.data.calibration))
    assert back_off.shrunk(None, decision, proof) == pytest.approx(0.5 * factor, rel=1e-12)
