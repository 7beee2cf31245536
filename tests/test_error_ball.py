"""The smallest weight within a tolerance: optimality conditions, limits, and independent solvers."""

import math
from itertools import pairwise

import cases
import numpy as np
import pytest
import reference
import torch
from cases import CASES, FLOAT32
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from onnx_optshift.errors import InputError
from onnx_optshift.solve import error_ball, min_norm
from onnx_optshift.solve.error_ball import BallPath, secular_root
from onnx_optshift.solve.objective import OBJECTIVES
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.solve.spectrum import Coordinates

TOLERANCES = [1e-5, 1e-3, 0.1, 0.5, 0.9]


def path(name, seed=0):
    rows, matrix, spectrum = cases.draw(name, seed)
    return rows, matrix, BallPath(Coordinates.of(spectrum, torch.from_numpy(matrix), FLOAT32))


def stationarity(rows, before, after):
    """How far W is from a multiple of the constraint's gradient AᵀA(V - W), and the multiplier."""
    pull = np.swapaxes(rows, 1, 2) @ (rows @ (before - after))
    multiplier = np.sum(pull * after) / np.sum(pull * pull)
    return np.linalg.norm(after - multiplier * pull) / np.linalg.norm(after), multiplier


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("name", cases.names(conditioned=True))
def test_optimality_conditions(name, tolerance):
    rows, matrix, ball = path(name)
    shift = ball.at(tolerance)
    if shift.outcome is Outcome.ALREADY_MINIMAL:  # the first 1e-5 of a full-rank layer buy less than a millionth
        assert tolerance == TOLERANCES[0]
        return
    w = shift.matrix.numpy()
    # Feasible, and the constraint is active: a smaller weight would be outside.
    assert reference.residual(rows, matrix, w) == pytest.approx(tolerance, rel=1e-7)
    assert shift.predicted_residual == pytest.approx(tolerance, rel=1e-11)
    # The gradient of the Lagrangian vanishes, its multiplier positive. The pull is a difference of order tolerance.
    error, multiplier = stationarity(rows, matrix, w)
    assert error < 1e-8 / tolerance**0.5
    assert multiplier > 0
    # Negative control: another point of the same sphere is not stationary.
    other = matrix + np.random.default_rng(1).standard_normal(matrix.shape)
    other = matrix + (other - matrix) * tolerance / reference.residual(rows, matrix, other)
    assert reference.residual(rows, matrix, other) == pytest.approx(tolerance)
    assert stationarity(rows, matrix, other)[0] > 1e-2
    assert np.linalg.norm(w) < np.linalg.norm(other)


@pytest.mark.parametrize("tolerance", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("name", ["fat", "deficient", "tall", "grouped", "decaying"])
def test_it_is_the_ridge_solution_of_that_residual(name, tolerance):
    rows, matrix, ball = path(name)
    found = ball.at(tolerance).matrix
    np.testing.assert_allclose(found, reference.ball_shift(rows, matrix, tolerance), atol=1e-7)
    assert not np.allclose(found, reference.ball_shift(rows, matrix, 1.01 * tolerance), atol=1e-6)


@pytest.mark.parametrize("tolerance", [0.05, 0.4])
def test_a_general_convex_solver_finds_the_same_norm(tolerance):
    rng = np.random.default_rng(0)
    rows, matrix = rng.standard_normal((1, 5, 6)), rng.standard_normal((1, 6, 2))
    target = rows @ matrix
    limit = tolerance**2 * np.sum(target**2)
    solved = optimize.minimize(
        lambda w: np.sum(w**2),
        matrix.ravel(),
        jac=lambda w: 2 * w,
        constraints={"type": "ineq", "fun": lambda w: 1 - np.sum((rows @ w.reshape(1, 6, 2) - target) ** 2) / limit},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    shift = error_ball.solve(cases.spectrum(rows), torch.from_numpy(matrix), tolerance, FLOAT32)
    assert shift.norm_after**2 == pytest.approx(solved.fun, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_tolerance_zero_is_the_exact_shift_bit_for_bit(name):
    _, matrix, ball = path(name)
    exact = min_norm.solve(cases.draw(name)[2], torch.from_numpy(matrix), FLOAT32)
    for tolerance in (0.0, 1e-300):
        shift = ball.at(tolerance)
        assert torch.equal(shift.matrix, exact.matrix)
        assert shift.outcome is exact.outcome
        assert shift.norm_after == exact.norm_after
    assert not torch.equal(ball.at(0.1).matrix, exact.matrix)


@pytest.mark.parametrize("name", cases.names(freedom=True, conditioned=True))
def test_small_tolerances_approach_the_exact_shift(name):
    _, _, ball = path(name)
    exact = ball.at(0).matrix
    distances = [float((ball.at(tolerance).matrix - exact).norm()) for tolerance in (1e-3, 1e-4, 1e-5, 1e-6)]
    assert all(near < 0.2 * far for far, near in pairwise(distances))


@pytest.mark.parametrize("name", CASES)
def test_the_norm_falls_with_the_tolerance(name):
    _, _, ball = path(name)
    points = ball.frontier([0, *np.logspace(-6, -0.01, 25), 1, 2])
    norms = [norm for _, norm in points]
    assert norms[0] <= 1
    assert all(later <= earlier for earlier, later in pairwise(norms))
    assert max(norms[-2:]) < 1e-12  # W = 0 has the residual 1


def test_dropped_directions_use_up_their_part_of_the_ball():
    # In bfloat16 the second direction is within rounding: it is dropped, and what that costs is not free.
    rows, matrix = np.diag([1.0, 3e-3, 2e-3, 1e-3])[None], np.ones((1, 4, 1))
    ball = BallPath(Coordinates.of(cases.spectrum(rows), torch.from_numpy(matrix), 2.0**-8))
    used = ball.at(0).predicted_residual
    assert ball.at(0).rank == 1
    assert used == pytest.approx(math.sqrt(14e-6), rel=1e-4)
    assert torch.equal(ball.at(0.99 * used).matrix, ball.at(0).matrix)
    for tolerance in (1.01 * used, 1.1 * used, 0.1):
        shift = ball.at(tolerance)
        assert reference.residual(rows, matrix, shift.matrix.numpy()) == pytest.approx(tolerance, rel=1e-9)


def test_the_frontier_is_that_of_the_single_solutions():
    rows, matrix, ball = path("deficient")
    for tolerance, norm in ball.frontier(TOLERANCES):
        w = error_ball.solve(cases.spectrum(rows), torch.from_numpy(matrix), tolerance, FLOAT32).matrix.numpy()
        assert norm == pytest.approx(np.linalg.norm(w) / np.linalg.norm(matrix), rel=1e-12)


def test_groups_share_one_ball():
    rows, matrix, ball = path("grouped")
    together = ball.at(0.2)
    parts = [
        error_ball.solve(cases.spectrum(rows[k : k + 1]), torch.from_numpy(matrix[k : k + 1]), 0.2, FLOAT32)
        for k in range(len(rows))
    ]
    # Sharing the same total residual can only do better than giving each group its own share of it.
    assert together.norm_after**2 < sum(part.norm_after**2 for part in parts)
    residuals = [reference.residual(rows[k], matrix[k], together.matrix[k].numpy()) for k in range(len(rows))]
    assert max(residuals) > 0.2 > min(residuals)


def test_around_a_centre_whose_input_has_moved():
    rng = np.random.default_rng(0)
    before, matrix = rng.standard_normal((1, 60, 8)), rng.standard_normal((1, 8, 3))
    after = before + 0.05 * rng.standard_normal(before.shape)
    target = before @ matrix
    center = np.linalg.lstsq(after[0], target[0], rcond=None)[0][None]
    scale = np.linalg.norm(target)
    floor = np.linalg.norm(after @ center - target) / scale
    around = Coordinates.of(cases.spectrum(after), torch.from_numpy(center), FLOAT32)
    ball = BallPath(around, floor=floor, scale=scale)
    for tolerance in (floor * 1.01, 0.1, 0.3):
        shift = ball.at(tolerance)
        w = shift.matrix.numpy()
        assert np.linalg.norm(after @ w - target) / scale == pytest.approx(tolerance, rel=1e-9)
        assert shift.predicted_residual == pytest.approx(tolerance, rel=1e-9)
        assert stationarity(after, center, w)[0] < 1e-6
        # Negative control: without the floor the same tolerance overshoots.
        blind = BallPath(around, scale=scale).at(tolerance)
        assert np.linalg.norm(after @ blind.matrix.numpy() - target) / scale > 1.01 * tolerance or tolerance > 2 * floor
    assert torch.equal(ball.at(floor / 2).matrix, torch.from_numpy(center))
    assert ball.at(floor / 2).predicted_residual == pytest.approx(floor)


@given(
    logs=st.lists(st.floats(-14, 6), min_size=1, max_size=30),
    energies=st.lists(st.floats(-16, 3), min_size=1, max_size=30),
    tolerance=st.floats(-9, -1e-4),
)
@settings(max_examples=200, deadline=None)
def test_newton_finds_the_root_over_any_scales(logs, energies, tolerance):
    count = min(len(logs), len(energies))
    eigenvalues = 10 ** torch.tensor(logs[:count], dtype=torch.float64)
    energy = 10 ** torch.tensor(energies[:count], dtype=torch.float64)
    radius = math.sqrt(float(energy.sum())) * 10**tolerance
    root, iterations = secular_root(eigenvalues, energy, radius)
    found = math.sqrt(float((energy / (1 + root * eigenvalues) ** 2).sum()))
    assert found == pytest.approx(radius, rel=1e-12)
    assert iterations < 60


def test_a_second_run_on_its_own_ball_still_moves():
    # Not idempotent for a tolerance above 0: the second ball lies around the first solution.
    rows, _, ball = path("tall")
    once = ball.at(0.1).matrix
    assert error_ball.solve(cases.spectrum(rows), once, 0.1, FLOAT32).outcome is Outcome.SHIFTED


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, -math.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tolerances_that_are_no_tolerances(objective, tolerance):
    _, matrix, spectrum = cases.draw("fat")
    with pytest.raises(InputError, match="tolerance"):
        cases.solve(objective, spectrum, torch.from_numpy(matrix), tolerance)


def test_objectives_are_found_by_name():
    _, matrix, spectrum = cases.draw("fat")
    given_matrix = torch.from_numpy(matrix)
    norm, narrow = (cases.solve(name, spectrum, given_matrix, 0.1) for name in ("norm", "range"))
    assert norm.norm_after < narrow.norm_after
    assert narrow.range_after < norm.range_after
