"""`--objective curvature` through the whole pass: every tolerance, every kind of layer, and where it cannot be had."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import numpy_helper

from onnx_optshift import api
from onnx_optshift.commands import shift
from onnx_optshift.run.budget import Budget, Costs, make_plan
from onnx_optshift.run.capture import captured, layers_maker, objective_of
from onnx_optshift.run.feature_curvature import NONFINITE_SLOPES, UNSEEN, feature_curvature
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.finish import as_matrix

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"


def run(model, calibration, out=None, heldout="none", **settings):
    settings = {"objective": "curvature", "device": "cpu", "force": True, **settings}  # few samples, on purpose
    return shift.run(model, out, [calibration], [heldout], Settings(**settings)).report


def arrays(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def feeds(name, count=None, labels=False):
    with np.load(MODELS / name / "calibration.npz") as data:
        return {key: data[key][:count] for key in data.files if labels or key != "labels"}


def prepared_with(model, inputs, **settings):
    return prepare(model, Settings(**{"objective": "curvature", "device": "cpu", **settings}), [inputs])


def layers_of(model, inputs, **settings):
    """Layers of a model with their statistics, as the pass has them."""
    prepared = prepared_with(model, inputs, **settings)
    return captured(prepared, prepared.data, objective_of(prepared))[0]


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
        problem = layers.problem(weight)
        metric = problem.metric
        if metric is None:
            assert (problem.note, by_name[name].reason) == (UNSEEN, f"shifted {UNSEEN}")
            assert by_name[name].curvature_ratio is None
            np.testing.assert_array_equal(found[name], other[name])
            continue
        v, w, p = (metric.square(as_matrix(some[name], weight.form)) for some in (before, found, other))
        assert w < p * (1 - 1e-6), "the plain norm's solution is another, and heavier"
        assert by_name[name].reason == "shifted"
        assert by_name[name].curvature_ratio == pytest.approx(w / v, rel=1e-6)
        assert by_name[name].norm_after > np.linalg.norm(other[name])
    assert sum(layer.curvature_ratio is not None for layer in report.layers) == 2
    assert {layer.headline.name for layer in report.layers} == {"weighted norm"}
    assert {layer.headline.name for layer in plain.layers} == {"norm"}


def test_solving_again_with_the_same_metric_finds_nothing_more():
    prepared = prepared_with(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 200))
    store = prepared.bench.statistics(prepared.data.calibration)
    slopes = feature_curvature(prepared.bench, prepared.data.fit)

    def moved(content):
        return Layers(prepared.weights, store, content, objective_of(prepared), slopes=slopes).candidate(0.0).arrays

    once = moved(prepared.model.initializer)
    assert len(once) == 3
    assert not moved(lambda name: once[name])


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


def test_passes_instead_of_memory_change_nothing():
    prepared = prepared_with(MODELS / "digits_transformer" / "model.onnx", feeds("digits_transformer", 20))

    def found(bench):
        make = layers_maker(replace(prepared, bench=bench), prepared.data, objective_of(prepared))
        return make(bench.statistics(prepared.data.calibration)).candidate(0.05).arrays

    together = found(prepared.bench)
    apart = found(replace(prepared.bench, waves=tuple((tap,) for tap in prepared.bench.taps)))
    assert len(prepared.bench.waves) == 1 < len(prepared.bench.taps)
    assert together.keys() == apart.keys()
    assert all(np.array_equal(array, apart[name]) for name, array in together.items())


def test_memory_for_the_metric_is_planned():
    bench = prepared_with(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 20)).bench
    values = {tap.value: 1 for tap in bench.taps}
    known = {"external": 0, "inline": 0, "values": values, "outputs": 1, "rows": bench.rows, "samples": 20, "parts": 1}
    plain, weighed = (Costs(**known, metric=metric, apart=False) for metric in (False, True))
    assert weighed.held(bench.taps) - plain.held(bench.taps) >= sum(2 * 8 * weight.d**2 for weight in bench.weights)
    free, unweighed = (make_plan(costs, bench.weights, 1, Budget(2**40, 0, None, True)) for costs in (weighed, plain))
    assert free.predicted > unweighed.predicted
    tight = make_plan(weighed, bench.weights, 1, Budget(free.predicted - 1, 0, None, True))
    assert len(free.waves) == 1 < len(tight.waves)
    assert tight.predicted < free.predicted


def test_layers_that_read_the_same_value_share_a_metric():
    layers = layers_of(MODELS / "digits_transformer" / "model.onnx", feeds("digits_transformer", 20))
    q, k, o = (layers.problem(layers.weights[f"attention.{part}.weight"]).metric for part in "qko")
    assert q is k
    assert q is not o


def test_other_objectives_measure_no_metric():
    layers = layers_of(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 20), objective="norm")
    assert {layers.problem(weight).metric for weight in layers.weights.values()} == {None}


def test_inspect_tells_what_could_be_shifted():
    report = api.inspect(
        MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 60), objective="curvature", device="cpu"
    )
    assert {layer.reason for layer in report.layers} == {"inspect: this layer could be shifted"}


def test_a_solution_that_rounding_makes_heavier_is_not_written():
    layers = layers_of(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp", 60))
    weight = layers.weights["fc2.weight"]
    problem = layers.problem(weight)
    found = layers.objective.solve(problem, 0.0)
    heavier, lighter = (replace(found, matrix=factor * problem.matrix) for factor in (1.5, 0.5))
    assert not layers.finish(weight, problem, heavier, 0.0).moved
    assert layers.finish(weight, problem, lighter, 0.0).moved


def test_the_comparison_is_at_equal_deviation_and_tells_the_objectives_apart():
    import compare_objectives as tool

    comparison = tool.Comparison(MODELS / "digits_mlp", Settings(device="cpu", max_samples=60), probes=0)
    ways = {way.name: way for way in comparison.ways(1)}
    for name in ("norm", "curvature"):
        candidate = comparison.at(ways[name].candidate_at[0], 0.1)
        deviation = comparison.bench.outputs.deviation(comparison.samples, candidate.arrays).largest_rel()
        assert deviation == pytest.approx(0.1, rel=tool.CLOSE)
    norm, curvature = (comparison.measured(ways[name], 0.1) for name in ("norm", "curvature"))
    assert norm.norm < curvature.norm < 1
    assert (norm.weighted, comparison.measure([], []).norm) == (None, 1.0)
    assert curvature.weighted < 1
    row = tool.line("m", "0.1", "curvature", curvature, norm)
    assert len(row.split("|")) == len(tool.HEADER) + 2
    assert f"{curvature.judged[0].score.loss:.4f}" in row
