"""Class-balanced batches: every class in every batch, as even as the data allows, repeatable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_optshift.decide.draws import balanced_batch, batch_sizes
from onnx_optshift.errors import InputError


@given(st.lists(st.integers(0, 5), min_size=8, max_size=60), st.integers(0, 2**32 - 1), st.data())
def test_every_class_is_in_every_batch_and_turns_are_fair(labels, seed, data):
    classes = np.array(labels)
    counts = {label: int((classes == label).sum()) for label in set(labels)}
    size = data.draw(st.integers(len(counts), len(labels)))
    batch = balanced_batch(classes, size, np.random.default_rng(seed))
    assert len(set(batch.tolist())) == size
    drawn = {label: int((classes[batch] == label).sum()) for label in counts}
    assert min(drawn.values()) >= 1
    # No class is ahead of another by two unless that other one has run out.
    for a in counts:
        for b in counts:
            assert drawn[a] <= drawn[b] + 1 or drawn[b] == counts[b]


def test_an_unbalanced_draw_would_miss_classes():
    # Negative control: 200 samples of class 0 and one each of 1 to 4; a plain draw of 10 almost never has all five.
    classes = np.array([0] * 200 + [1, 2, 3, 4])
    rng = np.random.default_rng(1)
    plain = [len(np.unique(classes[rng.choice(204, 10, replace=False)])) == 5 for _ in range(20)]
    balanced = [len(np.unique(classes[balanced_batch(classes, 10, rng)])) == 5 for _ in range(20)]
    assert not any(plain)
    assert all(balanced)


def test_same_seed_same_batch_and_other_seed_other_batch():
    classes = np.arange(100) % 7
    draw = [balanced_batch(classes, 20, np.random.default_rng(seed)).tolist() for seed in (3, 3, 4)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize(("size", "word"), [(2, "classes"), (11, "samples")])
def test_sizes_out_of_range_are_refused_with_the_reason(size, word):
    with pytest.raises(InputError, match=word):
        balanced_batch(np.array([0, 1, 2] * 3 + [0]), size, np.random.default_rng(0))


def test_sizes_to_try_start_at_the_classes_and_stay_below_full_rank():
    sizes = batch_sizes(10, 1000, 64)
    assert sizes[0] == 10
    assert sizes[-1] == 63
    assert batch_sizes(10, 20, 512)[-1] == 20
