"""One table of equations A W = A V drives the tests of all solvers.

Every case is drawn from a generator, so that a test states its seed; `freedom` says whether other solutions than V
exist, `conditioned` whether the nonzero singular values of A lie within a factor 1,000.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from onnx_optshift.solve.objective import make_objective
from onnx_optshift.solve.problem import Problem
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments

FLOAT32 = 2.0**-24

# Matrices of this size gain nothing from threads, and wait for one another on a busy machine (measured: 10 times).
torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """Draws rows [g, n, d] and matrix [g, d, m]."""

    draw: Callable
    freedom: bool
    conditioned: bool = True


def _gauss(groups, rows, width, out, rank=None):
    def draw(rng):
        if rank is None:
            a = rng.standard_normal((groups, rows, width))
        else:
            a = rng.standard_normal((groups, rows, rank)) @ rng.standard_normal((groups, rank, width))
        return a, rng.standard_normal((groups, width, out))

    return draw


def _decaying(rng, rows=80, width=24, decades=5):
    left = np.linalg.qr(rng.standard_normal((rows, width)))[0]
    right = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return (left * np.logspace(0, -decades, width) @ right)[None], rng.standard_normal((1, width, 5))


def _one_hot(rng):
    # Inputs 7 to 11 never occur.
    return np.eye(12)[rng.integers(0, 7, 40)][None], rng.standard_normal((1, 12, 4))


def _relu(rng):
    a = np.maximum(rng.standard_normal((1, 60, 6)) @ rng.standard_normal((1, 6, 20)), 0)
    a[..., 15:] = 0  # dead units
    return a, rng.standard_normal((1, 20, 3))


def _some_zero(rng):
    a, v = _gauss(3, 5, 9, 4)(rng)
    a[1] = 0
    return a, v


CASES = {
    "fat": Case(_gauss(1, 10, 24, 6), freedom=True),
    "one row": Case(_gauss(1, 1, 16, 3), freedom=True),
    "one output": Case(_gauss(1, 8, 16, 1), freedom=True),
    "deficient": Case(_gauss(1, 90, 24, 6, rank=7), freedom=True),
    "nearly full": Case(_gauss(1, 90, 24, 6, rank=23), freedom=True),
    "grouped": Case(_gauss(4, 30, 10, 3, rank=4), freedom=True),
    "grouped fat": Case(_gauss(5, 3, 9, 2), freedom=True),
    "zero group": Case(_some_zero, freedom=True),
    "one hot": Case(_one_hot, freedom=True),
    "dead units": Case(_relu, freedom=True),
    "repeated rows": Case(
        lambda rng: (lambda a, v: (np.tile(a, (1, 8, 1)), v))(*_gauss(1, 6, 15, 4)(rng)), freedom=True
    ),
    "tall": Case(_gauss(1, 90, 12, 6), freedom=False),
    "tall grouped": Case(_gauss(3, 40, 6, 2), freedom=False),
    "decaying": Case(_decaying, freedom=False, conditioned=False),
}


def names(*, freedom=None, conditioned=None):
    """Names of the cases with these properties."""
    return [
        name
        for name, case in CASES.items()
        if freedom in {None, case.freedom} and conditioned in {None, case.conditioned}
    ]


def draw(name, seed=0):
    """Rows and matrix of a case as arrays, and the spectrum of the rows."""
    rows, matrix = CASES[name].draw(np.random.default_rng([seed, len(name)]))
    return rows, matrix, spectrum(rows)


def moments(rows):
    """Moments of rows [g, n, d] given as an array."""
    gathered = InputMoments(rows.shape[0], rows.shape[2])
    gathered.update(torch.from_numpy(rows))
    return gathered


def spectrum(rows):
    """Spectrum of rows [g, n, d] given as an array."""
    return factor(moments(rows))


def solve(objective, spectrum, matrix, tolerance, *, unit=FLOAT32, metric=None):
    """The shift of a matrix [g, d, m] by the objective of a name."""
    return make_objective(objective).solve(Problem(spectrum, matrix, unit, metric), tolerance)
