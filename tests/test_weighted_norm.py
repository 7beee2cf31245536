"""The weighted norm against its closed form and its KKT conditions; the metric against derivatives of small nets."""

import numpy as np
import pytest
import tiny_models
import torch
from scipy.optimize import brentq

from onnx_optshift.calibration.source import Part, Samples
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.diagnose.feature_curvature import feature_curvature
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.solve import error_ball, min_norm
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.solve.weighted_norm import balanced, measure, solve
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.workbench import Workbench

UNIT = 2.0**-53
D, M = 9, 4


def rows(n, rank=D, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(groups, n, rank)) @ rng.normal(size=(groups, rank, D)))


def weight(groups=1, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(groups, D, M)))


def metric(groups=1, seed=2):
    root = np.random.default_rng(seed).normal(size=(groups, D, D)) * np.geomspace(3, 0.3, D)
    return torch.from_numpy(root @ root.transpose(0, 2, 1) + 0.1 * np.eye(D))


def spectrum_of(a):
    moments = InputMoments(a.shape[0], a.shape[2])
    moments.update(a)
    return factor(moments)


def weighted_norm(w, m):
    return float((w.mT @ m @ w).diagonal(dim1=-2, dim2=-1).sum())


def slow(a, v, m, tolerance):
    """(G + μM)⁻¹ G V, μ by bracketing."""
    gram = a.mT @ a
    total = float((a @ v).square().sum())

    def at(log_mu):
        return torch.linalg.solve(gram + np.exp(log_mu) * m, gram @ v)

    def excess(log_mu):
        return float((a @ (at(log_mu) - v)).square().sum()) / total - tolerance**2

    return at(brentq(excess, -40, 40, xtol=1e-13))


@pytest.mark.parametrize("tolerance", [0.003, 0.1, 0.5])
@pytest.mark.parametrize(("n", "rank", "groups"), [(40, D, 1), (40, 6, 1), (5, D, 1), (30, D, 3)])
def test_the_solution_is_that_of_the_closed_form(tolerance, n, rank, groups):
    a, v, m = rows(n, rank, groups), weight(groups), metric(groups)
    found = solve(measure(spectrum_of(a), m), v, tolerance, UNIT)
    assert found.outcome is Outcome.SHIFTED
    expected = slow(a, v, m, tolerance)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-6)
    assert found.predicted_residual == pytest.approx(tolerance, rel=1e-9)
    plain = error_ball.solve(spectrum_of(a), v, tolerance, UNIT)
    assert weighted_norm(found.matrix, m) < weighted_norm(plain.matrix, m) * (1 - 1e-6)
    # Each is best in its own norm.
    assert found.norm_after > plain.norm_after
    assert found.norm_after == pytest.approx(float(found.matrix.norm()))


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_the_identity_is_the_plain_norm(scale, tolerance):
    a, v = rows(40, 6), weight()
    found = solve(measure(spectrum_of(a), scale * torch.eye(D, dtype=torch.float64)[None]), v, tolerance, UNIT)
    plain = error_ball.solve(spectrum_of(a), v, tolerance, UNIT)
    np.testing.assert_allclose(found.matrix, plain.matrix, atol=1e-10)
    other = solve(measure(spectrum_of(a), metric()), v, tolerance, UNIT)
    assert (other.matrix - plain.matrix).abs().max() > 1e-3


@pytest.mark.parametrize(("n", "rank"), [(40, 6), (4, D)])
def test_exact_keeps_every_output_and_is_stationary(n, rank):
    a, v, m = rows(n, rank), weight(), metric()
    found = solve(measure(spectrum_of(a), m), v, 0.0, UNIT)
    np.testing.assert_allclose(a @ found.matrix, a @ v, atol=1e-9)
    # min tr(WᵀMW) s.t. AW = AV: the gradient 2MW must lie in the row space of A.
    null = torch.linalg.svd(a[0], full_matrices=True).Vh[min(n, rank) :]
    np.testing.assert_allclose(null @ m[0] @ found.matrix[0], 0, atol=1e-8)
    plain = min_norm.solve(spectrum_of(a), v, UNIT)
    assert (null @ m[0] @ plain.matrix[0]).abs().max() > 1e-3


def test_nothing_to_gain_keeps_the_weight():
    a, v, m = rows(40), weight(), metric()
    full = solve(measure(spectrum_of(a), m), v, 0.0, UNIT)
    assert full.outcome is Outcome.FULL_RANK
    assert torch.equal(full.matrix, v)
    low = rows(40, 6)
    once = solve(measure(spectrum_of(low), m), v, 0.0, UNIT)
    assert solve(measure(spectrum_of(low), m), once.matrix, 0.0, UNIT).outcome is Outcome.ALREADY_MINIMAL


def test_balanced_weighs_curvature_and_norm_alike():
    m = balanced(metric(groups=2))
    assert float(m.diagonal(dim1=-2, dim2=-1).mean()) == pytest.approx(2)
    assert torch.equal(balanced(5 * metric()), balanced(metric())) or torch.allclose(
        balanced(5 * metric()), balanced(metric())
    )
    assert torch.equal(balanced(torch.zeros(1, D, D)), torch.eye(D, dtype=torch.float64)[None])


X = np.random.default_rng(5).normal(size=(30, 4)).astype(np.float32)


def curvature_of(body, tensors, probes=300, names=None):
    model = ModelFile.load(tiny_models.model(f"g (float[N,4] x) => (float[N,3] y) {{ {body} }}", tensors))
    everything, _ = discover(model, Selection())
    chosen, _ = discover(model, Selection(include=tuple(names or ())))
    bench = Workbench(model, chosen, resolve_device("cpu"), batch_size=11)
    samples = Samples([Part(len(X), True, lambda: {"x": X})], source="test")
    return feature_curvature(bench, samples, everything, probes=probes)


W1, W2 = tiny_models.weight(4, 6, seed=1), tiny_models.weight(6, 3, seed=2)


def test_behind_one_linear_layer_it_is_the_share_of_active_units_times_the_row_s_length():
    found = curvature_of("h = MatMul(x, W1) r = Relu(h) y = MatMul(r, W2)", {"W1": W1, "W2": W2})
    assert float(found["W1"].abs().max()) == 0, "no weight lies before the first"
    active = (X @ W1 > 0).astype(np.float64)
    expected = (active * np.square(X).sum(axis=1, keepdims=True)).mean(axis=0)
    # 300 probes: a mean of squares is off by √(2/300), 8 %, less what samples average out.
    np.testing.assert_allclose(found["W2"][0].diagonal(), expected, rtol=0.25)
    off = found["W2"][0] - torch.diag(found["W2"][0].diagonal())
    assert off.abs().max() < 0.25 * expected.max()


def test_earlier_layers_couple_features():
    body = "h = MatMul(x, W1) k = MatMul(h, W3) y = MatMul(k, W2)"
    w3 = tiny_models.weight(6, 6, seed=7)
    found = curvature_of(body, {"W1": W1, "W3": w3, "W2": W2})["W2"][0]
    # dk = dx·W1 through W3, and dh·W3 itself: ‖x‖² W3ᵀW3 + ‖h‖² 1.
    lengths = np.square(X).sum(axis=1).mean(), np.square(X @ W1).sum(axis=1).mean()
    expected = lengths[0] * w3.T.astype(np.float64) @ w3 + lengths[1] * np.eye(6)
    np.testing.assert_allclose(found, expected, atol=0.2 * np.abs(expected).max())
    coupled = expected - np.diag(np.diag(expected))
    assert np.abs(coupled).max() > 0.2 * np.abs(expected).max(), "a diagonal metric would not pass"


def test_weights_that_stay_count_as_sources_too():
    chosen = curvature_of("h = MatMul(x, W1) y = MatMul(h, W2)", {"W1": W1, "W2": W2}, probes=2, names=["W2"])
    assert list(chosen) == ["W2"]
    assert float(chosen["W2"].abs().max()) > 0


def test_repeatable():
    body, tensors = "h = MatMul(x, W1) y = MatMul(h, W2)", {"W1": W1, "W2": W2}
    one, other = (curvature_of(body, tensors, probes=2)["W2"] for _ in range(2))
    assert torch.equal(one, other)
