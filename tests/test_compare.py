"""Deviations between outputs: definitions on small arrays, streaming, and what must never pass for equal."""

import math

import numpy as np
import pytest

from onnx_optshift.prove.compare import OutputDifference, OutputsDifference


def deviation(value, reference, samples=None):
    entry = OutputDifference()
    entry.update(value, reference, len(reference) if samples is None else samples)
    return entry.result()


def test_definitions_by_hand():
    reference = np.array([[3.0, 4.0], [0.0, 10.0]])
    found = deviation(reference + np.array([[0.0, 0.4], [0.5, 0.0]]), reference)
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_rel == pytest.approx(max(0.4 / 4.0, 0.5 / 10.0))
    assert found.rel == pytest.approx(math.sqrt(0.4**2 + 0.5**2) / math.sqrt(9 + 16 + 100))
    assert found.top1_agreement == 1.0


def test_streaming_equals_all_at_once():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(12, 5))
    value = reference + 0.5 * rng.normal(size=reference.shape)
    streamed = OutputDifference()
    for start in (0, 5, 10):
        part = slice(start, min(start + 5, 12))
        streamed.update(value[part], reference[part], len(reference[part]))
    whole = deviation(value, reference)
    assert streamed.result().rel == pytest.approx(whole.rel)
    assert streamed.result().max_rel == whole.max_rel
    assert streamed.result().top1_agreement == whole.top1_agreement < 1.0


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ([[np.nan, 1.0]], [[1.0, 1.0]]),
        ([[1.0, 1.0]], [[np.nan, 1.0]]),
        ([[np.inf, 1.0]], [[1.0, 1.0]]),
        ([[np.inf, 1.0]], [[-np.inf, 1.0]]),
        ([[1.0, 0.0]], [[0.0, 0.0]]),
    ],
)
def test_what_is_not_a_number_on_one_side_deviates_infinitely(value, reference):
    assert deviation(np.array(value), np.array(reference)).rel == math.inf


def test_nan_and_infinity_on_both_sides_agree():
    same = np.array([[np.nan, np.inf, -np.inf, 2.0]])
    assert deviation(same.copy(), same).rel == 0.0


def test_other_shape_or_missing_output_deviates_infinitely():
    assert deviation(np.zeros((2, 3)), np.zeros((2, 4))).rel == math.inf
    both = OutputsDifference()
    both.update({"y": np.ones((1, 2))}, {"y": np.ones((1, 2)), "z": np.ones((1, 2))}, 1)
    assert both.results()["z"].rel == math.inf
    assert both.results()["y"].rel == 0.0


def test_nothing_compared_is_no_agreement():
    assert OutputsDifference().largest_rel() == math.inf


def test_strings_and_integers():
    words = np.array(["cat", "dog"])
    assert deviation(words.copy(), words).rel == 0.0
    assert deviation(np.array(["cat", "cow"]), words).rel == math.inf
    assert deviation(np.array([1, 2]), np.array([1, 2])).max_abs == 0.0
    assert deviation(np.array([1, 3]), np.array([1, 2])).max_abs == 1.0


def test_embeddings_have_no_answer():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, 8))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for values, answered in ((unit, False), (vectors, True), (np.eye(8)[:5], True)):  # one-hot rows are class scores
        found = OutputDifference()
        found.update(values, values, len(values))
        assert (found.result().top1_agreement is not None) is answered
