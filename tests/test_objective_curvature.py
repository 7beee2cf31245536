"""`--objective curvature` through the whole pass: every tolerance, every kind of layer, and where it cannot be had."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
import torch
from onnx import numpy_helper

from onnx_optshift import optimize
from onnx_optshift.calibration.load import load
from onnx_optshift.data import input_specs
from onnx_optshift.diagnose.feature_curvature import feature_curvature
from onnx_optshift.layers import NONFINITE_SLOPES, UNSEEN, Layers
from onnx_optshift.settings import Settings
from onnx_optshift.workbench import open_model, open_workbench

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"


def run(model, calibration, out=None, heldout="none", **settings):
    settings = {"objective": "curvature", "device": "cpu", **settings}
    return optimize.run(model, out, [calibration], [heldout], Settings(**settings)).report


def arrays(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def feeds(name, count=None, labels=False):
    with np.load(MODELS / name / "calibration.npz") as data:
        return {key: data[key][:count] for key in data.files if labels or key != "labels"}


def layers_of(model, inputs, objective="curvature"):
    """Layers of a model and the metric of each weight, put together without the pass."""
    opened, weights, _ = open_model(model, Settings())
    bench = open_workbench(opened, weights, Settings(device="cpu"))
    samples = load([inputs], input_specs(opened))
    slopes = feature_curvature(bench, samples) if objective == "curvature" else None
    return Layers(weights, bench.collect(samples), opened.initializer, objective=objective, slopes=slopes)


def test_exact_keeps_the_outputs_and_makes_the_weighted_norm_least(tmp_path):
    # Fewer samples than d. With more, only dead units are free here, and in any norm the least is to leave them out.
    model, inputs = MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 30)
    report = run(model, inputs, tmp_path / "curvature.onnx")
    plain = run(model, inputs, tmp_path / "norm.onnx", objective="norm")
    assert report.verification.passed
    assert report.verification.outputs[0].rel < 1e-5
    layers = layers_of(model, inputs)
    before, found, other = (arrays(path) for path in (model, tmp_path / "curvature.onnx", tmp_path / "norm.onnx"))
    by_name = {layer.name: layer for layer in report.layers}
    for name, weight in layers.weights.items():
        metric = layers.metric(weight)
        if isinstance(metric, str):
            assert (metric, by_name[name].reason) == (UNSEEN, f"shifted {UNSEEN}")
            assert by_name[name].curvature_ratio is None
            np.testing.assert_array_equal(found[name], other[name])
            continue
        v, w, p = (metric.square(layers.as_matrix(weight, some[name])) for some in (before, found, other))
        assert w < p * (1 - 1e-6), "the plain norm's solution is another, and heavier"
        assert by_name[name].reason == "shifted"
        assert by_name[name].curvature_ratio == pytest.approx(w / v, rel=1e-6)
        assert by_name[name].norm_after > np.linalg.norm(other[name])
    assert sum(layer.curvature_ratio is not None for layer in report.layers) == 2
    assert any("curvature: tr(WᵀMW)" in note for note in report.decisions)
    assert not any("curvature" in note for note in plain.decisions)


def test_solving_again_with_the_same_metric_finds_nothing_more():
    inputs = feeds("digits_mlp", 200)
    layers = layers_of(MODELS / "digits_mlp" / "model.onnx", inputs)
    once = layers.candidate(0.0)
    assert len(once.arrays) == 3
    again = Layers(
        layers.weights.values(),
        layers.statistics,
        lambda name: once.arrays[name],
        objective="curvature",
        slopes=layers._slopes,
    )
    assert not again.candidate(0.0).arrays


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_convolutions_groups_and_attention(name, tolerance, tmp_path):
    report = run(MODELS / name / "model.onnx", feeds(name, 60), tmp_path / "out.onnx", tolerance=tolerance)
    assert report.verification.passed
    weighed = [layer for layer in report.layers if layer.curvature_ratio is not None]
    assert len(weighed) >= 3
    assert all(layer.curvature_ratio < 1 for layer in weighed)
    if tolerance:
        assert report.verification.outputs[0].rel > 0.8 * tolerance
    if name == "digits_cnn" and tolerance:
        assert max(layer.groups for layer in weighed) == 32


def test_held_out_data_chooses_the_tolerance(tmp_path):
    folder = MODELS / "noisy_mlp"
    report = run(
        folder / "model.onnx",
        feeds("noisy_mlp", labels=True),
        tmp_path / "out.onnx",
        heldout=folder / "heldout.npz",
        tolerance="auto",
    )
    assert report.verification.passed
    assert report.heldout_result.after.loss < 0.7 * report.heldout_result.before.loss


def test_a_stochastic_batch_is_kept_exactly(tmp_path):
    inputs = feeds("digits_mlp", 200, labels=True)
    report = run(MODELS / "digits_mlp" / "model.onnx", inputs, tmp_path / "out.onnx", stochastic=40)
    assert report.verification.passed
    assert report.verification.outputs[0].samples == 40
    assert any(layer.curvature_ratio is not None for layer in report.layers)


def test_a_part_of_the_layers_is_weighed_by_all(tmp_path):
    model, inputs = MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 100)
    run(model, inputs, tmp_path / "all.onnx")
    report = run(model, inputs, tmp_path / "one.onnx", nodes_to_include=("fc2.weight",))
    assert [layer.reason for layer in report.layers if layer.status == "shifted"] == ["shifted"]
    np.testing.assert_array_equal(
        arrays(tmp_path / "one.onnx")["fc2.weight"], arrays(tmp_path / "all.onnx")["fc2.weight"]
    )


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_half_precision(tolerance, tmp_path):
    tensors = {
        "W1": tiny_models.weight(8, 16, dtype=np.float16),
        "W2": tiny_models.weight(16, 12, dtype=np.float16),
        "W3": tiny_models.weight(12, 3, dtype=np.float16),
    }
    text = (
        "g (float16[N,8] x) => (float16[N,3] y) { h = MatMul(x, W1) r = Relu(h) k = MatMul(r, W2) y = MatMul(k, W3) }"
    )
    path = tmp_path / "in.onnx"
    onnx.save(tiny_models.model(text, tensors), path)
    x = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float16)
    report = run(path, {"x": x}, tmp_path / "out.onnx", tolerance=tolerance)
    assert report.verification.passed
    ratios = {layer.name: layer.curvature_ratio for layer in report.layers}
    assert ratios["W1"] is None
    assert ratios["W2"] < 0.999
    assert ratios["W3"] < 0.999


def test_where_the_metric_overflows_the_plain_norm_serves_and_says_so(tmp_path):
    tensors = {"W1": np.full((1, 2), 250, np.float16), "W2": np.array([[1], [3]], np.float16) * np.float16(2.0**-9)}
    text = "g (float16[N,1] x) => (float16[N,1] y) { h = MatMul(x, W1) y = MatMul(h, W2) }"
    path = tmp_path / "in.onnx"
    onnx.save(tiny_models.model(text, tensors), path)
    report = run(path, {"x": np.full((4, 1), 260, np.float16)}, tmp_path / "out.onnx")
    layer = next(layer for layer in report.layers if layer.name == "W2")
    assert layer.reason == f"shifted {NONFINITE_SLOPES}"
    assert layer.curvature_ratio is None
    np.testing.assert_allclose(arrays(tmp_path / "out.onnx")["W2"], [[2.0**-8], [2.0**-8]])


def test_a_tight_memory_limit_costs_passes_and_changes_nothing(tmp_path):
    model, inputs = MODELS / "digits_transformer" / "model.onnx", feeds("digits_transformer", 20)
    run(model, inputs, tmp_path / "free.onnx", batch_size=10)
    opened, weights, _ = open_model(model, Settings())
    samples = load([inputs], input_specs(opened))
    plan = open_workbench(opened, weights, Settings(device="cpu", batch_size=10)).plan(samples, metric=True)
    limit = {"batch_size": 10, "max_memory": plan.predicted - 1}
    tight = open_workbench(opened, weights, Settings(device="cpu", **limit)).plan(samples, metric=True)
    assert plan.waves == 1
    assert tight.waves > 1
    run(model, inputs, tmp_path / "tight.onnx", **limit)
    assert (tmp_path / "tight.onnx").read_bytes() == (tmp_path / "free.onnx").read_bytes()


def test_memory_for_the_metric_is_planned(tmp_path):
    opened, weights, _ = open_model(MODELS / "digits_mlp" / "model.onnx", Settings())
    samples = load([feeds("digits_mlp", 20)], input_specs(opened))
    plain, weighed = (
        open_workbench(opened, weights, Settings(device="cpu")).plan(samples, metric=metric) for metric in (False, True)
    )
    squares = sum(8 * weight.d**2 for weight in weights)
    assert weighed.statistics - plain.statistics >= 2 * squares
    assert weighed.predicted > plain.predicted


def test_layers_that_read_the_same_value_share_a_metric():
    layers = layers_of(MODELS / "digits_transformer" / "model.onnx", feeds("digits_transformer", 20))
    q, k, o = (layers.weights[f"attention.{part}.weight"] for part in "qko")
    assert layers.metric(q) is layers.metric(k)
    assert layers.metric(q) is not layers.metric(o)


def test_other_objectives_measure_no_metric():
    layers = layers_of(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 20), objective="norm")
    assert {layers.metric(weight) for weight in layers.weights.values()} == {None}
    assert {solved.weighted for solved in layers.candidate(0.1).solved.values()} == {None}


def test_inspect_tells_what_could_be_shifted():
    inputs = feeds("digits_mlp", 60)
    settings = Settings(objective="curvature", device="cpu")
    report = optimize.inspect(MODELS / "digits_mlp" / "model.onnx", [inputs], settings)
    assert {layer.reason for layer in report.layers} == {"inspection: this layer could be shifted"}


def test_a_solution_that_rounding_makes_heavier_is_not_written():
    layers = layers_of(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 60))
    weight = layers.weights["fc2.weight"]
    shift = layers.solve(weight, 0.0).shift
    assert layers.written(weight, _with(shift, 1.5 * layers.matrix(weight))).array is None
    assert layers.written(weight, _with(shift, 0.5 * layers.matrix(weight))).array is not None


def _with(shift, matrix):
    return type(shift)(**{**vars(shift), "matrix": torch.as_tensor(matrix)})


def test_the_comparison_is_at_equal_deviation_and_tells_the_objectives_apart(monkeypatch):
    spec = importlib.util.spec_from_file_location("compare_objectives", ROOT / "tools" / "compare_objectives.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_objectives", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    settings = Settings(device="cpu", max_samples=60)
    comparison = module.Comparison(MODELS / "digits_mlp", settings, probes=0)
    ways = dict(comparison.ways(1))
    found = {name: comparison.at(ways[name][0], 0.1) for name in ("norm", "curvature")}
    for candidate in found.values():
        deviation = comparison.bench.deviation(comparison.samples, candidate.arrays).largest_rel()
        assert deviation == pytest.approx(0.1, rel=module.CLOSE)
    norm, curvature = (comparison.measure([found[name]]) for name in ("norm", "curvature"))
    assert norm.norm < curvature.norm < 1
    assert (norm.weighted, comparison.measure([]).norm) == (None, 1.0)
    assert curvature.weighted < 1
    row = module.line("m", "0.1", "curvature", curvature, norm)
    assert len(row.split("|")) == len(module.HEADER) + 2
    assert f"{comparison.measure([found['curvature']]).judged[0].score.loss:.4f}" in row
