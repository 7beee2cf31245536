"""Round-to-nearest against plain loops over scales, and the properties that a quantizer must have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Reshape, Transpose, WeightForm
from onnx_optshift.quantize.rtn import Grid, round_initializer, round_to_nearest


def grid_points(values, bits, asymmetric):
    """All levels of one scale, from the definition."""
    if asymmetric:
        low, high = min(0.0, values.min()), max(0.0, values.max())
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale) if scale else 0
        return scale * (np.arange(2**bits) - zero)
    scale = np.abs(values).max() / (2 ** (bits - 1) - 1)
    return scale * np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))


def nearest(values, bits, asymmetric):
    """Each value at the closest of its levels, one by one."""
    levels = grid_points(values, bits, asymmetric)
    return np.array([levels[np.abs(levels - value).argmin()] for value in values])


def reference(matrix, grid):
    """Loops over everything that has a scale of its own."""
    result = np.empty_like(matrix)
    if grid.scope == "tensor":
        return nearest(matrix.ravel(), grid.bits, grid.asymmetric).reshape(matrix.shape)
    groups, width, outputs = matrix.shape
    size = grid.block or width
    for g in range(groups):
        for j in range(outputs):
            for start in range(0, width, size):
                part = (g, slice(start, start + size), j)
                result[part] = nearest(matrix[part], grid.bits, grid.asymmetric)
    return result


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


SCOPES = [{"scope": "channel"}, {"scope": "tensor"}, {"scope": "block", "block": 4}, {"scope": "block", "block": 7}]


@pytest.mark.parametrize("asymmetric", [False, True], ids=["int", "uint"])
@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: f"{s['scope']}{s.get('block', '')}")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_nearest_level_found_by_search(bits, scope, asymmetric):
    grid = Grid(bits, **scope, asymmetric=asymmetric)
    matrix = normal(2, 10, 5)
    found = round_to_nearest(torch.from_numpy(matrix), grid).numpy()
    # Only a value exactly between two levels may go either way; none of these is.
    np.testing.assert_allclose(found, reference(matrix, grid), atol=1e-13)


@pytest.mark.parametrize("wrong", [{"scope": "tensor"}, {"scope": "block", "block": 5}, {"asymmetric": True}])
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


def test_unsigned_by_hand():
    column = torch.tensor([12.0, -3.0, 0.0, 5.4]).reshape(1, 4, 1)  # scale 1, zero point 3
    assert round_to_nearest(column, Grid(4, asymmetric=True)).flatten().tolist() == [12, -3, 0, 5]


@pytest.mark.parametrize("offset", [5.0, -5.0])
def test_unsigned_range_holds_zero(offset):
    matrix = torch.from_numpy(normal(1, 20, 3)) * 0.1 + offset
    matrix[0, 3] = 0.0
    rounded = round_to_nearest(matrix, Grid(4, asymmetric=True))
    assert bool((rounded[0, 3] == 0).all())


def test_integer_weights_on_the_grid_stay():
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.integers(-7, 8, (2, 30, 4)).astype(np.float64))
    matrix[:, 0] = 7
    assert torch.equal(round_to_nearest(matrix, Grid(4)), matrix)
    assert not torch.equal(round_to_nearest(matrix, Grid(3)), matrix)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: f"{s['scope']}{s.get('block', '')}")
def test_a_zero_channel_stays_zero(scope, asymmetric):
    matrix = torch.from_numpy(normal(1, 9, 3))
    matrix[:, :, 1] = 0
    rounded = round_to_nearest(matrix, Grid(3, **scope, asymmetric=asymmetric))
    assert bool((rounded[:, :, 1] == 0).all())
    assert bool(torch.isfinite(rounded).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.sampled_from(SCOPES), st.booleans(), st.integers(0, 10**6), st.floats(-30, 30))
def test_within_half_a_step_idempotent_and_scale_free(bits, scope, asymmetric, seed, exponent):
    grid = Grid(bits, **scope, asymmetric=asymmetric)
    matrix = torch.from_numpy(normal(2, 11, 3, seed=seed))
    rounded = round_to_nearest(matrix, grid)
    steps = 2**bits - 1 if asymmetric else 2 ** (bits - 1) - 1
    widest = matrix.max().clamp(min=0) - matrix.min().clamp(max=0) if asymmetric else matrix.abs().max()
    # The zero point is rounded too, so that an unsigned end may be cut by another half step.
    reach = 1.0 if asymmetric else 0.5
    assert float((rounded - matrix).abs().max()) <= reach * float(widest) / steps * (1 + 1e-12)
    factor = 2.0 ** round(exponent)
    assert torch.equal(round_to_nearest(matrix * factor, grid), rounded * factor)
    if not asymmetric:
        torch.testing.assert_close(round_to_nearest(rounded, grid), rounded, rtol=1e-13, atol=0)


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
        expected = nearest(before.ravel().astype(np.float64), 4, asymmetric=False)
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
        ({"bits": 4, "scope": "block"}, "Give a block size"),
        ({"bits": 4, "block": 32}, "with scope 'channel'"),
        ({"bits": 4, "scope": "block", "block": 0}, "at least 1, found 0"),
    ],
)
def test_unusable_grids_are_refused(arguments, expected):
    with pytest.raises(InputError, match=expected):
        Grid(**arguments)
