"""The Gauss-Newton matrix from first differences of the outputs: its trace, and a bracket for its largest eigenvalue.

`H = G + R` with `G = JᵀH_out J / n`, J the derivative of the outputs in the weights and H_out the Hessian of the loss
in the outputs; R carries second derivatives of the network. Within one layer of a piecewise linear network R is 0.

Losses give zᵀHz but no product Hz, so that neither power iteration nor Lanczos can be run on them: a product along one
coordinate costs two runs, and there are as many coordinates as weights. Outputs tell more. With `H_out = BᵀB` every
probe z gives the column `y = B Jz / √n` of length `n k`, and `E[y yᵀ] = B J Jᵀ Bᵀ / n` has G's non-zero eigenvalues.
From P probes (no further run of the model):

- the largest eigenvalue of the mean of `y yᵀ` is at least that of its expectation, on average (Jensen: the largest
  eigenvalue is convex);
- a direction found from one half of the probes and judged by the other half is at most the largest, on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.decide.loss import Loss, Outputs
from onnx_optshift.report.diagnosis import TopEigenvalue

_TINY = float(np.finfo(np.float32).tiny)


def output_root(
    loss: Loss, outputs: Outputs, reference: Outputs, slopes: Outputs, samples: int, labels: NDArray[Any] | None
) -> NDArray[np.float64]:
    """`B dy` `[samples, k]` of one batch, with `‖B dy‖² = dyᵀ H_out dy` for each sample's loss.

    Cross-entropy of logits has `H_out = diag(p) - ppᵀ`, so `B dy = √p (dy - pᵀdy)`; seen from probabilities, whose
    change is `dp = p (dy - pᵀdy)`, this is `dp/√p`. The slopes dy are derivatives of the outputs y along a direction;
    the reference is what the distance is relative to. As many labels as positions.
    """
    if loss.output is None or labels is None:
        pieces = []
        for name, slope in slopes.items():
            dy, base = (_by_sample(value, samples) for value in (slope, reference[name]))
            scale = np.square(base).sum(axis=1, keepdims=True)
            factor = np.sqrt(np.divide(2.0, len(slopes) * scale, out=np.zeros_like(scale), where=scale > 0))
            pieces.append(np.broadcast_to(dy * factor, (samples, dy.shape[1])))
        return np.concatenate(pieces, axis=1)
    dy = slopes[loss.output][:samples].reshape(samples, -1)
    if loss.kind == "squared":
        return np.asarray(np.sqrt(2 / dy.shape[1]) * dy)
    positions = labels.size // samples
    dy = dy.reshape(samples * positions, -1)
    y = outputs[loss.output].astype(np.float64)[:samples].reshape(dy.shape)
    if loss.kind == "probabilities":
        root = dy / np.sqrt(np.maximum(y, _TINY))
    else:
        shares = np.exp(y - y.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        root = np.sqrt(shares) * (dy - (shares * dy).sum(axis=1, keepdims=True))
    return np.asarray(root.reshape(samples, -1) / np.sqrt(positions))


def _by_sample(value: NDArray[Any], samples: int) -> NDArray[np.float64]:
    """An output as `[samples, k]`, or `[1, k]` where it does not depend on the sample."""
    value = np.nan_to_num(value.astype(np.float64))
    many = samples > 1 and value.ndim > 0 and value.shape[0] >= samples
    return value[:samples].reshape(samples, -1) if many else value.reshape(1, -1)


def top_eigenvalue(columns: Sequence[Sequence[NDArray[np.float32]]], count: int) -> TopEigenvalue:
    """Bracket of G's largest eigenvalue, from `B Jz` `[n k]` for each probe (at least 2) and layer, n given."""
    probes = len(columns)
    stacked = np.stack([column for probe in columns for column in probe]) / np.sqrt(np.float32(count))
    gram = (stacked @ stacked.T).astype(np.float64)
    owner = np.repeat(np.arange(probes), len(columns[0]))
    upper = float(np.linalg.eigvalsh(gram)[-1]) / probes
    judged = []
    for half in (0, 1):
        finds, judges = owner % 2 == half, owner % 2 != half
        values, vectors = np.linalg.eigh(gram[np.ix_(finds, finds)])
        if values[-1] <= 0:
            return TopEigenvalue(0.0, upper, probes)
        # The direction is the unit vector Y q / √λ; its products with the other half's columns are in the Gram matrix.
        products = gram[np.ix_(judges, finds)] @ vectors[:, -1] / np.sqrt(values[-1])
        judged.append(float(np.square(products).sum()) / np.count_nonzero(np.bincount(owner[judges])))
    return TopEigenvalue(float(np.mean(judged)), upper, probes)
