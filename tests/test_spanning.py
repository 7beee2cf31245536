"""An exact run captures rows only while they leave a layer freedom; what it writes is what all rows would give."""

import numpy as np
import onnx
import pytest
import tiny_models as tiny
import torch

import onnx_optshift
from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.geometry import MatrixRows, Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.sessions import Sessions
from onnx_optshift.run.spanning import REPRESENTATIVE, Spanning
from onnx_optshift.stats.moments import InputMoments

D, SAMPLES, BATCH = 12, 200, 8
TEXT = "g (float[N,12] x, float[N,12] z) => (float[N,5] y, float[N,5] w) { y = MatMul(x, W) w = MatMul(z, V) }"
TENSORS = {"W": tiny.weight(D, 5), "V": tiny.weight(D, 5, seed=1)}


def data(free=0):
    """Rows of x that span all directions; rows of z that leave `free` of them out."""
    rng = np.random.default_rng(3)
    x, z = rng.standard_normal((2, SAMPLES, D))
    if free:
        basis, _ = np.linalg.qr(rng.standard_normal((D, D - free)))
        z = z @ basis @ basis.T
    return {"x": x.astype(np.float32), "z": z.astype(np.float32)}


def run(arrays, **options):
    model = tiny.model(TEXT, TENSORS)
    return onnx_optshift.shift(model, arrays, batch_size=BATCH, heldout=["none"], device="cpu", **options)


def rows(report):
    return {layer.weight: layer.rows for layer in report.layers}


def test_the_pass_ends_with_the_last_layer_that_had_freedom():
    report = run(data()).report
    assert {layer.status for layer in report.layers} == {"unchanged"}
    assert all(D < count < SAMPLES for count in rows(report).values())
    assert report.verification.identical_bytes


def test_a_layer_with_freedom_gets_all_rows_and_the_other_no_more_than_figures_need():
    result = run(data(free=3))
    counts = rows(result.report)
    assert counts["V"] == SAMPLES
    assert REPRESENTATIVE * D <= counts["W"] <= REPRESENTATIVE * D + BATCH
    statuses = {layer.weight: layer.status for layer in result.report.layers}
    assert statuses == {"W": "unchanged", "V": "shifted"}
    # The one solution that all rows leave, by another way.
    z = data(free=3)["z"].astype(np.float64)
    expected = np.linalg.pinv(z, rcond=1e-6) @ (z @ TENSORS["V"])
    found = onnx.numpy_helper.to_array(next(t for t in result.model.graph.initializer if t.name == "V"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"tolerance": 0.05}, {"objective": "range", "quantization_bits": (4,)}])
def test_what_uses_more_than_the_rank_gets_all_rows(options):
    assert set(rows(run(data(), **options).report).values()) == {SAMPLES}


def test_directions_that_come_late_are_seen():
    """Negative control of stopping: the first samples leave a direction out, and a later one brings it."""
    arrays = data(free=1)
    arrays["z"][-1] = data()["z"][-1]
    result = run(arrays)
    assert rows(result.report)["V"] == SAMPLES
    assert {layer.status for layer in result.report.layers} == {"unchanged"}


def test_figures_from_few_rows_are_not_shown():
    frontiers = {layer.weight: layer.frontier for layer in run(data()).report.layers}
    assert frontiers["W"] == frontiers["V"] == ()
    many = {layer.weight: layer.frontier for layer in run(data(free=3)).report.layers}
    assert many["W"]
    assert many["V"]


def test_rows_that_only_rounding_makes_span_do_not_count():
    model = ModelFile.load(tiny.model(TEXT, TENSORS))
    weights, _ = discover(model, Selection())
    tap = Tap("x", MatrixRows(), 1, D)
    assert {use.tap for weight in weights for use in weight.uses} >= {tap}
    thin = torch.randn(1, 100, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale, spans in ((1.0, True), (1e-8, False)):
        spanning, moments = Spanning(weights, model.initializer), InputMoments(1, D)
        rows = thin.clone()
        rows[..., 0] *= scale
        moments.update(rows)
        assert (spanning.wanted({tap: moments}) == []) == spans


def test_captures_after_one_another_know_nothing_of_each_other():
    model = ModelFile.load(tiny.model(TEXT, TENSORS))
    weights, _ = discover(model, Selection())
    bench = Bench.open(model, weights, resolve_device("cpu"), batch_size=BATCH)
    specs = [InputSpec(spec.name, spec.dtype, spec.shape) for spec in model.inputs]
    full, part = load([data()], specs), load([data(free=3)], specs)
    spanning = Spanning(weights, model.initializer)
    bench.capture(bench.taps, full, spanning=spanning)
    assert spanning.open(bench.taps) == []
    moments = bench.capture(bench.taps, part, spanning=spanning)
    assert [tap.value for tap in spanning.open(bench.taps)] == ["z"]
    assert {tap.value: count.rows for tap, count in moments.items()}["z"] == SAMPLES


def test_captures_in_a_row_share_a_session_and_nothing_else_keeps_it(monkeypatch):
    opened = []
    original = Sessions.open
    monkeypatch.setattr(Sessions, "open", lambda self, *a, **k: opened.append(1) or original(self, *a, **k))
    model = ModelFile.load(tiny.model(TEXT, TENSORS))
    bench = Bench.open(model, discover(model, Selection())[0], resolve_device("cpu"), batch_size=BATCH)
    samples = load([data()], [InputSpec(spec.name, spec.dtype, spec.shape) for spec in model.inputs])
    both = bench.capture(bench.taps, samples)
    one = bench.capture(bench.taps[:1], samples)
    assert len(opened) == 1
    torch.testing.assert_close(one[bench.taps[0]].gram(), both[bench.taps[0]].gram(), rtol=0, atol=0)
    bench.sessions.original()  # negative control: one probe and one other are what was planned for
    bench.capture(bench.taps, samples)
    assert len(opened) == 3
