"""Moments: a monoid, exact, independent of order, split and representation."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_optshift.stats.moments import InputMoments


def gathered(rows, splits=()):
    moments = InputMoments(rows.shape[0], rows.shape[2])
    for part in np.split(rows, sorted(splits), axis=1):
        moments.update(torch.from_numpy(np.ascontiguousarray(part)))
    return moments


def assert_same(moments, rows):
    """Moments are those of these rows, to rounding of a sum of len(rows) products."""
    gram = np.swapaxes(rows, 1, 2) @ rows
    assert moments.rows == rows.shape[1]
    assert np.linalg.norm(moments.gram().numpy() - gram) <= 1e-14 * np.linalg.norm(gram) * max(1, rows.shape[1]) ** 0.5
    np.testing.assert_allclose(moments.total, rows.sum(1), rtol=1e-12, atol=1e-12)


@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 12),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_order_and_split_do_not_matter(rows, width, groups, seed, data):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((groups, rows, width))
    splits = data.draw(st.lists(st.integers(0, rows), max_size=5))
    whole, split = gathered(a), gathered(a, splits)
    shuffled = gathered(a[:, rng.permutation(rows)], splits)
    for moments in (whole, split, shuffled):
        assert_same(moments, a)
        assert (moments.stored_rows is not None) == (rows <= width)


def test_float32_products_resolve_what_they_say():
    rows = np.random.default_rng(0).standard_normal((2, 4000, 9))
    exact, single = InputMoments(2, 9), InputMoments(2, 9, products=torch.float32)
    for part in np.array_split(rows, 11, axis=1):
        exact.update(torch.from_numpy(part))
        single.update(torch.from_numpy(part).to(torch.float32))
    single = single.merge(InputMoments(2, 9))
    off = float((single.gram() - exact.gram()).norm() / exact.gram().norm())
    assert off < 1e-6  # so that singular values of 1e-3 of the largest are resolved
    assert off > 1e-10  # negative control: the products were float32
    torch.testing.assert_close(single.total, exact.total, rtol=1e-5, atol=1e-5)
    assert single.gram().dtype == torch.float64


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_merge_is_a_commutative_monoid(counts, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((2, count, 6)) for count in counts]
    whole = np.concatenate(parts, axis=1)
    assert_same(functools.reduce(lambda x, y: x.merge(y), map(gathered, parts)), whole)
    assert_same(functools.reduce(lambda x, y: y.merge(x), map(gathered, parts)), whole)
    assert_same(InputMoments(2, 6).merge(gathered(whole)), whole)
    assert_same(gathered(whole).merge(InputMoments(2, 6)), whole)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 30), (30, 3), (30, 30), (4, 4)])
def test_merging_leaves_the_parts_alone(first, second):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1, first, 7)), rng.standard_normal((1, second, 7))
    left, right = gathered(a), gathered(b)
    left.nonfinite, right.nonfinite = 2, 3
    merged = left.merge(right)
    merged.update(torch.ones(1, 20, 7))
    assert merged.nonfinite == 5
    assert_same(left, a)
    assert_same(right, b)
    assert_same(merged, np.concatenate([a, b, np.ones((1, 20, 7))], axis=1))


def test_rows_are_kept_while_they_are_few_and_then_folded():
    a = np.random.default_rng(0).standard_normal((2, 9, 8))
    moments = InputMoments(2, 8)
    for k in range(8):
        moments.update(torch.from_numpy(a[:, k : k + 1]))
        np.testing.assert_array_equal(moments.stored_rows, a[:, : k + 1])
    moments.update(torch.from_numpy(a[:, 8:]))
    assert moments.stored_rows is None
    assert_same(moments, a)


def test_stored_rows_do_not_alias_the_callers_buffer():
    buffer = torch.ones(1, 2, 4, dtype=torch.float64)
    moments = InputMoments(1, 4)
    moments.update(buffer)
    buffer.zero_()
    assert float(moments.stored_rows.sum()) == 8


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200, 600])
def test_gram_is_symmetric_at_every_block_size(width):
    a = np.random.default_rng(width).standard_normal((1, width + 5, width))
    moments = gathered(a)
    assert torch.equal(moments.gram(), moments.gram().mT)
    assert_same(moments, a)
    # Negative control: the comparison sees one row too many.
    with pytest.raises(AssertionError):
        assert_same(moments, np.concatenate([a, 1e-3 * a[:, :1]], axis=1))


def test_float32_rows_are_summed_in_float64():
    # In float32 the sum of 1 and many 1e-8 stays 1.
    rows = torch.full((1, 10_000, 1), 1e-8)
    rows[0, 0] = 1
    moments = InputMoments(1, 1)
    for part in torch.split(rows, 1000, 1):
        moments.update(part)
    assert float(moments.total) == pytest.approx(1 + 9999e-8, rel=1e-9)
    assert float(rows.cumsum(1)[0, -1]) != pytest.approx(1 + 9999e-8, rel=1e-9)


def test_held_bytes_are_bounded():
    moments = InputMoments(2, 16)
    bound = 8 * 2 * 16 * 17
    for _ in range(40):
        moments.update(torch.ones(2, 3, 16))
        assert moments.nbytes <= bound
    assert moments.nbytes == bound


def test_shapes_that_do_not_fit_are_refused():
    moments = InputMoments(2, 4)
    for shape in ((2, 3, 5), (1, 3, 4), (3, 4)):
        with pytest.raises(ValueError, match="must be"):
            moments.update(torch.ones(shape))
    with pytest.raises(ValueError, match="must be"):
        moments.update_gram(torch.ones(2, 4, 5), torch.ones(2, 4), 3)
    with pytest.raises(ValueError, match="cannot take"):
        moments.merge(InputMoments(2, 5))


def restored(moments):
    """The same moments by way of their state's bytes."""
    state = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in moments.state().items()}
    return InputMoments.from_state(state, products=moments.products)


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
@pytest.mark.parametrize("interrupted_after", range(6))
def test_what_is_saved_and_read_in_between_goes_on_bit_by_bit(products, interrupted_after):
    # Batches cross from stored rows to the Gram matrix; some lie transposed in memory, as convolutions hand them over.
    # 70 wide: several block rows; 3 to 24 rows: sums whose order shows in the last bits.
    rng = np.random.default_rng(3)
    batches = [torch.from_numpy(rng.standard_normal((2, n, 140))).float() for n in (3, 24, 5, 90, 61, 7)]
    batches[1] = batches[1].mT.contiguous().mT
    straight, resumed = InputMoments(2, 140, products=products), InputMoments(2, 140, products=products)
    for number, batch in enumerate(batches):
        straight.update(batch)
        straight.nonfinite += number
        resumed.update(batch)
        resumed.nonfinite += number
        if number == interrupted_after:
            resumed = restored(resumed)
    expected, found = straight.state(), resumed.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(straight.gram(), resumed.gram())
    assert torch.equal(straight.merge(resumed).gram(), resumed.merge(restored(straight)).gram())


def test_looking_at_stored_rows_changes_no_bit_of_what_becomes_of_them():
    rng = np.random.default_rng(4)
    batches = [torch.from_numpy(rng.standard_normal((1, n, 130))).float() for n in (31, 40, 29, 60)]
    untouched, looked_at = InputMoments(1, 130), InputMoments(1, 130)
    for batch in batches:
        untouched.update(batch)
        looked_at.update(batch)
        looked_at.state()
    # The negative control: added one by one, the same rows give other bits.
    apart = sum(b.double().mT @ b.double() for b in batches[:3])
    assert not torch.equal(
        apart.triu(), torch.cat(batches[:3], 1).double().mT.matmul(torch.cat(batches[:3], 1).double()).triu()
    )
    assert torch.equal(untouched.gram(), looked_at.gram())
