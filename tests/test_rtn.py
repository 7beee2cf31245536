"""Round-to-nearest against plain loops over scales, and the properties that a quantizer must have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Reshape, Transpose, WeightForm
from onnx_optshift.quantize.rtn import LEVELS, Grid, round_initializer, round_to_nearest


def grid_points(values, bits, levels):
    """All levels of one scale, from the definition."""
    if levels == "full":
        return values[np.abs(values).argmax()] / -(2 ** (bits - 1)) * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    if levels == "unsigned":
        low, high = min(0.0, values.min()), max(0.0, values.max())
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale) if scale else 0
        return scale * (np.arange(2**bits) - zero)
    scale = np.abs(values).max() / (2 ** (bits - 1) - 1)
    return scale * np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))


def nearest(values, bits, levels="symmetric"):
    """Each value at the closest of its levels, one by one."""
    points = grid_points(values, bits, levels)
    return np.array([points[np.abs(points - value).argmin()] for value in values])


def reference(matrix, grid):
    """Loops over everything that has a scale of its own."""
    result = np.empty_like(matrix)
    if grid.scope == "tensor":
        return nearest(matrix.ravel(), grid.bits, grid.levels).reshape(matrix.shape)
    groups, width, outputs = matrix.shape
    size = grid.block or width
    for g in range(groups):
        for j in range(outputs):
            for start in range(0, width, size):
                part = (g, slice(start, start + size), j)
                result[part] = nearest(matrix[part], grid.bits, grid.levels)
    return result


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


SCOPES = [{"scope": "channel"}, {"scope": "tensor"}, {"scope": "block", "block": 4}, {"scope": "block", "block": 7}]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: f"{s['scope']}{s.get('block', '')}")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_nearest_level_found_by_search(bits, scope, levels):
    grid = Grid(bits, **scope, levels=levels)
    matrix = normal(2, 10, 5)
    found = round_to_nearest(torch.from_numpy(matrix), grid).numpy()
    # Only a value exactly between two levels may go either way; none of these is.
    np.testing.assert_allclose(found, reference(matrix, grid), atol=1e-13)


@pytest.mark.parametrize(
    "wrong", [{"scope": "tensor"}, {"scope": "block", "block": 5}, {"levels": "unsigned"}, {"levels": "full"}]
)
def test_the_comparison_tells_grids_apart(wrong):
    matrix = normal(2, 10, 5)
    found = round_to_nearest(torch.from_numpy(matrix), Grid(4, **wrong)).numpy()
    assert np.abs(found - reference(matrix, Grid(4))).max() > 0.01


def test_four_bits_by_hand():
    column = torch.tensor([7.0, -7.0, 0.4, 0.6, -2.5, -3.5]).reshape(1, 6, 1)
    assert round_to_nearest(column, Grid(4)).flatten().tolist() == [7, -7, 0, 1, -2, -4]  # halves to even


def test_two_bits_are_three_levels():
    column = torch.tensor([3.0, -1.6, 1.4, -0.2]).reshape(1, 4, 1)
    assert round_to_nearest(column, Grid(2)).flatten().tolist() == [3, -3, 0, 0]


def test_full_by_hand():
    column = torch.tensor([8.0, -8.0, 3.4, -6.6]).reshape(1, 4, 1)  # of two extremes the negative one counts
    assert round_to_nearest(column, Grid(4, levels="full")).flatten().tolist() == [7, -8, 3, -7]
    assert round_to_nearest(-column[:, 1:], Grid(4, levels="full")).flatten().tolist() == [8, -3, 7]


def test_unsigned_by_hand():
    column = torch.tensor([12.0, -3.0, 0.0, 5.4]).reshape(1, 4, 1)  # scale 1, zero point 3
    assert round_to_nearest(column, Grid(4, levels="unsigned")).flatten().tolist() == [12, -3, 0, 5]


@pytest.mark.parametrize("offset", [5.0, -5.0])
def test_unsigned_range_holds_zero(offset):
    matrix = torch.from_numpy(normal(1, 20, 3)) * 0.1 + offset
    matrix[0, 3] = 0.0
    rounded = round_to_nearest(matrix, Grid(4, levels="unsigned"))
    assert bool((rounded[0, 3] == 0).all())


def test_integer_weights_on_the_grid_stay():
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.integers(-7, 8, (2, 30, 4)).astype(np.float64))
    matrix[:, 0] = 7
    assert torch.equal(round_to_nearest(matrix, Grid(4)), matrix)
    assert not torch.equal(round_to_nearest(matrix, Grid(3)), matrix)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: f"{s['scope']}{s.get('block', '')}")
def test_a_zero_channel_stays_zero(scope, levels):
    matrix = torch.from_numpy(normal(1, 9, 3))
    matrix[:, :, 1] = 0
    rounded = round_to_nearest(matrix, Grid(3, **scope, levels=levels))
    assert bool((rounded[:, :, 1] == 0).all())
    assert bool(torch.isfinite(rounded).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.sampled_from(SCOPES), st.sampled_from(LEVELS), st.integers(0, 10**6), st.integers(-30, 30))
def test_close_free_of_scale_and_idempotent(bits, scope, levels, seed, exponent):
    grid = Grid(bits, **scope, levels=levels)
    matrix = torch.from_numpy(normal(2, 11, 3, seed=seed))
    rounded = round_to_nearest(matrix, grid)
    if levels == "unsigned":
        step = (matrix.max().clamp(min=0) - matrix.min().clamp(max=0)) / (2**bits - 1)
    else:
        step = matrix.abs().max() / (2 ** (bits - 1) - (levels == "symmetric"))
    # An end of the range may fall beyond the last level: by half a step where the zero point is rounded, by a whole one
    # where a side lacks the last level.
    reach = 0.5 if levels == "symmetric" else 1.0
    assert float((rounded - matrix).abs().max()) <= reach * float(step) * (1 + 1e-12)
    assert torch.equal(round_to_nearest(matrix * 2.0**exponent, grid), rounded * 2.0**exponent)
    if levels != "unsigned":  # its zero point rounds halves to even, which is not the same on both sides
        torch.testing.assert_close(round_to_nearest(-matrix, grid), -rounded, rtol=0, atol=0)
        torch.testing.assert_close(round_to_nearest(rounded, grid), rounded, rtol=1e-13, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_at_the_ends_of_the_reach_are_on_levels(bits, levels):
    grid = Grid(bits, levels=levels)
    ends = torch.tensor([-grid.reach, 1.0, 0.0, -grid.reach, 1.0], dtype=torch.float64).reshape(1, 5, 1)
    for matrix in (ends, -ends):
        torch.testing.assert_close(round_to_nearest(matrix, grid), matrix)
    if levels != "symmetric":  # equal ends are half a step or a whole one off
        equal = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64).reshape(1, 3, 1)
        step = (2 / (2**bits - 1)) if levels == "unsigned" else 2.0 ** (1 - bits)
        off = (round_to_nearest(equal, grid) - equal).abs().max()
        assert float(off) == pytest.approx(step * (0.5 if levels == "unsigned" else 1))


def test_more_bits_are_closer():
    matrix = torch.from_numpy(normal(1, 200, 10))
    errors = [float((round_to_nearest(matrix, Grid(bits)) - matrix).norm()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 40 * errors[-1]


def test_smaller_scopes_are_closer():
    matrix = torch.from_numpy(normal(1, 256, 16) * np.geomspace(0.1, 10, 16))
    tensor, channel, block = (
        float((round_to_nearest(matrix, grid) - matrix).norm())
        for grid in (Grid(4, "tensor"), Grid(4), Grid(4, "block", 32))
    )
    assert block < channel < tensor


def test_a_block_as_long_as_the_column_is_the_channel():
    matrix = torch.from_numpy(normal(2, 12, 3))
    for block in (12, 100):
        assert torch.equal(round_to_nearest(matrix, Grid(4, "block", block)), round_to_nearest(matrix, Grid(4)))


def test_input_is_not_touched_and_float32_is_taken():
    matrix = torch.from_numpy(normal(1, 6, 2).astype(np.float32))
    before = matrix.clone()
    rounded = round_to_nearest(matrix, Grid(3))
    assert rounded.dtype == torch.float64
    assert torch.equal(matrix, before)


def test_empty_matrices_pass():
    assert round_to_nearest(torch.zeros(1, 0, 3), Grid(4)).shape == (1, 0, 3)
    assert round_to_nearest(torch.zeros(1, 3, 0), Grid(4, "block", 2)).shape == (1, 3, 0)


def test_nan_spreads_over_its_scale_only():
    matrix = torch.from_numpy(normal(1, 6, 3))
    matrix[0, 2, 1] = torch.nan
    rounded = round_to_nearest(matrix, Grid(4))
    assert bool(rounded[..., 1].isnan().all())
    assert bool(rounded[..., [0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_initializer_goes_through_its_form(dtype):
    # A convolution's kernel [out, in, kh, kw]: its output channels are the columns of V.
    kernel = normal(6, 4, 3, 3).astype(dtype)
    form = WeightForm(kernel.shape, (Reshape((1, 6, 36)), Transpose((0, 2, 1))))
    rounded = round_initializer(kernel, form, Grid(4))
    assert rounded.dtype == dtype
    assert rounded.shape == kernel.shape
    for before, after in zip(kernel, rounded, strict=True):
        expected = nearest(before.ravel().astype(np.float64), 4)
        np.testing.assert_array_equal(after.ravel(), expected.astype(dtype))
    assert not np.array_equal(
        rounded, round_initializer(kernel, WeightForm(kernel.shape, (Reshape((1, 6, 36)),)), Grid(4))
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bits": 1}, "from 2 to 8, found 1"),
        ({"bits": 9}, "from 2 to 8, found 9"),
        ({"bits": 4.5}, "from 2 to 8, found 4.5"),
        ({"bits": True}, "found True"),
        ({"bits": 4, "scope": "chanel"}, "Close matches: 'channel'"),
        ({"bits": 4, "levels": "asymmetric"}, "levels: 'asymmetric' is not known"),
        ({"bits": 4, "scope": "block"}, "Give a block size"),
        ({"bits": 4, "block": 32}, "with scope 'channel'"),
        ({"bits": 4, "scope": "block", "block": 0}, "at least 1, found 0"),
    ],
)
def test_unusable_grids_are_refused(arguments, expected):
    with pytest.raises(InputError, match=expected):
        Grid(**arguments)
