"""Who solves what, who runs which samples, and what comes of statistics that lie in several processes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from several import finished

from onnx_optshift.calibration.source import Part, Samples
from onnx_optshift.geometry import MatrixRows, Reshape, Tap, WeightForm
from onnx_optshift.graph.weights import Use, Weight
from onnx_optshift.prove.compare import OutputsDifference
from onnx_optshift.run.ownership import DECOMPOSITION, Elsewhere, owners_of
from onnx_optshift.stats.moments import InputMoments

SCRIPT = (str(Path(__file__).with_name("reduced_moments.py")),)
# Sums of some hundred products of float64, in another order.
UNIT = 1e-13


@pytest.fixture(scope="module")
def reduced():
    """By case: what its owner found, and what the other processes know."""
    done = finished(3, program=SCRIPT)
    assert [(status, errors) for status, _, errors in done] == [(0, "")] * 3
    everywhere = json.loads(done[0][1])
    owned = {case: found for mine, _ in everywhere for case, found in mine.items()}
    return owned, {case: [counts[case] for _, counts in everywhere if case in counts] for case in owned}


def test_owners_have_the_moments_of_all_rows(reduced):
    owned, _ = reduced
    assert len(owned) == 8
    for case, found in owned.items():
        assert max(found["off"]) <= UNIT * max(found["size"], 1), case


def test_the_comparison_notices_a_part_that_is_missing(reduced):
    owned, _ = reduced
    missing = {case for case, found in owned.items() if found["off a part"] > 0.01 * max(found["size"], 1)}
    assert missing == owned.keys() - {"none"}


def test_few_rows_stay_rows_as_in_one_process(reduced):
    owned, _ = reduced
    assert all(found["stored"] == found["stored alone"] for found in owned.values())
    assert all(found["same rows"] for found in owned.values() if found["stored"])
    assert {case for case, found in owned.items() if found["stored"]} == {"few", "as many as inputs", "none"}


def test_all_know_how_many_rows_there_were(reduced):
    owned, others = reduced
    for case, found in owned.items():
        assert found["nonfinite"] == 0 + 1 + 2
        assert others[case] == [[True, found["rows"], found["nonfinite"]]] * 2


def test_statistics_of_another_process_cannot_be_taken_for_empty_ones():
    there = Elsewhere(1, 4, rows=7, nonfinite=1)
    merged = there.merge(Elsewhere(1, 4, rows=5, nonfinite=0))
    assert (merged.rows, merged.nonfinite, merged.width) == (12, 1, 4)
    for ask in (there.gram, there.state, lambda: there.stored_rows, lambda: InputMoments(1, 4).merge(there)):
        with pytest.raises((AssertionError, ValueError)):
            ask()


def layers(widths, reads):
    """Weights of these widths `(d, m)`; each reads the inputs with these numbers."""
    found = []
    for number, ((d, m), taps) in enumerate(zip(widths, reads, strict=True)):
        uses = tuple(Use(f"node{number}", "MatMul", Tap(f"x{tap}", MatrixRows(), 1, d), "y") for tap in taps)
        found.append(Weight(f"w{number}", "float32", (d, m), WeightForm((d, m), (Reshape((1, d, m)),)), uses))
    return found


def cost(weights):
    taps = {use.tap for weight in weights for use in weight.uses}
    return sum(w.groups * w.d**2 * w.m for w in weights) + DECOMPOSITION * sum(
        tap.groups * tap.width**3 for tap in taps
    )


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=12), st.integers(1, 5))
def test_no_process_has_more_than_its_share_and_one_layer(widths, size):
    # The bound of list scheduling (Graham, 1966): the last layer that the busiest process got found it the least busy.
    weights = layers(widths, [[number] for number in range(len(widths))])
    owners = owners_of(weights, [[use.tap for w in weights for use in w.uses]], size)
    loads = [cost([w for w in weights if owners[w.uses[0].tap] == rank]) for rank in range(size)]
    largest = max(cost([weight]) for weight in weights)
    assert sum(loads) == cost(weights)
    assert max(loads) <= sum(loads) / size + largest * (1 - 1 / size) + 1e-6
    if len(weights) <= size:
        assert sorted(loads)[-len(weights) :] == sorted(cost([weight]) for weight in weights)


def test_equal_layers_are_shared_out_evenly_wave_by_wave():
    weights = layers([(8, 8)] * 8, [[number] for number in range(8)])
    taps = [weight.uses[0].tap for weight in weights]
    for waves in ([taps], [taps[:4], taps[4:]], [taps[:1], taps[1:6], taps[6:]]):
        owners = owners_of(weights, waves, 2)
        for wave in waves:
            counts = [sum(owners[tap] == rank for tap in wave) for rank in range(2)]
            assert max(counts) - min(counts) <= 1
    # What is left over in one wave is made up for in the next one.
    assert [sum(owner == rank for owner in owners.values()) for rank in range(2)] == [4, 4]


def test_what_is_read_together_has_one_owner():
    # w1 reads two inputs, which w0 and w2 read too; w3 is apart.
    weights = layers([(8, 4)] * 4, [[0], [0, 1], [1], [2]])
    owners = owners_of(weights, [list({use.tap for w in weights for use in w.uses})], 4)
    assert len({owners[use.tap] for weight in weights[:3] for use in weight.uses}) == 1
    assert owners[weights[3].uses[0].tap] != owners[weights[0].uses[0].tap]


def test_owners_do_not_depend_on_the_process_that_asks():
    weights = layers([(8, 4), (8, 4), (16, 4), (4, 4)], [[0], [1], [2], [3]])
    taps = [weight.uses[0].tap for weight in weights]
    assert owners_of(weights, [taps], 3) == owners_of(weights[::-1], [taps[::-1]], 3)


def samples(count, batch=None):
    x = np.arange(count, dtype=np.float32)[:, None]
    return Samples([Part(count, True, lambda: {"x": x})], source="test", batch=batch)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_shares_have_the_batches_of_the_whole(count, of, size, fixed):
    whole = samples(count, size if fixed else None)
    shares = [whole.share(number, of, size) for number in range(of)]
    batches = [batch for share in shares for batch in share.batches(size)]
    expected = list(whole.batches(size))
    assert [b.indices.tolist() for b in batches] == [b.indices.tolist() for b in expected]
    assert [b.feeds["x"].tolist() for b in batches] == [b.feeds["x"].tolist() for b in expected]
    assert [b.padding for b in batches] == [b.padding for b in expected]
    counts = [len(list(share.batches(size))) for share in shares]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


def test_a_selection_of_a_share_counts_its_own_samples():
    share = samples(10).share(1, 2, 2)
    assert [b.indices.tolist() for b in share.batches(2)] == [[6, 7], [8, 9]]
    assert [b.indices.tolist() for b in share.select([1, 2]).batches(2)] == [[0, 1]]


def test_parts_of_a_comparison_make_up_the_whole():
    generator = np.random.default_rng(0)
    reference, value = generator.standard_normal((2, 20, 5)).astype(np.float32)
    value[3, 1] = reference[3, 1] = np.nan
    whole, merged = OutputsDifference(), OutputsDifference()
    whole.update({"y": value}, {"y": reference}, 20)
    for part in (slice(0, 13), slice(13, 13), slice(13, 20)):
        one = OutputsDifference()
        if part.start < part.stop:
            one.update({"y": value[part]}, {"y": reference[part]}, part.stop - part.start)
        merged.merge(one)
    found, expected = merged.results()["y"], whole.results()["y"]
    assert replace(found, rel=0) == replace(expected, rel=0)
    assert found.rel == pytest.approx(expected.rel, rel=1e-12)
    assert found.nonfinite == 1
    lacking = OutputsDifference()
    lacking.update({"y": value[:13]}, {"y": reference[:13]}, 13)
    assert lacking.results()["y"].rel != pytest.approx(expected.rel, rel=1e-3)
