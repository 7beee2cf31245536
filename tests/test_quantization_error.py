"""Output errors of quantized weights against the rows themselves."""

import math

import numpy as np
import pytest
import torch

from onnx_optshift.quantize.rtn import Grid, round_to_nearest
from onnx_optshift.solve import error_ball
from onnx_optshift.solve.rounding_error import output_error, output_errors
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments

WIDTH, OUTPUTS = 12, 5


def case(groups=1, rows=200, seed=0):
    """Correlated rows `[g, n, d]`, a matrix `[g, d, m]`, and the spectrum of the rows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    a = torch.randn(groups, rows, WIDTH, generator=generator, dtype=torch.float64) @ mixing
    v = torch.randn(groups, WIDTH, OUTPUTS, generator=generator, dtype=torch.float64)
    moments = InputMoments(groups, WIDTH)
    moments.update(a)
    return a, v, factor(moments)


def by_rows(a, original, weight):
    """‖A(W - V)‖ / ‖A V‖ from the outputs of every row."""
    before, after = (a @ original).numpy(), (a @ weight).numpy()
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.mark.parametrize("rows", [7, 200])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("grid", [Grid(4), Grid(2, "tensor"), Grid(3, "block", 5, "unsigned")], ids=str)
def test_is_the_error_of_the_outputs(grid, groups, rows):
    a, v, spectrum = case(groups, rows)
    w = v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = output_error(spectrum, v, w, grid)
    assert found == pytest.approx(by_rows(a, v, round_to_nearest(w, grid)), rel=1e-6)
    # Not the error of quantizing W against W's own outputs.
    assert found != pytest.approx(by_rows(a, w, round_to_nearest(w, grid)), rel=1e-3)


def test_deviation_counts_where_quantization_is_free():
    a, v, spectrum = case()
    levels = torch.from_numpy(np.random.default_rng(0).integers(-7, 8, v.shape).astype(np.float64))
    levels[:, 0] = 7  # on the grid already: rounding W costs nothing
    error = output_error(spectrum, v, levels, Grid(4))
    assert error == pytest.approx(by_rows(a, v, levels), rel=1e-9)
    assert error > 0.5
    assert output_error(spectrum, levels, levels, Grid(4)) == pytest.approx(0, abs=1e-12)


def test_before_and_after_for_each_bit_width():
    a, v, spectrum = case()
    w = error_ball.solve(spectrum, v, 0.05, 2.0**-24).matrix
    grids = [Grid(bits) for bits in (8, 4, 2)]
    before, after = (output_errors(spectrum, v, weight, grids) for weight in (v, w))
    for grid in grids:
        assert before[grid] == pytest.approx(by_rows(a, v, round_to_nearest(v, grid)), rel=1e-6)
        assert after[grid] == pytest.approx(by_rows(a, v, round_to_nearest(w, grid)), rel=1e-6)
    # At 8 bits the deviation of the shift outweighs the rounding it saves.
    assert after[grids[0]] > 0.04 > before[grids[0]]
    assert before[grids[-1]] > before[grids[0]]


def test_the_grid_is_passed_on():
    _, v, spectrum = case()
    grids = [Grid(4, "block", 3), Grid(4)]
    blocks, channels = output_errors(spectrum, v, v, grids).values()
    assert blocks == output_error(spectrum, v, v, grids[0])
    assert blocks != channels


def test_rounding_what_no_row_reads_is_free():
    a, v, _ = case()
    a[..., :4] = 0
    v[:, 0] = 1000.0  # sets the scale of its column, and is read by nobody
    moments = InputMoments(1, WIDTH)
    moments.update(a)
    spectrum = factor(moments)
    exact = error_ball.solve(spectrum, v, 0.0, 2.0**-24).matrix
    assert output_error(spectrum, v, v, Grid(4)) > 0.9
    assert output_error(spectrum, v, exact, Grid(4)) < 0.2


def test_no_output_at_all():
    _, v, spectrum = case()
    zero = torch.zeros_like(v)
    assert output_error(spectrum, zero, zero, Grid(4)) == 0
    assert output_error(spectrum, zero, v, Grid(4)) == math.inf
