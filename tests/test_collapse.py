"""Neural collapse on exact families (a simplex, two points) against a slow reference, and ranks of known spectra."""

import math

import numpy as np
import pytest
import tiny_models
import torch

from onnx_optshift.calibration.source import Part, Samples
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.diagnosis import collapse as nc
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments

K, D, EACH = 5, 8, 12
RNG = np.random.default_rng(0)
CLASSES = np.repeat(np.arange(K), EACH)
ROTATION = np.linalg.qr(RNG.normal(size=(D, D)))[0]
CENTRE = RNG.normal(size=D)
# Columns e_c - 1/K are a simplex: equal norms, cosines -1/(K-1).
SIMPLEX = (np.eye(K) - 1 / K) @ np.eye(K, D) @ ROTATION


def features_of(rows, classes=CLASSES, batch=7):
    features = nc.Features(np.unique(classes), rows.shape[1])
    for start in range(0, len(rows), batch):
        features.update(torch.from_numpy(rows[start : start + batch]), classes[start : start + batch])
    return features


def slow_nc1(rows, classes):
    labels = np.unique(classes)
    means = np.array([rows[classes == label].mean(axis=0) for label in labels])
    within = sum(
        np.outer(r - means[np.searchsorted(labels, c)], r - means[np.searchsorted(labels, c)])
        for r, c in zip(rows, classes, strict=True)
    ) / len(rows)
    centred = means - means.mean(axis=0)
    between = centred.T @ centred / len(labels)
    return np.trace(within @ np.linalg.pinv(between)) / len(labels)


def test_a_simplex_is_full_collapse():
    found = features_of((CENTRE + SIMPLEX)[CLASSES])
    assert nc.variability(found) == pytest.approx(0, abs=1e-12)
    assert nc.norm_spread(found.centred) == pytest.approx(0, abs=1e-12)
    assert nc.angle_spread(found.centred) == pytest.approx(0, abs=1e-12)
    assert nc.duality_gap(torch.from_numpy(3 * SIMPLEX), found.centred) == pytest.approx(0, abs=1e-12)
    assert nc.nearest(torch.from_numpy((CENTRE + SIMPLEX)[CLASSES]), found.means).tolist() == CLASSES.tolist()


def test_random_features_are_not():
    found = features_of(RNG.normal(size=(K * EACH, D)))
    assert nc.variability(found) > 1
    assert nc.norm_spread(found.centred) > 0.05
    assert nc.angle_spread(found.centred) > 0.05
    assert nc.duality_gap(torch.from_numpy(RNG.normal(size=(K, D))), found.centred) > 0.5


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_nc1_is_that_of_the_slow_formula(noise):
    rows = (CENTRE + SIMPLEX)[CLASSES] + noise * RNG.normal(size=(K * EACH, D))
    assert nc.variability(features_of(rows)) == pytest.approx(slow_nc1(rows, CLASSES), rel=1e-9)


def test_classes_of_unequal_size_count_alike_in_the_centre():
    classes = np.repeat(np.arange(K), [40, 3, 5, 2, 10])
    rows = (CENTRE + SIMPLEX)[classes] + 0.1 * RNG.normal(size=(60, D))
    found = features_of(rows, classes)
    assert nc.variability(found) == pytest.approx(slow_nc1(rows, classes), rel=1e-9)
    exact = features_of((CENTRE + SIMPLEX)[classes], classes)
    assert nc.angle_spread(exact.centred) == pytest.approx(0, abs=1e-12)


def test_two_points_have_the_variance_over_the_distance():
    rows = np.array([[1.0], [3.0], [-1.0], [-3.0]])
    # Means ±2, within variance 1, between variance 4, two classes.
    assert nc.variability(features_of(rows, np.array([0, 0, 1, 1]))) == pytest.approx(1 / 4 / 2)


def test_means_that_coincide_are_no_collapse():
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert nc.variability(features_of(rows, np.array([0, 0, 1, 1]))) == math.inf


def test_order_and_batches_do_not_matter():
    rows = RNG.normal(size=(K * EACH, D))
    order = RNG.permutation(len(rows))
    one, other = features_of(rows), features_of(rows[order], CLASSES[order], batch=1)
    np.testing.assert_allclose(one.means, other.means, atol=1e-12)
    np.testing.assert_allclose(one.moments.gram(), other.moments.gram(), atol=1e-11)


def bench_of(rows, classifier, body="y = MatMul(x, W)", shape=None):
    proto = tiny_models.model(
        f"g (float[{', '.join(map(str, shape or ('N', D)))}] x) => (float[N,{K}] y) {{ {body} }}",
        {"W": classifier.astype(np.float32)},
    )
    model = ModelFile.load(proto)
    weights, _ = discover(model, Selection())
    bench = Bench.open(model, weights, resolve_device("cpu"), batch_size=7)
    return bench, Samples([Part(len(rows), True, lambda: {"x": rows}, CLASSES)], source="test")


def test_a_model_s_last_layer():
    rows = (CENTRE + SIMPLEX)[CLASSES].astype(np.float32)
    classifier = SIMPLEX.T
    bench, samples = bench_of(rows, classifier)
    found = nc.collapse(bench, samples, CLASSES, bench.weights[0], "y")
    assert found.classes == K
    assert found.samples == K * EACH
    assert found.counts == {str(k): EACH for k in range(K)}
    # Features in float32: their rounding is the variability that is left.
    assert found.nc1 < 1e-12
    assert max(found.nc2_norms, found.nc2_angles, found.nc2_weight_norms, found.nc3) < 1e-6
    answers = (rows @ classifier).argmax(axis=1)
    assert found.nc4 == pytest.approx((answers != CLASSES).mean())


def test_a_model_that_answers_otherwise_has_nc4():
    rows = (CENTRE + SIMPLEX)[CLASSES].astype(np.float32)
    bench, samples = bench_of(rows, np.roll(SIMPLEX.T, 1, axis=1) * 100)
    found = nc.collapse(bench, samples, CLASSES, bench.weights[0], "y")
    assert found.nc1 < 1e-12
    assert found.nc3 > 0.5
    assert found.nc4 > 0.5


def test_a_layer_with_several_rows_a_sample_has_no_figures():
    rows = RNG.normal(size=(K * EACH, 3, D)).astype(np.float32)
    body = "h = MatMul(x, W) y = ReduceMean<axes = [1], keepdims = 0>(h)"
    bench, samples = bench_of(rows, SIMPLEX.T, body, ("N", 3, D))
    assert nc.collapse(bench, samples, CLASSES, bench.weights[0], None) is None


def spectrum_of(rows):
    moments = InputMoments(1, rows.shape[1])
    moments.update(torch.from_numpy(rows)[None])
    return factor(moments)


def test_ranks_of_known_spectra():
    flat = spectrum_of(ROTATION[:4])
    assert nc.effective_rank(flat) == pytest.approx(4)
    assert nc.stable_rank(flat) == pytest.approx(4)
    one = spectrum_of(np.outer(RNG.normal(size=20), ROTATION[0]))
    assert nc.effective_rank(one) == pytest.approx(1)
    assert nc.stable_rank(one) == pytest.approx(1)
    uneven = spectrum_of(np.diag([4.0, 3.0, 0.0]))
    shares = np.array([4, 3]) / 7
    assert nc.effective_rank(uneven) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert nc.stable_rank(uneven) == pytest.approx(25 / 16)


def test_the_rank_of_a_layer():
    rows = (RNG.normal(size=(60, 3)) @ ROTATION[:3]).astype(np.float64)
    bench, samples = bench_of(rows.astype(np.float32), SIMPLEX.T)
    layers, weight = Layers(bench.weights, bench.statistics(samples), bench.model.initializer), bench.weights[0]
    found = nc.layer_rank(weight, layers.survey()[weight.name], layers.factored.spectrum(weight))
    assert (found.d, found.rows, found.needed) == (D, 60, 3)
    assert 1 <= found.stable <= found.effective <= 3.01


def test_features_that_are_not_finite_have_no_figures():
    rows = (CENTRE + SIMPLEX)[CLASSES].astype(np.float32)
    rows[7, 0] = np.nan
    bench, samples = bench_of(rows, SIMPLEX.T)
    assert nc.collapse(bench, samples, CLASSES, bench.weights[0], "y") is None
