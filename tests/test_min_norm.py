"""The exact shift, against the pseudoinverse."""

import cases
import numpy as np
import pytest
import reference
import torch
from cases import CASES, FLOAT32

from onnx_optshift.solve import min_norm
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments


def solved(name, seed=0):
    rows, matrix, spectrum = cases.draw(name, seed)
    return rows, matrix, spectrum, min_norm.solve(spectrum, torch.from_numpy(matrix), FLOAT32)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", cases.names(freedom=True, conditioned=True))
def test_it_is_the_pseudoinverse_solution(name, seed):
    rows, matrix, _, shift = solved(name, seed)
    expected = reference.exact_shift(rows, matrix)
    assert shift.outcome is Outcome.SHIFTED
    np.testing.assert_allclose(shift.matrix, expected, atol=1e-9 * np.abs(expected).max())
    assert reference.residual(rows, matrix, shift.matrix.numpy()) < 1e-12
    assert shift.norm_before == pytest.approx(np.linalg.norm(matrix))
    assert shift.norm_after == pytest.approx(np.linalg.norm(expected))
    assert shift.norm_after < shift.norm_before
    assert shift.range_before == np.abs(matrix).max()
    assert shift.range_after == pytest.approx(np.abs(expected).max())
    assert shift.predicted_residual < FLOAT32
    assert shift.rank == sum(np.linalg.matrix_rank(a, tol=1e-9) for a in rows) // len(rows)


@pytest.mark.parametrize("name", cases.names(freedom=True, conditioned=True))
def test_no_other_solution_is_smaller(name):
    rows, matrix, _, shift = solved(name)
    rng = np.random.default_rng(3)
    w = shift.matrix.numpy()
    for a, v, group in zip(rows, matrix, w, strict=True):
        null = np.eye(a.shape[1]) - np.linalg.pinv(a, rcond=1e-10) @ a
        other = null @ rng.standard_normal(v.shape)
        # Orthogonal to every change that the equation allows: the gradient of the norm vanishes along the solutions.
        assert abs(np.sum(group * other)) <= 1e-9 * np.linalg.norm(v) * np.linalg.norm(other)
        assert abs(np.sum(v * other)) > 1e-9 * np.linalg.norm(v) * np.linalg.norm(other)  # V itself is not


@pytest.mark.parametrize("name", cases.names(freedom=True))
def test_a_second_run_finds_nothing(name):
    _, _, spectrum, shift = solved(name)
    for dtype, unit in ((torch.float64, 2.0**-53), (torch.float32, FLOAT32), (torch.bfloat16, 2.0**-8)):
        once = shift.matrix.to(dtype)
        again = min_norm.solve(spectrum, once, unit)
        assert again.outcome is Outcome.ALREADY_MINIMAL
        assert torch.equal(again.matrix, once.double())
        assert again.norm_after == again.norm_before


@pytest.mark.parametrize("name", cases.names(freedom=False))
def test_full_rank_leaves_the_weight_alone(name):
    _, matrix, _, shift = solved(name)
    assert shift.outcome is Outcome.FULL_RANK
    np.testing.assert_array_equal(shift.matrix, matrix)
    assert shift.norm_after == shift.norm_before
    assert shift.predicted_residual == 0


def test_it_is_linear_in_the_weight():
    _, matrix, spectrum, shift = solved("deficient")
    other = torch.from_numpy(np.random.default_rng(9).standard_normal(matrix.shape))
    both = min_norm.solve(spectrum, torch.from_numpy(matrix) + other, FLOAT32)
    np.testing.assert_allclose(
        both.matrix, shift.matrix + min_norm.solve(spectrum, other, FLOAT32).matrix, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ["deficient", "grouped", "one hot"])
def test_moments_gathered_in_parts_give_the_same_shift(name):
    rows, matrix, _, shift = solved(name)
    half = rows.shape[1] // 3
    spectrum = factor(cases.moments(rows[:, half:]).merge(cases.moments(rows[:, :half])))
    again = min_norm.solve(spectrum, torch.from_numpy(matrix), FLOAT32)
    np.testing.assert_allclose(again.matrix, shift.matrix, atol=1e-9)
    part = min_norm.solve(cases.spectrum(rows[:, :3]), torch.from_numpy(matrix), FLOAT32)
    assert not np.allclose(part.matrix, shift.matrix, atol=1e-3)


@pytest.mark.parametrize("objective", ["norm", "range"])
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_what_cannot_be_solved_is_said_and_left_alone(objective, tolerance):
    some = np.random.default_rng(0).standard_normal((1, 4, 6))
    matrix = torch.linspace(-1, 2, 12).reshape(1, 6, 2)
    broken = matrix.clone()
    broken[0, 3, 1] = torch.nan
    for spectrum, given, outcome in (
        (factor(InputMoments(1, 6)), matrix, Outcome.NO_ROWS),
        (cases.spectrum(np.zeros((1, 4, 6))), matrix, Outcome.ZERO_OUTPUT),
        (cases.spectrum(some), torch.zeros_like(matrix), Outcome.ZERO_OUTPUT),
        (cases.spectrum(some), broken, Outcome.NONFINITE_WEIGHT),
    ):
        shift = cases.solve(objective, spectrum, given, tolerance)
        assert shift.outcome is outcome
        assert not shift.outcome.moved
        np.testing.assert_array_equal(shift.matrix, given)
    assert cases.solve(objective, cases.spectrum(some), matrix, tolerance).outcome.moved


def test_every_outcome_has_words_of_its_own():
    assert len({outcome.value for outcome in Outcome}) == len(Outcome)
    moved = {Outcome.SHIFTED, Outcome.STOPPED_EARLY, Outcome.SNAPPED}
    assert {outcome for outcome in Outcome if outcome.moved} == moved


def test_every_case_is_used():
    assert set(cases.names(freedom=True)) | set(cases.names(freedom=False)) == set(CASES)
