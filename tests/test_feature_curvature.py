"""How far earlier weights move a layer's input, against derivatives of small networks written down by hand."""

import numpy as np
import onnx
import pytest
import tiny_models
import torch

from onnx_optshift.calibration.source import Part, Samples
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.feature_curvature import MOST_SAMPLES, feature_curvature

X = np.random.default_rng(5).normal(size=(30, 4)).astype(np.float32)
W1, W2 = tiny_models.weight(4, 6, seed=1), tiny_models.weight(6, 3, seed=2)


def bench_of(proto, names=(), **options):
    model = ModelFile.load(proto)
    chosen, _ = discover(model, Selection(include=tuple(names)))
    return Bench.open(model, chosen, resolve_device("cpu"), **{"batch_size": 11, **options})


def samples_of(x):
    return Samples([Part(len(x), True, lambda: {"x": x})], source="test")


def slopes(bench, samples, **options):
    """Moments of the slopes of every tap."""
    return feature_curvature(bench, samples, **options).load(0)


def curvature_of(body, tensors, probes=300, names=(), x=X, seed=0):
    """M of every weight `[g, d, d]`, as arrays."""
    kind = "float16" if x.dtype == np.float16 else "float"
    shape = ",".join(["N", *map(str, x.shape[1:])])
    bench = bench_of(tiny_models.model(f"g ({kind}[{shape}] x) => ({kind} y) {{ {body} }}", tensors), names)
    found = slopes(bench, samples_of(x), probes=probes, seed=seed)
    moments = {weight.name: found[weight.uses[0].tap] for weight in bench.weights}
    return {name: (part.gram() / part.rows).numpy() for name, part in moments.items()}


def test_behind_one_linear_layer_it_is_the_share_of_active_units_times_the_row_s_length():
    found = curvature_of("h = MatMul(x, W1) r = Relu(h) y = MatMul(r, W2)", {"W1": W1, "W2": W2})
    assert np.abs(found["W1"]).max() == 0, "no weight lies before the first"
    active = (X @ W1 > 0).astype(np.float64)
    expected = (active * np.square(X).sum(axis=1, keepdims=True)).mean(axis=0)
    # 300 probes: a mean of squares is off by √(2/300), 8 %, less what samples average out.
    np.testing.assert_allclose(np.diag(found["W2"][0]), expected, rtol=0.25)
    assert np.abs(found["W2"][0] - np.diag(np.diag(found["W2"][0]))).max() < 0.25 * expected.max()


def test_earlier_layers_couple_features():
    w3 = tiny_models.weight(6, 6, seed=7)
    body = "h = MatMul(x, W1) k = MatMul(h, W3) y = MatMul(k, W2)"
    found = curvature_of(body, {"W1": W1, "W3": w3, "W2": W2})["W2"][0]
    # dk = dx·W1 through W3, and dh·W3 itself: ‖x‖² W3ᵀW3 + ‖h‖² 1.
    lengths = np.square(X).sum(axis=1).mean(), np.square(X @ W1).sum(axis=1).mean()
    expected = lengths[0] * w3.T.astype(np.float64) @ w3 + lengths[1] * np.eye(6)
    np.testing.assert_allclose(found, expected, atol=0.2 * np.abs(expected).max())
    coupled = expected - np.diag(np.diag(expected))
    assert np.abs(coupled).max() > 0.2 * np.abs(expected).max(), "a diagonal metric would not pass"


def test_half_precision_finds_the_same():
    body, tensors = "h = MatMul(x, W1) r = Relu(h) y = MatMul(r, W2)", {"W1": W1, "W2": W2}
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    wide, narrow = curvature_of(body, tensors)["W2"], curvature_of(body, half, x=X.astype(np.float16))["W2"]
    np.testing.assert_allclose(narrow, wide, atol=0.05 * np.abs(wide).max())


def test_patches_of_a_grouped_convolution_have_a_metric_for_each_group():
    x = np.random.default_rng(6).normal(size=(12, 2, 5, 5)).astype(np.float32)
    tensors = {"W1": tiny_models.weight(4, 2, 1, 1), "W2": tiny_models.weight(6, 2, 2, 2)}
    body = "h = Conv(x, W1) y = Conv<group: int = 2>(h, W2)"
    found = curvature_of(body, tensors, x=x)["W2"]
    assert found.shape == (2, 8, 8)
    # h = W1·x pixel by pixel: channels move alone, and pixels p, q of one channel together, as ⟨x_p, x_q⟩.
    patches = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5)
    pixels = patches.reshape(-1, 2, 4).astype(np.float64)
    expected = np.kron(np.eye(2), np.einsum("ncp,ncq->pq", pixels, pixels) / len(pixels))
    for group in found:
        np.testing.assert_allclose(group, expected, atol=0.25 * expected.max())


def test_weights_that_stay_count_as_sources_too():
    chosen = curvature_of("h = MatMul(x, W1) y = MatMul(h, W2)", {"W1": W1, "W2": W2}, probes=2, names=["W2"])
    assert list(chosen) == ["W2"]
    assert np.abs(chosen["W2"]).max() > 0


def test_only_so_many_samples_are_run():
    many = np.random.default_rng(8).normal(size=(MOST_SAMPLES + 40, 4)).astype(np.float32)
    bench = bench_of(tiny_models.two_layers())
    found = slopes(bench, samples_of(many), probes=3)
    assert {moments.rows for moments in found.values()} == {3 * MOST_SAMPLES}


def test_seeded_and_not_dependent_on_batches():
    body, tensors = "h = MatMul(x, W1) y = MatMul(h, W2)", {"W1": W1, "W2": W2}
    one, again, other = (curvature_of(body, tensors, probes=2, seed=seed)["W2"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    whole = slopes(bench_of(tiny_models.two_layers(), batch_size=30), samples_of(X), probes=2)
    parts = slopes(bench_of(tiny_models.two_layers(), batch_size=7), samples_of(X), probes=2)
    for tap, moments in whole.items():
        torch.testing.assert_close(parts[tap].gram(), moments.gram(), rtol=1e-3, atol=1e-6)


def test_what_overflows_is_counted_and_not_averaged():
    # 250 x 260 = 65000 lies below half precision's largest number, 65504; moved by 1.6 per cent it does not.
    tensors = {"W1": np.full((1, 2), 250, np.float16), "W2": np.ones((2, 1), np.float16)}
    proto = tiny_models.model("g (float16[N,1] x) => (float16 y) { h = MatMul(x, W1) y = MatMul(h, W2) }", tensors)
    bench = bench_of(proto)
    found = slopes(bench, samples_of(np.full((4, 1), 260, np.float16)), probes=2)
    assert found[bench.weights[1].uses[0].tap].nonfinite > 0


def test_a_step_that_changes_the_shape_of_an_input_brings_no_slope():
    # The first column is 0 or almost: a sample is kept or not as the weight moves up or down.
    tensors = {"W1": np.array([[1e-9, 1.0], [0.0, 1.0]], np.float32), "W2": tiny_models.weight(2, 3)}
    body = """h = MatMul(x, W1) zero = Constant<value_int = 0>() first = Gather<axis = 1>(h, zero)
        none = Constant<value_float = 0.0>() mask = Greater(first, none)
        kept = Compress<axis = 0>(h, mask) y = MatMul(kept, W2)"""
    bench = bench_of(tiny_models.model(f"g (float[N,2] x) => (float y) {{ {body} }}", tensors), batch_size=1)
    tap = bench.weights[1].uses[0].tap
    assert slopes(bench, samples_of(np.array([[1.0, 0.0]], np.float32)), probes=4)[tap].rows == 0
    steady = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    tensors["W1"][0, 0] = 1
    bench = bench_of(tiny_models.model(f"g (float[N,2] x) => (float y) {{ {body} }}", tensors), batch_size=1)
    assert slopes(bench, samples_of(steady), probes=4)[tap].rows == 4


def test_a_model_without_earlier_weights_gives_zeros():
    found = curvature_of("y = MatMul(x, W)", {"W": tiny_models.weight(4, 3)}, probes=2)
    assert np.abs(found["W"]).max() == 0


@pytest.mark.parametrize("owner", ["initializer", "constant"])
def test_a_weight_may_be_a_constant_node(owner):
    body = "h = MatMul(x, W1) y = MatMul(h, W2)"
    proto = tiny_models.model(f"g (float[N,4] x) => (float y) {{ {body} }}", {"W1": W1, "W2": W2})
    if owner == "constant":
        tensor = next(t for t in proto.graph.initializer if t.name == "W1")
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["W1"], value=tensor))
        proto.graph.initializer.remove(tensor)
    bench = bench_of(proto)
    found = slopes(bench, samples_of(X), probes=2)
    tap = next(weight for weight in bench.weights if weight.name == "W2").uses[0].tap
    assert float(found[tap].gram().abs().max()) > 0
