"""Whatever a mode asks for and whatever held-out data refuses, a run ends with a judged file and a true report."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnx_optshift import shift
from onnx_optshift.commands import publish
from onnx_optshift.decide.decision import UNJUDGED
from onnx_optshift.decide.gate import Gate
from onnx_optshift.solve import quant_range

MODES = {
    "exact": {},
    "tolerance": {"tolerance": 0.05},
    "auto": {"tolerance": "auto"},
    "range, exact": {"objective": "range"},
    "range": {"objective": "range", "tolerance": 0.05},
    "range, many bits": {"objective": "range", "tolerance": 0.02, "quantization_bits": (8,)},
    "range, narrowed": {"objective": "range", "tolerance": 0.02, "quantization_bits": (8,), "snap": False},
    "range, auto": {"objective": "range", "tolerance": "auto", "quantization_bits": (4, 8)},
    "range, blocks": {"objective": "range", "tolerance": 0.05, "range_block": 4},
    "stochastic": {"stochastic": 4},
    "stochastic, any size": {"stochastic": 0},
    "curvature": {"objective": "curvature", "tolerance": 0.05},
    "curvature, auto": {"objective": "curvature", "tolerance": "auto"},
}
# What is decided does not hang on the last per cent of a range, which takes long.
FEW_ITERATIONS = 40
LAYERS = ("W1", "W2", "W3")
TEXT = """g (float[N,8] x) => (float[N,3] y) {
    h = Gemm(x, W1, b)  r = Relu(h)  k = MatMul(r, W2)  t = Tanh(k)  y = MatMul(t, W3) }"""


@pytest.fixture(autouse=True, name="fast")
def fixture_fast(monkeypatch):
    monkeypatch.setattr(quant_range, "MAX_ITERATIONS", FEW_ITERATIONS)


def model():
    weights = {"W1": tiny.weight(8, 6), "b": tiny.weight(6), "W2": tiny.weight(6, 6, seed=1), "W3": tiny.weight(6, 3)}
    return tiny.model(TEXT, weights)


def data(seed, rows, rank):
    """Inputs of a rank, and the classes that chance gives them."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, rank)) @ np.random.default_rng(0).standard_normal((rank, 8))
    return {"x": x.astype(np.float32), "labels": np.arange(rows) % 3}


class Refusing:
    """Gates that refuse every trial in which one of some layers moves, and count what they judge."""

    def __init__(self, monkeypatch, layers):
        self.judged = Counter()
        judge = Gate._judge

        def refuse(gate, arrays, what, tolerance):
            self.judged[tuple((name, array.tobytes()) for name, array in sorted(arrays.items()))] += 1
            trial, after = judge(gate, arrays, what, tolerance)
            bad = bool(arrays.keys() & layers)
            return replace(trial, accepted=not bad, reason="refused by the test" if bad else "fine"), after

        monkeypatch.setattr(Gate, "_judge", refuse)


def weights_of(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def check(result, refused):
    """What holds for every run that was judged on held-out data."""
    report, before = result.report, {t.name: numpy_helper.to_array(t) for t in model().graph.initializer}
    moved = {name for name, array in weights_of(result.path).items() if not np.array_equal(array, before[name])}
    layers = {layer.name: layer for layer in report.layers}
    assert report.verification.passed
    assert {name for name, layer in layers.items() if layer.status == "shifted"} == moved
    assert not moved & refused
    assert all(layer.status in {"shifted", "unchanged", "rejected"} and layer.reason for layer in layers.values())
    held = report.heldout_result
    chosen = [trial for trial in held.tried if trial.chosen]
    assert held.accepted == bool(moved)
    assert len(chosen) == bool(moved)
    assert all(trial.accepted for trial in chosen)
    refusals = [layer for layer in layers.values() if layer.status == "rejected"]
    assert all(layer.name not in moved for layer in refusals)
    if refused == set(LAYERS):
        assert report.verification.identical_bytes
        assert all("refused by the test" in layer.reason or layer.reason == UNJUDGED for layer in refusals)
        assert refusals or all(trial.accepted for trial in held.tried)
    counted = f"{len(moved)} of 3 layers shifted" if moved else "Nothing to gain"
    assert report.summary.startswith(counted)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    refused=st.sets(st.sampled_from(LAYERS)),
    rows=st.integers(12, 60),
    rank=st.integers(1, 8),
    split=st.booleans(),
    labelled=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_run_ends_with_a_judged_file_and_a_true_report(mode, refused, rows, rank, split, labelled, seed):
    calibration, heldout = data(seed, rows, rank), data(seed + 100, 40, rank)
    if not labelled:
        del calibration["labels"], heldout["labels"]
    with pytest.MonkeyPatch.context() as patch:
        gates = Refusing(patch, refused)
        given_data = {} if split else {"heldout": heldout}
        # Twelve samples are refused otherwise: here it is the decisions that are looked at.
        result = shift(model(), calibration, device="cpu", seed=seed, force=True, **given_data, **MODES[mode])
    check(result, refused)
    assert max(gates.judged.values(), default=0) <= 1  # nothing is judged twice


@pytest.mark.parametrize("refused", [{"W1"}, set(LAYERS)], ids=["some", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_against_refusals(mode, refused, monkeypatch):
    Refusing(monkeypatch, refused)
    result = shift(model(), data(1, 40, 3), heldout=data(2, 40, 3), device="cpu", **MODES[mode])
    check(result, refused)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "auto" not in mode])
def test_modes_without_a_gate(mode):
    report = shift(model(), data(1, 40, 3), heldout="none", device="cpu", **MODES[mode]).report
    assert report.verification.passed
    assert report.heldout_result is None


def assert_held_out_result_is_of_the_file(result, heldout):
    """Judged again from the written file, by an independent session."""
    before, after = (np.log(_odds(m, heldout)).mean() for m in (model().SerializeToString(), result.path.read_bytes()))
    held = result.report.heldout_result
    assert held.before.loss == pytest.approx(-before, rel=1e-5)
    assert held.after.loss == pytest.approx(-after, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_held_out_result_is_that_of_the_weights_in_the_file(mode):
    heldout = data(2, 40, 3)
    result = shift(model(), data(1, 40, 3), heldout=heldout, device="cpu", **MODES[mode])
    assert_held_out_result_is_of_the_file(result, heldout)


@pytest.mark.parametrize("mode", ["exact", "tolerance", "auto", "range", "stochastic", "curvature"])
def test_so_it_is_after_backing_off(mode, monkeypatch):
    """The first file is refused: what is written then is another candidate, with another figure."""
    prove, first = publish.Prover.prove, []

    def refuse_first(prover, path, arrays, promise):
        sha256, proof = prove(prover, path, arrays, promise)
        first.append(path.read_bytes())
        return sha256, replace(proof, passed=len(first) > 1)

    monkeypatch.setattr(publish.Prover, "prove", refuse_first)
    heldout = data(2, 40, 3)
    result = shift(model(), data(1, 40, 3), heldout=heldout, device="cpu", **MODES[mode])
    assert result.report.verification.attempts == 2
    assert result.path.read_bytes() == first[1] != first[0]
    assert_held_out_result_is_of_the_file(result, heldout)


def test_backing_off_is_judged_where_held_out_data_was_split_off(monkeypatch):
    """The written candidate covers the samples that judge: its verdict is that of the same layers and residual."""
    prove, attempts = publish.Prover.prove, []

    def refuse_first(*arguments):
        sha256, proof = prove(*arguments)
        attempts.append(sha256)
        return sha256, replace(proof, passed=len(attempts) > 1)

    monkeypatch.setattr(publish.Prover, "prove", refuse_first)
    report = shift(model(), data(1, 60, 3), device="cpu", tolerance=0.05).report
    (chosen,) = [trial for trial in report.heldout_result.tried if trial.chosen]
    assert chosen.what.startswith("backed off")
    assert {layer.tolerance for layer in report.layers if layer.status == "shifted"} == {chosen.tolerance}
    assert report.heldout_result.after.loss == chosen.loss
    assert chosen.tolerance < max(trial.tolerance for trial in report.heldout_result.tried)


def _odds(content, held):
    """Probability of each label, by an independent session."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": held["x"]})
    odds = np.exp(logits.astype(np.float64))
    return (odds / odds.sum(axis=1, keepdims=True))[np.arange(len(odds)), held["labels"]]


def test_small_tolerances_have_all_of_float64():
    # Singular values of 1 to 1e-7: with products in float32 nothing within 1e-5 could be told from noise.
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.standard_normal((48, 48)))[0]
    inputs = ((random.standard_normal((300, 48)) * np.logspace(0, -7, 48)) @ turn).astype(np.float32)
    body = "g (float[b,48] x) => (float[b,10] y) { z = MatMul(x, w) a = Relu(z) y = MatMul(a, v) }"
    model = tiny.model(body, {"w": tiny.weight(48, 64), "v": tiny.weight(64, 10)})
    report = shift(model, inputs, objective="range", quantization_bits=8, tolerance=1e-5).report
    assert any(layer.status == "shifted" for layer in report.layers)
    (output,) = report.verification.outputs
    assert 0 < output.rel <= 1e-5


def test_heldout_data_may_be_an_array():
    model = tiny.model("g (float[b,6] x) => (float[b,4] y) { y = MatMul(x, w) }", {"w": tiny.weight(6, 4)})
    fit, held = (np.random.default_rng(n).standard_normal((n, 6)).astype(np.float32) for n in (100, 40))
    report = shift(model, fit, heldout=held, objective="range", quantization_bits=4, tolerance="auto").report
    assert report.heldout.samples == 40
