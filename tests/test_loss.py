"""The held-out loss: which one is taken, its value against plain formulas, labels that cannot be."""

import numpy as np
import pytest

from onnx_optshift.decide.loss import choose_loss
from onnx_optshift.errors import InputError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32)
PROBABILITIES = (np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 0, 1])


def plain_cross_entropy(logits, labels):
    return np.array([
        -np.log(np.exp(row)[label] / np.exp(row).sum()) for row, label in zip(logits, labels, strict=True)
    ])


@pytest.mark.parametrize(("outputs", "kind"), [(LOGITS, "logits"), (PROBABILITIES, "probabilities")])
def test_cross_entropy_is_the_same_on_logits_and_on_their_softmax(outputs, kind):
    loss = choose_loss({"y": outputs}, LABELS, 6)
    assert loss.kind == kind
    losses, right = loss.per_sample({"y": outputs}, {"y": outputs}, LABELS, 6)
    np.testing.assert_allclose(losses, plain_cross_entropy(LOGITS.astype(np.float64), LABELS), rtol=1e-5)
    assert right.tolist() == (LOGITS.argmax(axis=1) == LABELS).tolist()


def test_regression_targets_give_squared_error():
    targets = RNG.normal(size=(6, 4))
    loss = choose_loss({"y": LOGITS}, targets, 6)
    losses, right = loss.per_sample({"y": LOGITS}, {"y": LOGITS}, targets, 6)
    np.testing.assert_allclose(losses, ((LOGITS - targets) ** 2).mean(axis=1))
    assert right is None


def test_without_labels_the_distance_is_zero_for_the_original_and_only_for_it():
    loss = choose_loss({"y": LOGITS}, None, 6)
    assert loss.is_distance
    assert loss.per_sample({"y": LOGITS}, {"y": LOGITS}, None, 6)[0].max() == 0.0
    moved = loss.per_sample({"y": 1.1 * LOGITS}, {"y": LOGITS}, None, 6)[0]
    np.testing.assert_allclose(np.sqrt(moved), 0.1, rtol=1e-5)


def test_padding_is_not_judged():
    loss = choose_loss({"y": LOGITS}, LABELS[:4], 4)
    assert len(loss.per_sample({"y": LOGITS}, {"y": LOGITS}, LABELS[:4], 4)[0]) == 4


def test_nan_outputs_never_look_better():
    loss = choose_loss({"y": LOGITS}, LABELS, 6)
    broken = np.full_like(LOGITS, np.nan)
    assert np.isinf(loss.per_sample({"y": broken}, {"y": LOGITS}, LABELS, 6)[0]).all()


def test_sequence_labels_average_over_positions():
    logits = RNG.normal(size=(3, 5, 4))
    labels = RNG.integers(0, 4, size=(3, 5))
    loss = choose_loss({"y": logits}, labels, 3)
    losses, right = loss.per_sample({"y": logits}, {"y": logits}, labels, 3)
    plain = [plain_cross_entropy(rows, wanted).mean() for rows, wanted in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(losses, plain)
    np.testing.assert_allclose(right, (logits.argmax(axis=2) == labels).mean(axis=1))


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 3, 4, 0]), np.array([-1, 0, 0, 0, 0, 0])])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(InputError, match="expected class indices 0 to 3"):
        choose_loss({"y": LOGITS}, labels, 6)


def test_labels_that_fit_no_output_are_refused():
    with pytest.raises(InputError, match="fits no output"):
        choose_loss({"y": LOGITS}, RNG.normal(size=(6, 3)), 6)
