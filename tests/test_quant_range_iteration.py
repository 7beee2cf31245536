"""How the narrowest weight is found: acceleration, precision and chunks change the time, never what is promised."""

import cases
import numpy as np
import pytest
import reference
import torch
from cases import FLOAT32

from onnx_optshift.solve import quant_range
from onnx_optshift.solve.anderson import Anderson
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.quant_range import GAP
from onnx_optshift.solve.spectrum import Coordinates


def found(name, tolerance, mode="channel"):
    rows, matrix, spectrum = cases.draw(name)
    coordinates = Coordinates.of(spectrum, torch.from_numpy(matrix), FLOAT32)
    return rows, matrix, quant_range.narrowest(coordinates, tolerance, Granularity(mode, 5))


def ranges(matrix):
    return np.abs(np.asarray(matrix)).max(1)


def residuals(rows, before, after):
    return np.linalg.norm(rows @ (after - before), axis=1) / np.linalg.norm(rows @ before, axis=1)


def wide(width=128, columns=40):
    """A weight and rows on which the plain iteration is slow."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(0, -3, width, dtype=torch.float64)
    rows = torch.randn(1, 2 * width, width, generator=generator, dtype=torch.float64) * scale
    matrix = torch.randn(1, width, columns, generator=generator, dtype=torch.float64)
    return rows.numpy(), matrix.numpy(), Coordinates.of(cases.spectrum(rows.numpy()), matrix, FLOAT32)


@pytest.mark.parametrize("iterations", [20, 500])
@pytest.mark.parametrize("name", ["fat", "tall", "deficient"])
def test_the_certificate_holds_at_any_time(name, iterations, monkeypatch):
    monkeypatch.setattr(quant_range, "MAX_ITERATIONS", iterations)
    rows, matrix, result = found(name, 0.1)
    best = sum(reference.narrowest(rows[0], column, 0.1) / np.abs(column).max() for column in matrix[0].T)
    reached = (ranges(result.matrix) / ranges(matrix)).sum()
    assert reached * (1 - result.gap) <= best * (1 + 1e-6) <= reached * (1 + 1e-4)
    assert result.gain == pytest.approx(1 - reached / matrix.shape[-1])
    assert (result.gap <= GAP) == (iterations == 500) or result.iterations < iterations


@pytest.mark.parametrize("mode", ["channel", "tensor", "block"])
def test_no_equation_of_the_table_runs_into_the_limit(mode):
    for name in cases.names():
        for tolerance in (1e-5, 1e-3, 0.3):
            assert found(name, tolerance, mode)[2].gap <= GAP, (name, tolerance)


@pytest.mark.parametrize("tolerance", [1e-6, 0.003, 0.1])
def test_float32_closes_the_gap_and_stays_within_the_tolerance(tolerance):
    rows, matrix, coordinates = wide()
    result = quant_range.narrowest(coordinates, tolerance, Granularity())
    assert result.gap <= GAP
    assert residuals(rows, matrix, result.matrix.numpy()).max() <= tolerance * (1 + 1e-7)


def test_what_float32_cannot_hold_is_left_to_float64():
    # The second column reads only inputs that are 1e-10 of the others: squares of its outputs are 1e-26 and less.
    rng = np.random.default_rng(4)
    rows = np.zeros((1, 14, 20))
    rows[0, :8, :8], rows[0, 8:, 8:] = rng.standard_normal((8, 8)), 1e-10 * rng.standard_normal((6, 12))
    matrix = rng.standard_normal((1, 20, 2))
    matrix[0, :8, 1] = 0
    coordinates = Coordinates.of(cases.spectrum(rows), torch.from_numpy(matrix), FLOAT32)
    result = quant_range.narrowest(coordinates, 1e-3, Granularity())
    assert result.gap <= GAP
    assert residuals(rows, matrix, result.matrix.numpy()).max() <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("mode", ["channel", "block"])
def test_columns_do_not_depend_on_those_they_are_solved_with(mode):
    # More columns than are iterated on at a time.
    rows, matrix, coordinates = wide(width=24, columns=300)
    granularity = Granularity(mode, 8)
    together = quant_range.narrowest(coordinates, 0.03, granularity)
    some = Coordinates.of(cases.spectrum(rows), torch.from_numpy(matrix[..., 250:260]), FLOAT32)
    apart = quant_range.narrowest(some, 0.03, granularity)
    torch.testing.assert_close(
        granularity.ranges(apart.matrix), granularity.ranges(together.matrix[..., 250:260]), rtol=4 * GAP, atol=0
    )
    assert max(apart.gap, together.gap) <= GAP


def contraction(seed, width):
    """A symmetric linear map x <- Bx + b with slow directions, and where it ends."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.linspace(0.2, 0.97, width, dtype=torch.float64)) @ basis.T
    shift = torch.randn(width, generator=generator, dtype=torch.float64)
    return matrix, shift, torch.linalg.solve(torch.eye(width, dtype=torch.float64) - matrix, shift)


def iterate(maps, steps, *, accelerated=True):
    """Distance of each column's iteration to its own fixed point."""
    state = torch.zeros(1, len(maps[0][1]), len(maps), dtype=torch.float64)
    memory = Anderson(state, Granularity().sums)
    for _ in range(steps):
        image = torch.stack([matrix @ state[0, :, j] + shift for j, (matrix, shift, _) in enumerate(maps)], 1)[None]
        state = memory.step(state, image - state) if accelerated else image
    return torch.stack([torch.linalg.vector_norm(state[0, :, j] - end) for j, (_, _, end) in enumerate(maps)])


def test_acceleration_of_a_linear_map():
    maps = [contraction(seed, 6) for seed in range(4)]
    assert bool((iterate(maps, 60) < 1e-2 * iterate(maps, 60, accelerated=False)).all())


def test_each_problem_is_accelerated_by_itself():
    maps = [contraction(seed, 6) for seed in range(3)]
    alone = torch.cat([iterate([one], 12) for one in maps])
    torch.testing.assert_close(iterate(maps, 12), alone)


def test_a_memory_that_forgets_starts_with_a_plain_step():
    memory = Anderson(torch.zeros(1, 4, 2), Granularity().sums)
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(1, 4, 2, generator=generator) for _ in range(6)]
    plain = [torch.equal(memory.step(one, -0.5 * one**3), one - 0.5 * one**3) for one in states]
    assert plain == [True, False, False, False, False, False]
    memory.forget()
    assert torch.equal(memory.step(states[0], states[1]), states[0] + states[1])


def test_a_residual_of_zero_stays_where_it_is():
    memory = Anderson(torch.zeros(1, 4, 2), Granularity().sums)
    state = torch.ones(1, 4, 2)
    for _ in range(5):
        state = memory.step(state, torch.zeros(1, 4, 2))
    assert torch.equal(state, torch.ones(1, 4, 2))
