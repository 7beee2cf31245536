"""Slow, obvious numpy: what the fast code must agree with."""

import itertools
import math

import numpy as np
from scipy import optimize


def patches(images, form):
    """im2col by loops: images [N, C, *spatial] -> [g, N * outputs, C/g * prod(kernel)]."""
    count, channels = images.shape[:2]
    spatial = images.shape[2:]
    pads = form.pads_for(spatial)
    axes = len(spatial)
    padded = np.zeros((count, channels, *(s + pads[a] + pads[axes + a] for a, s in enumerate(spatial))))
    padded[(slice(None), slice(None), *(slice(pads[a], pads[a] + s) for a, s in enumerate(spatial)))] = images
    outputs = [
        (padded.shape[2 + a] - (form.kernel[a] - 1) * form.dilations[a] - 1) // form.strides[a] + 1 for a in range(axes)
    ]
    per_group = channels // form.group
    rows = []
    for group in range(form.group):
        for image in padded[:, group * per_group : (group + 1) * per_group]:
            for position in itertools.product(*map(range, outputs)):
                row = []
                for channel in image:
                    for offset in itertools.product(*map(range, form.kernel)):
                        at = (
                            p * s + k * d
                            for p, s, k, d in zip(position, form.strides, offset, form.dilations, strict=True)
                        )
                        row.append(channel[tuple(at)])
                rows.append(row)
    return form.scale * np.array(rows).reshape(form.group, count * math.prod(outputs), -1)


def exact_shift(rows, matrix):
    """The minimum-norm solution by the pseudoinverse, group by group."""
    return np.stack([np.linalg.pinv(a, rcond=1e-10) @ (a @ v) for a, v in zip(rows, matrix, strict=True)])


def residual(rows, before, after):
    """||A(W - V)||_F / ||A V||_F."""
    return np.linalg.norm(rows @ (after - before)) / np.linalg.norm(rows @ before)


def ball_shift(rows, matrix, tolerance):
    """The smallest matrix within a relative tolerance: ridge solutions, their multiplier by bisection."""
    gram = np.swapaxes(rows, 1, 2) @ rows
    eye = np.eye(gram.shape[1])

    def ridge(log_mu):
        return np.linalg.solve(gram + np.exp(log_mu) * eye, gram @ matrix)

    top = np.log(np.linalg.norm(gram))
    excess = lambda log_mu: residual(rows, matrix, ridge(log_mu)) - tolerance  # noqa: E731
    return ridge(optimize.brentq(excess, top - 25, top + 25, xtol=1e-13))


def narrowest_exact(rows, column):
    """Smallest max|w| with A w = A v, by linear programming."""
    width = rows.shape[1]
    upper = np.block([[np.eye(width), -np.ones((width, 1))], [-np.eye(width), -np.ones((width, 1))]])
    solved = optimize.linprog(
        np.append(np.zeros(width), 1),
        A_ub=upper,
        b_ub=np.zeros(2 * width),
        A_eq=np.hstack([rows, np.zeros((len(rows), 1))]),
        b_eq=rows @ column,
        bounds=(None, None),
        method="highs",
    )
    assert solved.success, solved.message
    return solved.fun


def narrowest(rows, column, tolerance, blocks=1):
    """Smallest sum over blocks of max|w| with ||A(w - v)|| <= tolerance ||A v||, by quadratic programming."""
    width = rows.shape[1]
    target = rows @ column
    # Rows scaled to the size of the ball keep the one curved constraint of order 1.
    scaled, center = rows / (tolerance * np.linalg.norm(target)), target / (tolerance * np.linalg.norm(target))
    gram = scaled.T @ scaled
    sides = np.repeat(np.eye(blocks), width // blocks, axis=0)

    def inside(x):
        return 1 - np.sum((scaled @ x[:width] - center) ** 2)

    def inside_slope(x):
        return np.append(-2 * (gram @ x[:width] - scaled.T @ center), np.zeros(blocks))

    bounds = np.vstack([np.hstack([-np.eye(width), sides]), np.hstack([np.eye(width), sides])])
    start = np.concatenate([column, np.abs(column).reshape(blocks, -1).max(1)])
    solved = optimize.minimize(
        lambda x: x[width:].sum(),
        start,
        jac=lambda _: np.append(np.zeros(width), np.ones(blocks)),
        constraints=[
            {"type": "ineq", "fun": lambda x: bounds @ x, "jac": lambda _: bounds},
            {"type": "ineq", "fun": inside, "jac": inside_slope},
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert solved.success, solved.message
    return solved.fun


def gptq(rows, matrix, grid, damping=0.01):
    """Error feedback alone, one input after the other in the order of their energy, on the grid of the weight itself.

    Frantar et al. 2022 (arXiv 2210.17323), equation 2, without their Cholesky form: after each input the inverse of
    what is left of H is computed anew.
    """
    width = len(matrix)
    hessian = rows.T @ rows
    hessian += damping * np.diag(hessian).mean() * np.eye(width)
    half = 2 ** (grid.bits - 1)
    cells = matrix.reshape(-1, grid.block or width, matrix.shape[1])
    if grid.levels == "full":
        place = np.abs(cells).argmax(1, keepdims=True)
        scale, low = np.take_along_axis(cells, place, 1) / -half, -half
    else:
        scale, low = np.abs(cells).max(1, keepdims=True) / (half - 1), 1 - half
    scales = np.broadcast_to(scale, cells.shape).reshape(matrix.shape)
    work, result, left = matrix.copy(), np.zeros_like(matrix), list(np.argsort(-np.diag(hessian)))
    while left:
        k, *others = left
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        result[k] = np.clip(np.round(work[k] / scales[k]), low, half - 1) * scales[k]
        work[others] -= np.outer(inverse[1:, 0], (work[k] - result[k]) / inverse[0, 0])
        left = others
    return result
