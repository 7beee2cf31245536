"""Decisions on a real overfitted model: the tolerance, its automatic choice, stochastic draws, re-captured layers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from onnx_optshift.calibration.load import load
from onnx_optshift.commands import shift
from onnx_optshift.decide import recapture
from onnx_optshift.decide.recapture import layer_by_layer
from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.run.capture import captured
from onnx_optshift.run.prepare import input_specs, prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import Norm

MODEL = Path(__file__).parent.parent / "models" / "noisy_mlp"


def npz(name, rows):
    with np.load(MODEL / name) as data:
        return {key: data[key][rows] for key in data.files}


CALIBRATION = npz("calibration.npz", slice(0, 300))
JUDGE, UNSEEN = npz("heldout.npz", slice(0, 300)), npz("heldout.npz", slice(300, None))


def run(out=None, heldout=JUDGE, calibration=CALIBRATION, **settings):
    settings.setdefault("device", "cpu")
    return shift.run(MODEL / "model.onnx", out, [calibration], [heldout], Settings(**settings))


@pytest.fixture(name="prepared", scope="module")
def fixture_prepared():
    return prepare(MODEL / "model.onnx", Settings(device="cpu"), [CALIBRATION])


@pytest.fixture(name="bench")
def fixture_bench(prepared):
    return prepared.bench


def top1(bench, arrays, data):
    samples = load([data], input_specs(bench.model, Settings()))
    right = [
        outputs["logits"].argmax(axis=1) == batch.labels for batch, outputs, _ in bench.outputs.trial(samples, arrays)
    ]
    return float(np.concatenate(right).mean())


def test_auto_takes_what_unseen_data_gains_from(bench):
    report = run(tolerance="auto").report
    assert report.heldout_result.accepted
    assert report.heldout_result.after.loss < report.heldout_result.before.loss
    assert report.verification.passed
    assert any("auto chose" in note for note in report.decisions)
    # Every trial is told, refused ones too.
    assert len(report.heldout_result.tried) >= 3


@pytest.mark.parametrize("name", ["noisy_mlp", "digits_mlp", "digits_transformer"])
def test_auto_takes_the_residual_of_least_held_out_loss_and_among_equals_the_smaller_deviation(name):
    folder = MODEL.parent / name
    report = shift.run(
        folder / "model.onnx",
        None,
        [folder / "calibration.npz"],
        [folder / "heldout.npz"],
        Settings(device="cpu", tolerance="auto"),
    ).report
    result = report.heldout_result
    walked = {trial.tolerance: trial.loss for trial in result.tried if trial.accepted and "all layers" in trial.what}
    least = min(result.before.loss, *walked.values())
    (chosen,) = [trial for trial in result.tried if trial.chosen]
    assert result.after.loss <= least * (1 + 1e-4)
    assert chosen.tolerance == min(at for at, loss in walked.items() if loss <= least * (1 + 1e-4))
    (output,) = report.verification.outputs
    # What was measured is not called allowed.
    assert output.bound_kind == ("measured" if chosen.tolerance else "noise")


def test_where_no_tolerance_is_let_through_the_exact_shift_still_is():
    # Training data as the judge: labels learnt by heart, so that any deviation raises the loss; dead inputs cost none.
    report = run(heldout=npz("calibration.npz", slice(300, 600)), tolerance=0.02).report
    assert any("exact shifts only" in note for note in report.decisions)
    assert not report.heldout_result.tried[0].accepted
    (output,) = report.verification.outputs
    assert output.rel < 1e-5
    assert any(layer.status == "shifted" and layer.tolerance == 0.0 for layer in report.layers)


def test_auto_needs_a_judge():
    with pytest.raises(InputError, match="held-out"):
        run(heldout="none", tolerance="auto")


def test_the_tolerance_auto_takes_does_not_hurt_data_that_nobody_showed_it(bench, tmp_path):
    result = run(tmp_path / "out.onnx", tolerance="auto")
    model = ModelFile.load(tmp_path / "out.onnx")
    moved = {layer.name: model.initializer(layer.name) for layer in result.report.layers}
    assert top1(bench, moved, UNSEEN) > top1(bench, {}, UNSEEN) + 0.01


def test_a_stochastic_shift_is_exact_on_its_batch_and_says_what_it_is_elsewhere():
    report = run(stochastic=30, heldout="none").report
    (output,) = report.verification.outputs
    assert output.samples == 30
    assert output.passed
    assert all(layer.rank == 30 for layer in report.layers)
    assert any("over all 300" in note for note in report.decisions)
    assert "30 samples" in report.summary


@pytest.mark.parametrize(("size", "word"), [(3, "classes"), (400, "samples")])
def test_stochastic_batches_out_of_range_are_refused(size, word):
    with pytest.raises(InputError, match=word):
        run(stochastic=size)


def test_no_candidate_is_judged_twice():
    report = run(tolerance=0.1).report
    tried = report.heldout_result.tried
    assert {"all layers in parallel", "layer by layer"} <= {trial.what.split(",")[0] for trial in tried}
    assert len({trial.loss for trial in tried}) == len(tried)


def test_equal_held_out_data_is_noticed():
    report = run(heldout=CALIBRATION).report
    assert any("same fingerprint" in warning for warning in report.warnings)
    assert not any("fingerprint" in warning for warning in run().report.warnings)


def test_a_layer_solved_for_recaptured_inputs_is_the_least_squares_ball_of_a_slow_reference(prepared):
    bench, samples = prepared.bench, prepared.data.calibration
    layers, _ = captured(prepared, prepared.data, Norm())
    residual = 0.1
    candidate = layer_by_layer(bench, layers, samples, residual)
    first, second = bench.weights[:2]
    arrays = {first.name: candidate.arrays[first.name]}

    def hidden(weights):
        x = CALIBRATION["pixels"].astype(np.float64)
        w1 = first.form.to_matrix(weights.get(first.name, bench.model.initializer(first.name)))[0]
        return np.maximum(x @ w1.astype(np.float64) + bench.model.initializer("fc1.bias"), 0)

    before, after = hidden({}), hidden(arrays)
    v = second.form.to_matrix(bench.model.initializer(second.name))[0].astype(np.float64)
    w = second.form.to_matrix(candidate.arrays[second.name])[0].astype(np.float64)
    target = before @ v
    best, *_ = np.linalg.lstsq(after, target, rcond=1e-6)
    floor = np.linalg.norm(after @ best - target) / np.linalg.norm(target)
    # The ball is used up to its edge ...
    assert np.linalg.norm(after @ w - target) / np.linalg.norm(target) == pytest.approx(
        np.hypot(floor, residual), rel=1e-3
    )
    # ... and stationarity holds: the gradient of the residual is parallel to W.
    gradient = after.T @ (target - after @ w)
    cosine = (gradient * w).sum() / np.linalg.norm(gradient) / np.linalg.norm(w)
    assert cosine == pytest.approx(1, abs=1e-4)
    # Negative control: the parallel solution ignores what moved before it, and misses the same target by more.
    parallel = second.form.to_matrix(layers.candidate(residual).arrays[second.name])[0].astype(np.float64)
    assert np.linalg.norm(after @ parallel - target) > 1.05 * np.linalg.norm(after @ w - target)


def test_cross_moments_of_captures_equal_the_stacked_rows(prepared):
    bench = prepared.bench
    (tap,) = bench.taps[:1]
    moved, cross = recapture.capture_moved(bench, [tap], prepared.data.calibration, {})[tap]
    x = torch.from_numpy(CALIBRATION["pixels"].astype(np.float64))
    torch.testing.assert_close(cross[0], x.T @ x)
    torch.testing.assert_close(moved.gram()[0], x.T @ x)
