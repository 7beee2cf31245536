"""Sharing a tolerance out: which residual each layer may have so that the MODEL outputs use the tolerance, and keep it.

Every layer gets the same relative residual. Deviations of layers add up in a way that depends on the model, so nothing
is assumed but that the outputs deviate more when the layers may: the layer residual is found by measuring the outputs
(secant steps on log-log scale inside a bracket).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnx_optshift.calibration.source import Samples
from onnx_optshift.run.candidate import Arrays, Candidate

if TYPE_CHECKING:  # which loads the runtime
    from onnx_optshift.run.outputs import Outputs

# The search ends inside this share of the tolerance: used, and with room for the file's own rounding.
AIM_LOW, AIM, AIM_HIGH = 0.85, 0.93, 0.99
MOST_STEPS = 12
# A bracket narrower than this ratio is not worth another measurement.
NARROW = 1.02
# Samples of the part that the search runs on first: enough for two digits of a relative deviation.
PART = 256
# A layer whose output may change by all of itself could as well be zero.
MOST_RESIDUAL = 0.9


@dataclass(frozen=True)
class Shared:
    """The outcome of a search."""

    candidate: Candidate  # shifts at the layer residual that was found
    deviation: float  # measured relative deviation of the model outputs, the largest over outputs


def share_out(
    outputs: Outputs, samples: Samples, candidate_at: Callable[[float], Candidate], tolerance: float, seed: int
) -> Shared:
    """Finds the largest common layer residual at which the outputs stay within the tolerance, or else the exact shift.

    The search runs on a part of the samples, drawn by the seed, where there are many, and ends on all of them.
    """

    def measured_on(some: Samples) -> Callable[[Arrays], float]:
        return lambda arrays: outputs.deviation(some, arrays).largest_rel()

    start = min(tolerance, MOST_RESIDUAL)
    if len(samples) > 2 * PART:
        part = np.sort(np.random.default_rng(seed).choice(len(samples), PART, replace=False))
        start = search(measured_on(samples.select(part)), candidate_at, tolerance, start).candidate.tolerance or start
    return search(measured_on(samples), candidate_at, tolerance, start)


def search(
    deviation_of: Callable[[Arrays], float],
    candidate_at: Callable[[float], Candidate],
    tolerance: float,
    residual: float,
) -> Shared:
    """One search, from a first guess.

    Args:
        deviation_of: Measures how far outputs are off with other contents of weights.
        candidate_at: Solves all layers at one residual.
        tolerance: What that may be.
        residual: To begin with.
    """
    best: Shared | None = None
    too_far: float | None = None  # smallest residual known to leave the tolerance
    for _ in range(MOST_STEPS):
        candidate = candidate_at(residual)
        deviation = deviation_of(candidate.arrays)
        if deviation <= AIM_HIGH * tolerance:
            if best is not None and too_far is None and deviation <= best.deviation:
                break  # layers that back off leave the rest unused, and give up altogether where more is allowed
            best = Shared(candidate, deviation)
            if deviation >= AIM_LOW * tolerance or residual >= MOST_RESIDUAL:
                break
        else:
            too_far = residual
        within = best.candidate.tolerance if best else 0.0
        if too_far is not None and within > 0 and too_far / within < NARROW:
            break
        guess = residual * AIM * tolerance / deviation if deviation > 0 else MOST_RESIDUAL
        if too_far is None:
            residual = min(guess, MOST_RESIDUAL)
        elif NARROW * within < guess < too_far / NARROW:
            residual = guess
        else:
            # The secant step leaves the bracket: the outputs are far from proportional here. Bisect instead.
            residual = math.sqrt(within * too_far) if within > 0 else too_far / 4
    return best or Shared(candidate_at(0.0), 0.0)
