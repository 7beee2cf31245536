"""Factorization of the rows and the decision on rank."""

import math

import cases
import numpy as np
import pytest
import reference
import torch
from cases import CASES, FLOAT32

from onnx_optshift.solve.spectrum import Coordinates, decide_rank, factor, relative_residual
from onnx_optshift.stats.moments import InputMoments


@pytest.mark.parametrize("name", CASES)
def test_spectrum_rebuilds_the_gram_matrix(name):
    rows, _, spectrum = cases.draw(name)
    gram = np.swapaxes(rows, 1, 2) @ rows
    basis, eigenvalues = spectrum.basis.numpy(), spectrum.eigenvalues.numpy()
    assert np.all(eigenvalues >= 0)
    assert np.all(np.diff(eigenvalues, axis=1) <= 0)
    size = max(np.linalg.norm(gram), 1)
    np.testing.assert_allclose(basis * eigenvalues[:, None] @ np.swapaxes(basis, 1, 2), gram, atol=1e-13 * size)
    eye = np.broadcast_to(np.eye(basis.shape[2]), (len(rows), *[basis.shape[2]] * 2))
    np.testing.assert_allclose(np.swapaxes(basis, 1, 2) @ basis, eye, atol=1e-13)


def test_few_rows_never_build_a_square_matrix():
    rows = np.random.default_rng(0).standard_normal((1, 3, 5000))
    spectrum = cases.spectrum(rows)
    assert spectrum.basis.shape == (1, 5000, 3)
    np.testing.assert_allclose(spectrum.eigenvalues.sqrt()[0], np.linalg.svd(rows[0], compute_uv=False), rtol=1e-12)


def test_stored_rows_resolve_what_their_gram_matrix_cannot():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    rows = (np.logspace(0, -11, 12)[:, None] * basis)[None]
    kept = cases.spectrum(rows)
    np.testing.assert_allclose(kept.eigenvalues.sqrt()[0], np.logspace(0, -11, 12), rtol=1e-3)
    folded = InputMoments(1, 12)
    folded.update_gram(torch.from_numpy(np.swapaxes(rows, 1, 2) @ rows), torch.zeros(1, 12), 12)
    resolved = factor(folded).eigenvalues[0] > 0
    assert 7 <= int(resolved.sum()) <= 8  # singular values down to 6e-8


@pytest.mark.parametrize("rank", [1, 5, 63])
def test_null_directions_are_exactly_zero(rank):
    rng = np.random.default_rng(rank)
    for seed_rows in (40, 500):  # stored and folded
        a = rng.standard_normal((2, seed_rows, rank)) @ rng.standard_normal((2, rank, 64))
        found = (cases.spectrum(a).eigenvalues > 0).sum(-1)
        assert found.tolist() == [min(rank, seed_rows)] * 2


def test_negative_eigenvalues_show_how_far_rounding_reaches():
    # A Gram matrix summed in half the digits: its null directions come out as +-1e-9, not as 1e-16.
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 40, 6)) @ rng.standard_normal((1, 6, 30))
    gram = torch.from_numpy(np.swapaxes(rows, 1, 2) @ rows)
    noise = torch.from_numpy(rng.standard_normal((1, 30, 30)))
    for size, expected in ((0.0, 6), (1e-9, 6)):
        folded = InputMoments(1, 30)
        folded.update_gram(gram + size * gram.max() * (noise + noise.mT), torch.zeros(1, 30), 40)
        assert int((factor(folded).eigenvalues > 0).sum()) == expected


@pytest.mark.parametrize("name", CASES)
def test_dropped_directions_change_the_output_by_less_than_rounding(name):
    rows, matrix, spectrum = cases.draw(name)
    seen = Coordinates.of(spectrum, torch.from_numpy(matrix), FLOAT32)
    without = torch.where(seen.kept[..., None], seen.coefficients, 0.0)
    shifted = (spectrum.basis @ without).numpy()
    for a, v, w in zip(rows, matrix, shifted, strict=True):
        # In every group by itself; 1e-13 is the rounding of the products.
        assert np.linalg.norm(a @ (w - v)) <= (FLOAT32 + 1e-13) * np.linalg.norm(a @ v) + 1e-13 * np.linalg.norm(a)
    assert seen.dropped <= FLOAT32**2 * seen.total
    # Negative control: one direction more would be felt.
    last = seen.kept.sum(-1)[0] - 1
    lost = float(seen.energies[0, last]) + float(seen.energies[0][~seen.kept[0]].sum())
    assert lost > FLOAT32**2 * float(seen.energies[0].sum())


def test_rank_follows_the_output_and_not_the_singular_value():
    # Both directions are weak; only one of them is read strongly enough to be seen in the output.
    rows = np.diag([1.0, 1e-7, 1e-7])[None]
    seen = [
        Coordinates.of(cases.spectrum(rows), torch.tensor([[[1.0], [strength], [0.1]]]), FLOAT32).rank
        for strength in (1e4, 0.1)
    ]
    assert seen[0] >= 2
    assert seen[1] == 1


def test_rank_is_decided_within_each_group():
    # A group whose whole output is 1e-9 of the other's is still a group with an output.
    rows = np.stack([np.eye(3), 1e-9 * np.eye(3)])
    spectrum = cases.spectrum(rows)
    assert decide_rank(spectrum, torch.ones(2, 3, 1, dtype=torch.float64), FLOAT32).all()


def test_all_zero_outputs_keep_nothing():
    spectrum = cases.spectrum(np.random.default_rng(0).standard_normal((1, 9, 5)))
    assert not decide_rank(spectrum, torch.zeros(1, 5, 2, dtype=torch.float64), FLOAT32).any()
    silent = cases.spectrum(np.zeros((2, 9, 5)))
    assert not decide_rank(silent, torch.ones(2, 5, 2, dtype=torch.float64), FLOAT32).any()


@pytest.mark.parametrize("name", cases.names(conditioned=True))
def test_residual_of_any_matrix_is_that_of_the_rows(name):
    rows, matrix, spectrum = cases.draw(name)
    rng = np.random.default_rng(5)
    for size in (1, 1e-6):
        other = matrix + size * rng.standard_normal(matrix.shape)
        expected = reference.residual(rows, matrix, other)
        found = relative_residual(spectrum, torch.from_numpy(matrix), torch.from_numpy(other))
        assert found == pytest.approx(expected, rel=1e-6)
        assert found != pytest.approx(reference.residual(rows, matrix, matrix + 2 * (other - matrix)), rel=1e-2)


def test_residual_without_output():
    spectrum = cases.spectrum(np.ones((1, 1, 2)))
    zero, one = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    assert relative_residual(spectrum, zero, zero) == 0
    assert relative_residual(spectrum, zero, one) == math.inf
    assert relative_residual(spectrum, one, zero) == pytest.approx(1)


def test_no_rows_have_no_directions():
    spectrum = factor(InputMoments(2, 5))
    assert spectrum.eigenvalues.shape == (2, 0)
    assert Coordinates.of(spectrum, torch.ones(2, 5, 3), FLOAT32).rank == 0
