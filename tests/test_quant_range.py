"""The narrowest weight within a tolerance, against linear and quadratic programming."""

from itertools import pairwise

import cases
import numpy as np
import pytest
import reference
import torch
from cases import FLOAT32
from scipy.optimize import linprog

from onnx_optshift.errors import InputError
from onnx_optshift.solve import error_ball, quant_range
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.quant_range import GAP
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.solve.spectrum import Coordinates


def solved(name, tolerance, **granularity):
    rows, matrix, spectrum = cases.draw(name)
    shift = quant_range.solve(
        spectrum, torch.from_numpy(matrix), tolerance, FLOAT32, granularity=Granularity(**granularity)
    )
    return rows, matrix, shift


def column_residuals(rows, before, after):
    moved, output = np.linalg.norm(rows @ (after - before), axis=1), np.linalg.norm(rows @ before, axis=1)
    return moved[output > 1e-9] / output[output > 1e-9]


@pytest.mark.parametrize("mode", ["channel", "tensor", "block"])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("name", cases.names())
def test_every_column_stays_within_its_tolerance_and_no_range_grows(name, tolerance, mode):
    rows, matrix, shift = solved(name, tolerance, mode=mode, block=5)
    w = shift.matrix.numpy()
    assert column_residuals(rows, matrix, w).max(initial=0) <= max(tolerance, FLOAT32) * (1 + 1e-6) + 1e-12
    granularity = Granularity(mode, 5)
    before, after = granularity.ranges(torch.from_numpy(matrix)), granularity.ranges(shift.matrix)
    assert bool((after <= before).all())
    assert shift.range_after <= shift.range_before or mode == "block"
    if shift.outcome.moved:
        assert float(after.sum()) <= (1 - GAP) * float(before.sum())
        assert shift.iterations > 0
    else:
        np.testing.assert_array_equal(w, matrix)


@pytest.mark.parametrize("name", cases.names(freedom=False))
def test_without_freedom_and_tolerance_nothing_moves(name):
    _, matrix, shift = solved(name, 0.0)
    assert shift.outcome is Outcome.FULL_RANK
    np.testing.assert_array_equal(shift.matrix, matrix)
    assert solved(name, 0.1)[2].outcome.moved


@pytest.mark.parametrize("name", ["fat", "one row", "deficient", "one hot", "repeated rows"])
def test_exact_ranges_are_those_of_linear_programming(name):
    rows, matrix, shift = solved(name, 0.0)
    # Of dependent rows only as many as there are directions go to the linear program.
    basis = np.linalg.svd(rows[0], full_matrices=False)[2][: np.linalg.matrix_rank(rows[0])]
    best = np.array([reference.narrowest_exact(basis, column) for column in matrix[0].T])
    found = np.abs(shift.matrix[0].numpy()).max(0)
    assert np.all(found >= best * (1 - 1e-5))  # nothing beats the optimum
    assert shift.outcome is Outcome.SHIFTED
    assert found.sum() <= best.sum() * (1 + 2 * GAP)
    # Negative control: the smallest norm is not the smallest range.
    norm = error_ball.solve(cases.spectrum(rows), torch.from_numpy(matrix), 0.0, FLOAT32).matrix[0].numpy()
    if name != "one hot":  # where inputs that never occur are the only freedom, both set them to 0
        assert np.abs(norm).max(0).sum() > best.sum() * (1 + 4 * GAP)


@pytest.mark.parametrize("tolerance", [0.02, 0.2])
@pytest.mark.parametrize("name", ["fat", "tall", "dead units", "deficient"])
def test_ranges_are_those_of_a_general_convex_solver(name, tolerance):
    rows, matrix, shift = solved(name, tolerance)
    best = np.array([reference.narrowest(rows[0], column, tolerance) for column in matrix[0].T])
    found = np.abs(shift.matrix[0].numpy()).max(0)
    assert np.all(found >= best * (1 - 1e-4))
    assert found.sum() <= best.sum() * (1 + 2 * GAP)
    assert found.sum() < np.abs(matrix).max(1).sum() * (1 - 4 * GAP)


def test_blocks_minimize_the_sum_of_their_ranges():
    rows, matrix, shift = solved("tall", 0.1, mode="block", block=4)
    best = sum(reference.narrowest(rows[0], column, 0.1, blocks=3) for column in matrix[0].T)
    found = np.abs(shift.matrix[0].numpy()).reshape(3, 4, -1).max(1).sum()
    assert best * (1 - 1e-4) <= found <= best * (1 + 2 * GAP)
    channel = np.abs(solved("tall", 0.1)[2].matrix[0].numpy()).reshape(3, 4, -1).max(1).sum()
    assert channel > found * (1 + 4 * GAP)


def test_a_tensor_is_as_wide_as_its_widest_column_must_be():
    rows, matrix, shift = solved("tall", 0.1, mode="tensor")
    best = max(reference.narrowest(rows[0], column, 0.1) for column in matrix[0].T)
    assert best * (1 - 1e-4) <= shift.range_after <= best * (1 + 2 * GAP)


@pytest.mark.parametrize("name", ["fat", "deficient", "one hot", "grouped", "dead units"])
def test_a_second_exact_run_finds_nothing(name):
    _, _, shift = solved(name, 0.0)
    spectrum = cases.draw(name)[2]
    assert shift.outcome is Outcome.SHIFTED
    again = quant_range.solve(spectrum, shift.matrix.float(), 0.0, FLOAT32)
    assert again.outcome is Outcome.ALREADY_MINIMAL
    assert torch.equal(again.matrix, shift.matrix.float().double())


def test_ranges_fall_with_the_tolerance():
    ranges = [
        Granularity().ranges(solved("decaying", tolerance)[2].matrix).sum() for tolerance in (1e-3, 1e-2, 0.1, 0.5, 1)
    ]
    assert all(later < earlier for earlier, later in pairwise(ranges))
    assert float(ranges[-1]) < 1e-6


def test_directions_too_weak_for_the_rank_still_count():
    # At bfloat16's rounding unit most directions of this case are dropped; moved far enough they would be felt.
    rows, matrix, spectrum = cases.draw("decaying")
    unit = 2.0**-8
    assert Coordinates.of(spectrum, torch.from_numpy(matrix), unit).rank < spectrum.width - 5
    for tolerance in (0.0, 0.01):
        w = quant_range.solve(spectrum, torch.from_numpy(matrix), tolerance, unit).matrix.numpy()
        assert column_residuals(rows, matrix, w).max() == pytest.approx(max(tolerance, unit), rel=1e-6)


@pytest.mark.parametrize("limit", [10, 500])
def test_a_column_that_is_narrowest_already_does_not_grow(limit, monkeypatch):
    rows, matrix, shift = solved("deficient", 0.0)
    given = torch.from_numpy(matrix).clone()
    given[..., :3] = shift.matrix[..., :3]
    monkeypatch.setattr(quant_range, "MAX_ITERATIONS", limit)
    again = quant_range.solve(cases.spectrum(rows), given, 0.0, FLOAT32)
    assert again.outcome.moved
    before, after = Granularity().ranges(given), Granularity().ranges(again.matrix)
    assert bool((after <= before).all())
    np.testing.assert_allclose(after[..., :3], before[..., :3], rtol=4 * GAP)
    assert bool((after[..., 3:] < 0.99 * before[..., 3:]).all())


def test_stopping_early_is_said_and_still_within_the_tolerance(monkeypatch):
    monkeypatch.setattr(quant_range, "MAX_ITERATIONS", 10)
    rows, matrix, shift = solved("decaying", 0.001)
    assert shift.outcome is Outcome.STOPPED_EARLY
    assert shift.iterations == 10
    assert column_residuals(rows, matrix, shift.matrix.numpy()).max() <= 0.001 * (1 + 1e-6)
    monkeypatch.undo()
    assert solved("decaying", 0.001)[2].range_after < shift.range_after


def test_columns_without_output_become_zero():
    rows, matrix, _ = cases.draw("one hot")
    matrix[0, :7, 1] = 0  # reads only inputs that never occur
    shift = quant_range.solve(cases.spectrum(rows), torch.from_numpy(matrix), 0.1, FLOAT32)
    assert float(shift.matrix[0, :, 1].abs().max()) == 0
    assert float(shift.matrix[0, :, 0].abs().max()) > 0.1


def test_granularities_that_do_not_exist():
    with pytest.raises(InputError, match="'row'"):
        Granularity("row")
    with pytest.raises(InputError, match="blocks of 0"):
        Granularity("block", 0)


def uneven(columns, reach):
    """Widths of columns `[d, m]` whose far side, that of their own largest entry, counts by 1/reach."""
    up, down = columns.max(0).clip(0), (-columns).max(0).clip(0)
    return np.maximum(np.maximum(up, down) / reach, np.minimum(up, down))


@pytest.mark.parametrize("reach", [8 / 7, 2.0])
@pytest.mark.parametrize("name", ["fat", "one row", "deficient", "repeated rows"])
def test_uneven_levels_are_those_of_linear_programming(name, reach):
    rows, matrix, shift = solved(name, 0.0, reach=reach)
    basis = np.linalg.svd(rows[0], full_matrices=False)[2][: np.linalg.matrix_rank(rows[0])]
    width, best = basis.shape[1], []
    for column in matrix[0].T:
        sign = -np.sign(column[np.abs(column).argmax()])  # the far side is the negative one of sign * column
        cost, ones = np.eye(width + 1)[-1], np.ones((width, 1))
        bounds = np.block([[np.eye(width), -ones], [-np.eye(width), -reach * ones]])
        equal = np.hstack([basis, np.zeros((len(basis), 1))])
        program = linprog(
            cost, bounds, np.zeros(2 * width), equal, basis @ (sign * column), [(None, None)] * width + [(0, None)]
        )
        best.append(program.fun)
    found = uneven(shift.matrix[0].numpy(), reach)
    assert found.sum() <= sum(best) * (1 + 2 * GAP)
    np.testing.assert_allclose(
        rows[0] @ shift.matrix[0].numpy(), rows[0] @ matrix[0], atol=1e-6 * np.abs(matrix).max() * width
    )
    # Negative control: the even solution is wider by these levels.
    assert uneven(solved(name, 0.0)[2].matrix[0].numpy(), reach).sum() > sum(best) * (1 + 4 * GAP)


@pytest.mark.parametrize("mode", ["channel", "tensor", "block"])
@pytest.mark.parametrize("name", ["tall", "fat", "grouped", "dead units"])
def test_uneven_levels_keep_the_tolerance_and_never_widen(name, mode):
    rows, matrix, shift = solved(name, 0.1, mode=mode, block=5, reach=4 / 3)
    assert column_residuals(rows, matrix, shift.matrix.numpy()).max(initial=0) <= 0.1 * (1 + 1e-6)
    granularity = Granularity(mode, 5, 4 / 3)
    assert bool((granularity.ranges(shift.matrix) <= granularity.ranges(torch.from_numpy(matrix))).all())
    assert shift.outcome is Outcome.SHIFTED
