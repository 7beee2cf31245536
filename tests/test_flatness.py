"""Flatness against theory (quadratic losses) and against automatic differentiation, each with a negative control."""

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn import functional as F

from onnx_optshift.calibration.source import Part, Samples
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.decide.gate import loss_of
from onnx_optshift.diagnosis.flatness import SIGMAS, flatness
from onnx_optshift.diagnosis.gauss_newton import top_eigenvalue
from onnx_optshift.diagnosis.landscape import Landscape, smooth_session
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run.bench import Bench

RNG = np.random.default_rng(3)
N, D, M = 60, 5, 4
X = RNG.normal(size=(N, D)).astype(np.float32)
CLASSES = RNG.integers(0, M, N)
TARGETS = RNG.normal(size=(N, M)).astype(np.float32)


def bench_of(proto, labels=CLASSES, batch_size=25):
    model = ModelFile.load(proto)
    weights, _ = discover(model, Selection())
    bench = Bench.open(model, weights, resolve_device("cpu"), batch_size=batch_size)
    return bench, Samples([Part(len(X), True, lambda: {"x": X}, labels)], source="test")


def linear():
    return tiny_models.model(
        f"g (float[N,{D}] x) => (float[N,{M}] y) {{ y = MatMul(x, W) }}", {"W": tiny_models.weight(D, M)}
    )


W1, W2 = tiny_models.weight(D, 7, seed=1), tiny_models.weight(7, M, seed=2)
BIAS = tiny_models.weight(7, seed=5)


def mlp(activation="Relu"):
    text = f"g (float[N,{D}] x) => (float[N,{M}] y) {{ h = Gemm(x, W1, b) r = {activation}(h) y = MatMul(r, W2) }}"
    return tiny_models.model(text, {"W1": W1, "b": BIAS, "W2": W2})


def torch_loss(activation):
    x, y = torch.from_numpy(X).double(), torch.from_numpy(CLASSES)

    def loss(w1, w2):
        return F.cross_entropy(activation(x @ w1 + torch.from_numpy(BIAS).double()) @ w2, y)

    return loss, (torch.from_numpy(W1).double(), torch.from_numpy(W2).double())


def hessian_blocks(activation):
    """Exact blocks of W1 and W2, `[d m, d m]`."""
    loss, (w1, w2) = torch_loss(activation)
    first = torch.autograd.functional.hessian(lambda w: loss(w, w2), w1).reshape(w1.numel(), -1)
    second = torch.autograd.functional.hessian(lambda w: loss(w1, w), w2).reshape(w2.numel(), -1)
    return {"W1": first.numpy(), "W2": second.numpy()}


def quadratic(place, name, probes, hessian):
    return np.mean([z @ hessian @ z for z in (place.signs(name, k)[0].ravel() for k in range(probes))])


def near(found, expected, errors=3.0):
    assert abs(found.value - expected) <= errors * found.error + 1e-9, (found, expected)


def test_a_quadratic_loss_has_the_figures_of_theory():
    bench, samples = bench_of(linear(), TARGETS)
    found = flatness(bench, samples, loss_of(bench.outputs, samples), {}, probes=64)
    # L = mean (xW - t)²/m per output, so that H = 2/m XᵀX/n for each of m columns.
    gram = X.astype(np.float64).T @ X / N
    norm = float(np.square(tiny_models.weight(D, M)).sum())
    layer = found.layers[0]
    near(layer.trace.before, 2 * np.trace(gram))
    near(layer.relative.before, 2 / M * np.trace(gram) * norm)
    near(found.trace.before, 2 * np.trace(gram))
    assert found.gauss_newton.before.value == pytest.approx(found.trace.before.value, rel=2e-3)
    # A quadratic loss rises by σ²/2 zᵀHz whatever σ is.
    rises = [point.rise.before.value / point.sigma**2 for point in found.sharpness]
    np.testing.assert_allclose(rises, rises[0], rtol=1e-3)
    assert [point.sigma for point in found.sharpness] == list(SIGMAS)


def test_differences_of_a_quadratic_loss_are_exact_at_any_step():
    bench, samples = bench_of(linear(), TARGETS)
    place = Landscape(bench, smooth_session(bench), samples, loss_of(bench.outputs, samples), {})
    hessian = np.kron(2 / M * X.astype(np.float64).T @ X / N, np.eye(M))
    z = place.signs("W", 0)
    for step in (0.03, 0.3, 3.0):
        assert place.differences({"W": z}, step).second == pytest.approx(z.ravel() @ hessian @ z.ravel(), rel=1e-4)
    # A tiny step drowns in rounding, which is what the chosen one avoids.
    assert place.differences({"W": z}, 1e-6).second != pytest.approx(z.ravel() @ hessian @ z.ravel(), rel=0.05)
    chosen = place.step("W", place.noise())
    assert place.differences({"W": z}, chosen).second == pytest.approx(z.ravel() @ hessian @ z.ravel(), rel=5e-3)


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_second_differences_are_those_of_automatic_differentiation(activation):
    bench, samples = bench_of(mlp(activation))
    loss = loss_of(bench.outputs, samples)
    blocks = hessian_blocks(torch.relu if activation == "Relu" else torch.tanh)
    found = flatness(bench, samples, loss, {}, probes=48, seed=1)
    place = Landscape(bench, smooth_session(bench), samples, loss, {}, seed=1)
    for layer in found.layers:
        same_probes = quadratic(place, layer.name, 48, blocks[layer.name])
        assert layer.trace.before.value == pytest.approx(same_probes, rel=0.01)
        near(layer.trace.before, np.trace(blocks[layer.name]))
    total = sum(np.trace(block) for block in blocks.values())
    near(found.trace.before, total)
    assert abs(found.trace.before.value / total - 1) > 1e-6, "an estimate, not the exact figure"


def test_relative_flatness_is_that_of_its_definition_and_keeps_under_rescaling():
    bench, samples = bench_of(mlp())
    loss = loss_of(bench.outputs, samples)
    blocks = hessian_blocks(torch.relu)
    weights = {"W1": W1.astype(np.float64), "W2": W2.astype(np.float64)}
    scale = np.float32(3)
    rescaled, rescaled_samples = bench_of(
        tiny_models.model(
            f"g (float[N,{D}] x) => (float[N,{M}] y) {{ h = Gemm(x, W1, b) r = Relu(h) y = MatMul(r, W2) }}",
            {"W1": W1 * scale, "b": BIAS * scale, "W2": W2 / scale},
        )
    )
    found = flatness(bench, samples, loss, {}, probes=400)
    other = flatness(rescaled, rescaled_samples, loss, {}, probes=400)
    for layer, moved in zip(found.layers, other.layers, strict=True):
        v, h = weights[layer.name], blocks[layer.name]
        d, m = v.shape
        four = h.reshape(d, m, d, m)
        expected = sum(v[:, s] @ v[:, t] * np.trace(four[:, s, :, t]) for s in range(m) for t in range(m))
        near(layer.relative.before, expected, 4)
        near(moved.relative.before, expected, 4)
        # The plain trace is not of the function but of its parametrization.
        assert moved.trace.before.value != pytest.approx(layer.trace.before.value, rel=0.2)


def test_a_weight_on_the_edge_of_a_relu_has_no_spike():
    proto = mlp()
    edge = W1.copy()
    # The first sample's first unit sits exactly at 0.
    edge[:, 0] -= X[0] * (X[0] @ W1[:, 0] + BIAS[0]) / (X[0] @ X[0])
    bench, samples = bench_of(proto)
    loss = loss_of(bench.outputs, samples)
    centre = {"W1": edge}
    place = Landscape(bench, smooth_session(bench), samples, loss, centre)
    z = {"W1": place.signs("W1", 0)}
    steps = (3e-3, 3e-4)
    smooth = [place.differences(z, step).second for step in steps]
    assert smooth[1] == pytest.approx(smooth[0], rel=0.05)

    def raw(step):
        def mean(sign):
            arrays = {**place.moved(z, sign * step)}
            parts = [
                loss.per_sample(bench.outputs.run(batch, arrays), {}, batch.labels, len(batch.labels))[0]
                for batch in samples.batches(25)
            ]
            return float(np.concatenate(parts).mean())

        return (mean(1) - 2 * mean(0) + mean(-1)) / step**2

    assert abs(raw(steps[1])) > 3 * abs(smooth[1]), "the original's differences do have the spike"


def test_the_same_weights_before_and_after_show_no_change_and_others_do():
    bench, samples = bench_of(mlp())
    loss = loss_of(bench.outputs, samples)
    same = flatness(bench, samples, loss, {}, {"W1": W1}, probes=8)
    assert same.trace.change.value == same.gauss_newton.change.value == 0
    assert [point.rise.change.value for point in same.sharpness] == [0.0] * len(SIGMAS)
    assert same.loss_after == same.loss_before
    halved = flatness(bench, samples, loss, {}, {"W2": 0.5 * W2}, probes=8)
    assert halved.trace.change.value != 0
    assert halved.trace.before == same.trace.before
    # The first layer's curvature goes through the second one's weight; paired probes see it better than two errors do.
    first = halved.layers[0].trace
    assert first.change.error < np.hypot(first.before.error, first.after.error)


def test_repeatable_and_independent_of_the_batch_size():
    bench, samples = bench_of(mlp())
    loss = loss_of(bench.outputs, samples)
    one = flatness(bench, samples, loss, {}, probes=4, seed=7)
    again = flatness(bench, samples, loss, {}, probes=4, seed=7)
    other = flatness(bench, samples, loss, {}, probes=4, seed=8)
    assert one.trace == again.trace
    assert one.trace != other.trace
    small, small_samples = bench_of(mlp(), batch_size=7)
    found = flatness(small, small_samples, loss, {}, probes=4, seed=7)
    assert found.trace.before.value == pytest.approx(one.trace.before.value, rel=0.01)


def test_without_labels_the_distance_is_flat_nowhere_but_zero_at_the_original():
    bench, samples = bench_of(mlp(), labels=None)
    found = flatness(bench, samples, loss_of(bench.outputs, samples), {}, probes=16)
    assert found.loss_before < 1e-10
    assert found.gauss_newton.before.value == pytest.approx(found.trace.before.value, rel=0.02)
    assert found.trace.before.value > 0
    # A sample without any active unit has the output 0: relative to it, every change is infinite, and no error is made.
    assert {point.rise.before.error is None for point in found.sharpness} >= {True}


@pytest.mark.parametrize("probabilities", [False, True])
def test_gauss_newton_and_its_largest_eigenvalue(probabilities):
    proto = mlp()
    if probabilities:
        layers = "h = Gemm(x, W1, b) r = Relu(h) l = MatMul(r, W2) y = Softmax(l)"
        text = f"g (float[N,{D}] x) => (float[N,{M}] y) {{ {layers} }}"
        proto = tiny_models.model(text, {"W1": W1, "b": BIAS, "W2": W2})
    bench, samples = bench_of(proto)
    found = flatness(bench, samples, loss_of(bench.outputs, samples), {}, probes=300)
    _, (w1, w2) = torch_loss(torch.relu)

    def outputs(w1, w2):
        x = torch.from_numpy(X).double()
        return torch.relu(x @ w1 + torch.from_numpy(BIAS).double()) @ w2

    jacobian = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, (w1, w2))], dim=2)
    p = torch.softmax(outputs(w1, w2), dim=1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / N
    near(found.gauss_newton.before, float(torch.trace(matrix)))
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    # A mean of 300 squares of a normal variable is off by √(2/300), 8 %.
    assert found.top_before.lower < 1.25 * top
    assert found.top_before.upper > 0.8 * top
    assert found.top_before.lower <= found.top_before.upper
    assert found.top_before.upper < float(torch.trace(matrix)), "tighter than the trace, which bounds it always"


def test_a_sketch_brackets_a_known_eigenvalue():
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(30, 12)) * np.geomspace(5, 0.1, 12)
    true = np.linalg.eigvalsh(factor @ factor.T)[-1]
    brackets = []
    for _ in range(40):
        columns = [[(factor @ generator.choice([-1.0, 1.0], 12)).astype(np.float32)] for _ in range(40)]
        brackets.append(top_eigenvalue(columns, 1))
    lower, upper = (np.mean([getattr(b, side) for b in brackets]) for side in ("lower", "upper"))
    assert lower < true * 1.02
    assert upper > true * 0.98
    assert lower < upper


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_mlp", "noisy_mlp"])
def test_models_within_two_errors_of_automatic_differentiation(name):
    import validate_flatness as tool

    bench, samples = tool.bench_of(name)
    found = flatness(bench, samples, loss_of(bench.outputs, samples), {}, probes=200)
    network = tool.network_of(name)
    with np.load(tool.MODELS / name / "calibration.npz") as file:
        inputs = torch.from_numpy(file["pixels"].astype(np.float64))
    exact = sum(tool.exact_mlp_trace(network, k, inputs) for k in range(len(network.layers)))
    near(found.trace.before, exact, 2)
    assert found.trace.before.value == pytest.approx(exact, rel=0.05)
