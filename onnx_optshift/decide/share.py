"""Sharing a tolerance out: which residual each layer may have so that the MODEL outputs use the tolerance, and keep it.

Every layer gets the same relative residual. Deviations of layers add up in a way that depends on the model, so nothing
is assumed but that the outputs deviate more when the layers may: the layer residual is found by measuring the outputs
(secant steps on log-log scale inside a bracket).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnx_optshift.calibration.source import Samples
from onnx_optshift.run.layers import Candidate
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
    """The outcome of a search.

    Attributes:
        candidate: Shifts at the layer residual that was found.
        deviation: Measured relative deviation of the model outputs, the largest over outputs.
        steps: Candidates measured.
    """

    candidate: Candidate
    deviation: float
    steps: int


def share_out(
    outputs: Outputs, samples: Samples, candidate_at: Callable[[float], Candidate], tolerance: float, seed: int
) -> Shared:
    """Finds the largest common layer residual at which the outputs stay within the tolerance.

    The search runs on a seeded part of the samples where there are many, and ends on all of them.

    Args:
        outputs: Measures deviations.
        samples: All data that the promise covers.
        candidate_at: Shifts at a given layer residual; at 0 the exact shift.
        tolerance: Relative deviation that the model outputs may show.
        seed: Of the part, as the user set it.

    Returns:
        A candidate within the tolerance; the exact one when nothing more fits.
    """
    start = min(tolerance, MOST_RESIDUAL)
    steps = 0
    if len(samples) > 2 * PART:
        part = np.sort(np.random.default_rng(seed).choice(len(samples), PART, replace=False))
        rough = _search(outputs, samples.select(part), candidate_at, tolerance, start)
        steps, start = rough.steps, rough.candidate.tolerance or start
    found = _search(outputs, samples, candidate_at, tolerance, start)
    return Shared(found.candidate, found.deviation, found.steps + steps)


def _search(
    outputs: Outputs, samples: Samples, candidate_at: Callable[[float], Candidate], tolerance: float, residual: float
) -> Shared:
    """One search, from a first guess."""
    best: Shared | None = None
    too_far: float | None = None  # smallest residual known to leave the tolerance
    for step in range(1, MOST_STEPS + 1):
        candidate = candidate_at(residual)
        deviation = outputs.deviation(samples, candidate.arrays).largest_rel()
        if deviation <= AIM_HIGH * tolerance:
            if best is not None and too_far is None and deviation <= best.deviation:
                break  # layers that back off leave the rest unused, and give up altogether where more is allowed
            best = Shared(candidate, deviation, step)
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
    return best or Shared(candidate_at(0.0), 0.0, MOST_STEPS)
