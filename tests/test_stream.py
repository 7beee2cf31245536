"""What the model is fed to fill a fixed batch dimension is no data: it enters no moment, deviation, count or loss."""

import numpy as np
import pytest
import tiny_models as tiny
import torch

import onnx_optshift
from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
from onnx_optshift.calibration.source import Batch
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.capture.stream import sample_axis, stream, without_padding
from onnx_optshift.decide.loss import choose_loss
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run.bench import Bench

SIZE, SAMPLES = 4, 6  # one full batch, and one of two samples and two copies
W, U, K = tiny.weight(5, 3), tiny.weight(5, 5, seed=1), tiny.weight(3, 2, 2, 2)
# Where a layer's input holds the samples. B stands for the batch dimension; ids of one sample follow one another.
LAYOUTS = {
    "matrix": ("x[B, 5]", "y[B, 3]", "y = MatMul(x, W)"),
    "tokens": ("x[B, 8, 5]", "y[B, 8, 3]", "y = MatMul(x, W)"),
    "computed": ("x[B, 8, 5]", "y[B, 8, 3]", "h = MatMul(x, U) a = Relu(h) y = MatMul(a, W)"),
    "folded": ("x[B, 8, 5]", "y[n, 3]", "s = Constant<value_ints = [-1, 5]>() h = Reshape(x, s) y = MatMul(h, W)"),
    # 8 steps are a multiple of 4 samples: the leading axis looks like the samples' and is not.
    "time first": ("x[B, 8, 5]", "y[8, B, 3]", "h = Transpose<perm = [1, 0, 2]>(x) y = MatMul(h, W)"),
    "time first, folded": (
        "x[B, 8, 5]",
        "y[n, 3]",
        "s = Constant<value_ints = [-1, 5]>() t = Transpose<perm = [1, 0, 2]>(x) h = Reshape(t, s) y = MatMul(h, W)",
    ),
    "samples last": ("x[B, 5]", "y[3, B]", "h = Transpose<perm = [1, 0]>(x) V = Transpose(W) y = MatMul(V, h)"),
    "images": ("x[B, 2, 6, 7]", "y[B, 3, 5, 6]", "y = Conv(x, K)"),
    "inside a Scan": (
        "x[B, 8, 5]",
        "y[8, B, 3]",
        """h = Transpose<perm = [1, 0, 2]>(x)
           y = Scan<num_scan_inputs = 1, body = step (float[B, 5] one) => (float[B, 3] out) { out = MatMul(one, W) }>(h)
        """,
    ),
}
DATA = {
    name: np.random.default_rng(len(name)).standard_normal((SAMPLES, *shape)).astype(np.float32)
    for name, (x, _, _) in LAYOUTS.items()
    for shape in [[int(size) for size in x.rstrip("]").split(",")[1:]]]
}


def model(name, batch):
    x, y, body = (text.replace("B", str(batch)) for text in LAYOUTS[name])
    used = {key: value for key, value in (("W", W), ("U", U), ("K", K)) if key in body.replace("(", " ")}
    return tiny.model(f"g (float{x.removeprefix('x')} x) => (float{y.removeprefix('y')} y) {{ {body} }}", used)


def bench_and_samples(name, batch=SIZE, **arrays):
    source = ModelFile.load(model(name, batch))
    weights, _ = discover(source, Selection())
    assert weights
    specs = [InputSpec(spec.name, spec.dtype, spec.shape) for spec in source.inputs]
    return Bench.open(source, weights, resolve_device("cpu"), batch_size=SIZE), load(
        [{"x": DATA[name]} | arrays], specs
    )


def numpy_rows(name):
    """Rows that meet W or K, of the real samples only, in any order: by numpy."""
    x = DATA[name]
    if name == "images":
        return np.stack([
            x[n, :, i : i + 2, j : j + 2].ravel() for n in range(SAMPLES) for i in range(5) for j in range(6)
        ])
    return (np.maximum(x @ U, 0) if name == "computed" else x).reshape(-1, 5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_moments_are_those_of_the_real_samples(name):
    bench, samples = bench_and_samples(name)
    assert [batch.padding for batch in samples.batches(SIZE)] == [0, 2]
    (weight,) = (w for w in bench.weights if w.name in {"W", "K"})
    moments = bench.capture(bench.taps, samples)[weight.uses[0].tap]
    rows = numpy_rows(name).astype(np.float64)
    assert moments.rows == len(rows)
    # float32 activations, summed in float64.
    np.testing.assert_allclose(moments.gram()[0], rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.total[0], rows.sum(0), rtol=1e-5, atol=1e-5)
    padded = np.concatenate([rows, rows[-len(rows) // SAMPLES :]])
    assert not np.allclose(moments.gram()[0], padded.T @ padded, rtol=1e-3)  # negative control


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_deviations_and_losses_are_those_of_the_real_samples(name):
    labels = np.arange(SAMPLES) % 3
    fixed, samples = bench_and_samples(name, labels=labels)
    free, same = bench_and_samples(name, batch=SAMPLES, labels=labels)
    batches = [(batch, outputs) for batch, outputs in fixed.outputs.reference(samples)]
    ((whole, expected),) = free.outputs.reference(same)
    assert sum(outputs["y"].size for _, outputs in batches) == expected["y"].size
    assert sum(batch.rows for batch, _ in batches) == whole.rows == SAMPLES
    generator = np.random.default_rng(0)
    originals = {weight.name: fixed.model.initializer(weight.name) for weight in fixed.weights}
    moved = {n: (a + generator.normal(0, 0.1, a.shape)).astype(np.float32) for n, a in originals.items()}
    found = fixed.outputs.deviation(samples, moved).results()["y"]
    wanted = free.outputs.deviation(same, moved).results()["y"]
    assert found.samples == wanted.samples == SAMPLES
    np.testing.assert_allclose([found.rel, found.max_abs], [wanted.rel, wanted.max_abs], rtol=1e-5)
    assert found.top1_agreement == wanted.top1_agreement
    if name == "matrix":
        loss = choose_loss(expected, labels, SAMPLES)
        parts = [loss.per_sample(outputs, outputs, batch.labels, batch.rows)[0] for batch, outputs in batches]
        np.testing.assert_allclose(
            np.concatenate(parts), loss.per_sample(expected, expected, labels, SAMPLES)[0], rtol=1e-5
        )


def test_a_run_counts_real_samples_whatever_the_batch():
    # Through the public functions alone: rows, samples, argmax agreement, held-out loss.
    x = np.random.default_rng(0).standard_normal((14, 5)).astype(np.float32)
    x[:, 4] = x[:, 0] - x[:, 1]
    calibration, heldout = ({"x": part, "labels": np.arange(len(part)) % 3} for part in (x[:9], x[9:]))
    found = []
    for batch in (SIZE, "n"):
        choices = {"tolerance": 0.05, "device": "cpu", "force": True}  # of nine samples
        result = onnx_optshift.shift(model("matrix", batch), calibration, heldout=heldout, **choices)
        (layer,), proof, judged = result.report.layers, result.report.verification, result.report.heldout_result
        assert layer.status == "shifted"
        output = proof.outputs[0]
        found.append((layer.rows, output.samples, output.top1_agreement, judged.before.loss, judged.before.top1))
    assert found[0][:3] == found[1][:3] == (9, 9, found[1][2])
    np.testing.assert_allclose(found[0][3:], found[1][3:], rtol=1e-5)


def batch_of(rows=2, padding=2):
    return Batch({}, None, np.arange(rows), padding)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_what_holds_no_copies_stays_whole(kind):
    table = np.random.default_rng(0).standard_normal((8, 5))  # positions, say: as long as two batches
    assert without_padding(kind(table), batch_of()).shape == (8, 5)
    assert without_padding(kind(table.astype(np.float32)), batch_of(4, 0)).shape == (8, 5)
    copied = table.copy()
    copied[4:6] = copied[6:8] = copied[2:4]
    assert without_padding(kind(copied), batch_of()).shape == (4, 5)  # negative control
    for shape in ((), (3,), (0, 5), (3, 0)):
        assert without_padding(kind(np.zeros(shape)), batch_of()).shape == shape


def test_copies_are_recognized_up_to_rounding_and_with_values_that_are_not_finite():
    value = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16)
    value[1, :3] = np.nan, np.inf, -np.inf
    value[2:] = value[1]
    value[3, 5] *= np.float16(1.002)
    np.testing.assert_array_equal(without_padding(value, batch_of()), value[:2])
    value[3, 0] = 0
    assert len(without_padding(value, batch_of())) == 4
    words = np.array(["a", "b", "b", "b"], object)
    assert without_padding(words, batch_of()).tolist() == ["a", "b"]
    assert len(without_padding(words[::-1], batch_of())) == 4


def test_the_axis_of_the_samples():
    assert [sample_axis(shape, 4) for shape in ((4, 3), (12, 3), (3, 4), (3, 5), (), (0, 4))] == [
        0,
        0,
        1,
        None,
        None,
        1,
    ]
    assert sample_axis((4, 7, 4), 4, first=1) == 2


def test_an_input_that_a_layer_reads_is_not_asked_of_the_model(monkeypatch):
    # As an output it would share the input's memory, which ONNX Runtime fills again.
    bench, samples = bench_and_samples("matrix")
    session = bench.sessions.probe(bench.taps)
    asked = []
    run = session.run_tensors
    monkeypatch.setattr(
        session, "run_tensors", lambda feeds, outputs: asked.append(list(outputs)) or run(feeds, outputs)
    )
    seen = []
    stream(
        session,
        bench.taps,
        samples.batches(SIZE),
        lambda tap, batch, value: seen.append(value.clone()),
        done=seen.append,
    )
    assert asked == [[], []]
    np.testing.assert_array_equal(torch.cat([v for v in seen if isinstance(v, torch.Tensor)]), DATA["matrix"])
    assert [v for v in seen if isinstance(v, int)] == [4, 2]
