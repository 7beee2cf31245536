"""Which samples are used, and which of them are set aside to judge."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.errors import InputError


def split(samples: Samples, fraction: float = 0.2, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws a share of the samples (0 to 1, exclusive) to judge while settings are decided; the others fit.

    With integer labels every class gives its share, give or take one sample, and keeps at least one sample to fit;
    without, or when no class has two samples, all samples are drawn from alike.

    Returns:
        Sample numbers that fit, and that judge, both ascending. A single sample fits, and nothing judges.

    Raises:
        InputError: The fraction is not between 0 and 1.
    """
    count, labels = len(samples), samples.labels
    if not 0 < fraction < 1:
        raise InputError(f"held-out fraction: expected a number between 0 and 1, found {fraction}.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    wanted = min(max(round(count * fraction), 1), count - 1) if count else 0
    judge = order[:wanted]
    if labels is not None and labels.dtype.kind in "iu" and labels.ndim == 1:
        members = [order[labels[order] == label] for label in np.unique(labels)]
        quota = _shares(np.array([len(member) for member in members]), fraction, wanted, rng)
        if quota.sum():
            judge = np.concatenate([member[:share] for member, share in zip(members, quota, strict=True)])
    judge = np.sort(judge).astype(np.int64)
    return np.setdiff1d(np.arange(count, dtype=np.int64), judge), judge


def thinned(samples: Samples, most: int, seed: int) -> Samples:
    """At most so many of the samples: a seeded draw, in order."""
    if len(samples) <= most:
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), most, replace=False)
    return samples.select(np.sort(chosen))


def _shares(sizes: NDArray[np.int64], fraction: float, wanted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Samples each class gives, `[classes]`: largest remainders, ties by lot, never a class's last sample."""
    exact = sizes * fraction
    shares = exact.astype(np.int64)
    # Rounding keeps shares that are equal on paper equal here too, so that the lot decides between them.
    remainder = np.round(exact - shares, 9)
    for number in np.lexsort((rng.permutation(len(sizes)), -remainder)):
        if shares.sum() >= wanted:
            break
        if shares[number] < sizes[number] - 1 and remainder[number] > 0:
            shares[number] += 1
    return shares
