"""The store of statistics: waves are captured when they are loaded and never else; states can be saved and merged."""

import io

import numpy as np
import pytest
import torch

from onnx_optshift.capture.statistics import StatisticsStore, from_state
from onnx_optshift.geometry import MatrixRows, Tap
from onnx_optshift.stats.moments import InputMoments

TAPS = [Tap(name, MatrixRows(), 1, 4) for name in ("a", "b", "ü c")]
WAVES = [TAPS[:2], TAPS[2:]]


def moments(tap, count=9, seed=0):
    found = InputMoments(tap.groups, tap.width)
    rows = np.random.default_rng([seed, len(tap.value)]).standard_normal((1, count, 4))
    found.update(torch.from_numpy(rows))
    found.nonfinite = count
    return found


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state().values(), other.state().values(), strict=True))


class Backend:
    """Counts what is captured."""

    def __init__(self, count=9, seed=0):
        self.asked, self.count, self.seed = [], count, seed

    def __call__(self, taps):
        self.asked.append([tap.value for tap in taps])
        return {tap: moments(tap, self.count, self.seed) for tap in taps}


def test_a_wave_is_captured_when_it_is_loaded_and_one_is_held():
    backend = Backend()
    store = StatisticsStore(WAVES, backend, rows=dict.fromkeys(TAPS, 7))
    assert [store.wave_of(tap) for tap in TAPS] == [0, 0, 1]
    assert [store.rows(tap) for tap in TAPS] == [7, 7, 7]
    assert backend.asked == []  # nothing of this runs a model
    assert store.load(0) is store.load(0)
    assert [store.rows(tap) for tap in TAPS] == [9, 9, 7]
    assert backend.asked == [["a", "b"]]
    store.load(1)
    store.load(0)
    assert backend.asked == [["a", "b"], ["ü c"], ["a", "b"]]


def test_the_wave_that_is_held_is_let_go_before_the_next_is_captured():
    held = []

    def backend(taps):
        held.append(len(store._held))
        return {tap: moments(tap) for tap in taps}

    store = StatisticsStore(WAVES, backend)
    store.load(0)
    store.load(1)
    assert held == [0, 0]


def test_merged_stores_hold_the_rows_of_both():
    first, second = Backend(9, 0), Backend(5, 1)
    merged = StatisticsStore([TAPS], first).merged(StatisticsStore([TAPS], second))
    for tap, found in merged.load(0).items():
        assert equal(found, moments(tap, 9, 0).merge(moments(tap, 5, 1)))
        assert (merged.rows(tap), found.nonfinite) == (14, 14)
    assert len(first.asked) == len(second.asked) == 1


@pytest.mark.parametrize("count", [0, 3, 9])  # none, kept as rows, folded into their Gram matrix
def test_states_come_back_from_a_file_and_go_on(count):
    store = StatisticsStore([TAPS], Backend(count))
    state = store.state(0)
    assert all(key.isascii() for key in state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    back = from_state(TAPS, torch.load(file, weights_only=True))
    for tap in TAPS:
        assert equal(back[tap], moments(tap, count))
        more = moments(tap, 6, 2)
        again = back[tap].merge(more)
        assert equal(again, moments(tap, count).merge(more))
        back[tap].update(torch.ones(1, 9, 4))
        assert equal(store.load(0)[tap], moments(tap, count))  # nothing is shared
    with pytest.raises(KeyError, match="other"):
        from_state([Tap("other", MatrixRows(), 1, 4)], state)


def test_a_store_of_finished_moments_captures_nothing():
    store = StatisticsStore.of({tap: moments(tap) for tap in TAPS})
    assert len(store.waves) == 1
    assert store.rows(TAPS[0]) == 9
    assert equal(store.load(0)[TAPS[2]], moments(TAPS[2]))
