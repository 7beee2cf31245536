import numpy as np
import pytest
from calibration_cases import X

from onnx_optshift.calibration.load import load
from onnx_optshift.calibration.split import split
from onnx_optshift.errors import InputError


def samples(labels):
    count = labels if isinstance(labels, int) else len(labels)
    data = {"x": np.arange(count * 3, dtype=np.float32).reshape(count, 3)}
    return load([data if isinstance(labels, int) else data | {"labels": np.asarray(labels)}], [X])


@pytest.mark.parametrize("labels", [40, np.repeat([0, 1, 2, 7], [20, 10, 7, 1]), np.linspace(0, 1, 38)])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_split_is_a_partition_of_about_the_fraction(labels, fraction):
    data = samples(labels)
    fit, judge = split(data, fraction, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, judge])), np.arange(len(data)))
    assert fit.dtype == judge.dtype == np.int64
    assert (np.diff(fit) > 0).all()
    assert (np.diff(judge) > 0).all()
    assert len(fit) > 0
    assert len(judge) > 0
    assert abs(len(judge) - fraction * len(data)) <= (0.5 if data.classes is None else data.classes)


def test_every_class_gives_its_share_and_keeps_one():
    labels = np.repeat([3, 0, 5, 1], [50, 10, 2, 1])
    for seed in range(20):
        fit, judge = split(samples(labels), 0.2, seed)
        for value, size in zip(*np.unique(labels, return_counts=True), strict=True):
            assert abs((labels[judge] == value).sum() - 0.2 * size) < 1
            assert (labels[fit] == value).sum() >= 1
        assert len(judge) == 13


def test_a_large_fraction_still_leaves_each_class_one_sample_to_fit():
    labels = np.repeat([0, 1, 2], [2, 3, 50])
    for seed in range(5):
        assert set(labels[split(samples(labels), 0.9, seed)[0]]) == {0, 1, 2}
    plain = [set(labels[split(samples(55), 0.9, seed)[0]]) for seed in range(5)]
    assert any(classes != {0, 1, 2} for classes in plain)  # which chance alone does not


def test_balance_comes_from_the_labels_not_from_luck():
    labels = np.repeat([0, 1], [95, 5])
    counts = {(labels[split(samples(100), 0.2, seed)[1]] == 1).sum() for seed in range(20)}
    assert len(counts) > 1  # without labels the small class is hit at random
    assert {(labels[split(samples(labels), 0.2, seed)[1]] == 1).sum() for seed in range(20)} == {1}


def test_many_small_classes_are_drawn_by_lot_to_the_right_total():
    labels = np.repeat(np.arange(50), 2)
    chosen = [set(labels[split(samples(labels), 0.2, seed)[1]]) for seed in range(2)]
    assert [len(classes) for classes in chosen] == [20, 20]
    assert chosen[0] != chosen[1]


def test_classes_of_one_sample_fall_back_to_a_plain_draw():
    fit, judge = split(samples(np.arange(10)), 0.2, 0)
    assert (len(fit), len(judge)) == (8, 2)


def test_same_seed_same_split_other_seed_other_split():
    data = samples(np.arange(60) % 3)
    first, again, other = (split(data, 0.2, seed)[1] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_split_of_a_seed_is_fixed():
    # A change here changes every user's result at the default seed, on any platform: it is a release note.
    np.testing.assert_array_equal(split(samples(20), 0.2, 0)[1], [2, 4, 6, 19])


def test_tiny_collections():
    assert [part.tolist() for part in split(samples(1), 0.2, 0)] == [[0], []]
    fit, judge = split(samples(2), 0.2, 0)
    assert (len(fit), len(judge)) == (1, 1)
    fit, judge = split(samples([0, 0]), 0.9, 0)
    assert (len(fit), len(judge)) == (1, 1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_must_lie_between_0_and_1(fraction):
    with pytest.raises(InputError, match="between 0 and 1"):
        split(samples(10), fraction, 0)
