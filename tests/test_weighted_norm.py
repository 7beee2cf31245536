"""The weighted norm against dense generalized solutions, its stationarity conditions, and the plain norm."""

import cases
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.optimize import brentq

from onnx_optshift.solve import error_ball, min_norm
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.solve.weighted_norm import balanced, measure, solve

UNIT = 2.0**-53
D, M = 9, 4


def rows(n, rank=D, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(groups, n, rank)) @ rng.normal(size=(groups, rank, D))


def weight(groups=1, seed=1, width=D):
    return np.random.default_rng(seed).normal(size=(groups, width, M))


def metric(groups=1, seed=2, width=D):
    """A positive definite matrix whose eigenvalues span three decades, the same for no two groups."""
    root = np.random.default_rng(seed).normal(size=(groups, width, width)) * np.geomspace(3, 0.3, width)
    return root @ root.transpose(0, 2, 1) + 0.1 * np.eye(width)


def square(w, m):
    return float(np.einsum("gdi,gde,gei->", w, m, w))


def shifted(a, v, m, tolerance, unit=UNIT):
    return solve(measure(cases.spectrum(a), torch.from_numpy(m)), torch.from_numpy(v), tolerance, unit)


def slow_ball(a, v, m, tolerance):
    """(G + μM) W = G V, by the dense generalized eigenproblem G x = λ M x, μ by bracketing."""
    grams = a.transpose(0, 2, 1) @ a
    pairs = [scipy.linalg.eigh(g, b) for g, b in zip(grams, m, strict=True)]  # xᵀMx = 1
    total = np.square(a @ v).sum()

    def at(log_mu):
        parts = zip(pairs, grams @ v, strict=True)
        return np.stack([x / (np.maximum(k, 0) + np.exp(log_mu)) @ (x.T @ gv) for (k, x), gv in parts])

    root = brentq(lambda s: np.square(a @ (at(s) - v)).sum() / total - tolerance**2, -40, 40, xtol=1e-13)
    return at(root)


def slow_exact(a, v, m):
    """min tr(WᵀMW) s.t. A W = A V: W = V - N (NᵀMN)⁻¹ NᵀMV for a basis N of what no row reaches."""
    solutions = []
    for ai, vi, mi in zip(a, v, m, strict=True):
        null = scipy.linalg.null_space(ai)
        solutions.append(vi - null @ np.linalg.solve(null.T @ mi @ null, null.T @ mi @ vi) if null.size else vi)
    return np.stack(solutions)


@pytest.mark.parametrize("tolerance", [0.003, 0.1, 0.5])
@pytest.mark.parametrize(("n", "rank", "groups"), [(40, D, 1), (40, 6, 1), (5, D, 1), (30, D, 3)])
def test_the_solution_within_a_ball_is_that_of_the_generalized_eigenproblem(tolerance, n, rank, groups):
    a, v, m = rows(n, rank, groups), weight(groups), metric(groups)
    found = shifted(a, v, m, tolerance)
    assert found.outcome is Outcome.SHIFTED
    np.testing.assert_allclose(found.matrix, slow_ball(a, v, m, tolerance), atol=1e-6)
    assert found.predicted_residual == pytest.approx(tolerance, rel=1e-9)
    assert np.linalg.norm(a @ (found.matrix.numpy() - v)) / np.linalg.norm(a @ v) == pytest.approx(tolerance, rel=1e-9)


@pytest.mark.parametrize("tolerance", [0.01, 0.2])
def test_the_solution_is_stationary_and_another_norm_s_is_not(tolerance):
    a, v, m = rows(40), weight(), metric()
    found, plain = (w.matrix.numpy() for w in (shifted(a, v, m, tolerance), shifted(a, v, np.eye(D)[None], tolerance)))

    def misfit(w):
        """How far MW and G(V - W) are from parallel, 0 to 1."""
        one, other = (m @ w).ravel(), (a.transpose(0, 2, 1) @ (a @ (v - w))).ravel()
        return 1 - float(one @ other) / (np.linalg.norm(one) * np.linalg.norm(other))

    assert misfit(found) < 1e-12
    assert misfit(plain) > 1e-3


@pytest.mark.parametrize("tolerance", [0.0, 0.003, 0.1, 0.5])
@pytest.mark.parametrize("groups", [1, 3])
def test_each_norm_is_least_for_its_own_solution(tolerance, groups):
    a, v, m = rows(40, 6, groups), weight(groups), metric(groups)
    found = shifted(a, v, m, tolerance)
    plain = error_ball.solve(cases.spectrum(a), torch.from_numpy(v), tolerance, UNIT)
    assert square(found.matrix.numpy(), m) < square(plain.matrix.numpy(), m) * (1 - 1e-6)
    assert square(found.matrix.numpy(), m) < square(v, m)
    assert found.norm_after > plain.norm_after
    assert found.norm_after == pytest.approx(float(found.matrix.norm()))
    assert found.norm_before == pytest.approx(np.linalg.norm(v))
    assert found.range_after == pytest.approx(float(found.matrix.abs().max()))


@pytest.mark.parametrize("name", cases.names(freedom=True))
def test_exact_is_the_constrained_minimum_and_keeps_every_output(name):
    a, v, spectrum = cases.draw(name)
    m = metric(a.shape[0], width=a.shape[2])
    measured = measure(spectrum, torch.from_numpy(m))
    found = solve(measured, torch.from_numpy(v), 0.0, UNIT)
    assert found.outcome is Outcome.SHIFTED
    assert found.predicted_residual <= 1e-14
    np.testing.assert_allclose(a @ found.matrix.numpy(), a @ v, atol=1e-9 * np.abs(a @ v).max())
    np.testing.assert_allclose(found.matrix, slow_exact(a, v, m), atol=1e-7)
    assert measured.square(found.matrix) == pytest.approx(square(found.matrix.numpy(), m))
    # The orthogonal projection keeps the outputs too, but it is another weight with a larger tr(WᵀMW).
    plain = min_norm.solve(spectrum, torch.from_numpy(v), UNIT)
    assert measured.square(found.matrix) < measured.square(plain.matrix) * (1 - 1e-6)


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_the_identity_is_the_plain_norm(name, tolerance, scale):
    a, v, spectrum = cases.draw(name)
    identity = scale * torch.eye(a.shape[2], dtype=torch.float64).expand(a.shape[0], -1, -1)
    found = solve(measure(spectrum, identity), torch.from_numpy(v), tolerance, cases.FLOAT32)
    plain = error_ball.solve(spectrum, torch.from_numpy(v), tolerance, cases.FLOAT32)
    assert (found.outcome, found.rank) == (plain.outcome, plain.rank)
    np.testing.assert_allclose(found.matrix, plain.matrix, atol=1e-11)


def test_nothing_to_gain_keeps_the_weight():
    v, m = weight(), metric()
    full = shifted(rows(40), v, m, 0.0)
    assert full.outcome is Outcome.FULL_RANK
    np.testing.assert_array_equal(full.matrix, v)
    a = rows(40, 6)
    once = shifted(a, v, m, 0.0)
    again = shifted(a, once.matrix.numpy(), m, 0.0)
    assert again.outcome is Outcome.ALREADY_MINIMAL
    # What is minimal in one norm is not in another.
    assert shifted(a, once.matrix.numpy(), metric(seed=3), 0.0).outcome is Outcome.SHIFTED


def test_a_group_without_rows_does_not_disturb_the_others():
    a, v, m = rows(20, 4, groups=2), weight(2), metric(2)
    a[1] = 0
    found = shifted(a, v, m, 0.0)
    np.testing.assert_array_equal(found.matrix[1], 0)
    np.testing.assert_allclose(found.matrix[:1], slow_exact(a[:1], v[:1], m[:1]), atol=1e-9)


def test_balanced_weighs_curvature_and_norm_alike():
    m = torch.from_numpy(metric(groups=2))
    found = balanced(m)
    assert float(found.diagonal(dim1=-2, dim2=-1).mean()) == pytest.approx(2)
    np.testing.assert_allclose(balanced(5 * m), found, rtol=1e-12)
    # One factor for all groups: which of them earlier layers move more still counts.
    assert not torch.allclose(balanced(m * torch.tensor([1.0, 9.0])[:, None, None]), found)
    assert torch.equal(balanced(torch.zeros(1, D, D)), torch.eye(D, dtype=torch.float64)[None])


def test_the_objective_is_the_plain_norm_where_there_is_no_metric():
    a, v, m = rows(40, 6), torch.from_numpy(weight()), torch.from_numpy(metric())
    spectrum = cases.spectrum(a)
    plain = cases.solve("norm", spectrum, v, 0.1, unit=UNIT)
    without = cases.solve("curvature", spectrum, v, 0.1, unit=UNIT)
    assert torch.equal(plain.matrix, without.matrix)
    weighed = cases.solve("curvature", spectrum, v, 0.1, unit=UNIT, metric=measure(spectrum, m))
    assert torch.equal(weighed.matrix, solve(measure(spectrum, m), v, 0.1, UNIT).matrix)
    assert not torch.equal(weighed.matrix, plain.matrix)
