"""A smaller shift where the written file left its promise: judged anew, as everything that is written."""

from __future__ import annotations

import math
from dataclasses import replace

from onnx_optshift.decide.decision import Decision, Grounds, as_given, decided
from onnx_optshift.prove.floor import Floor, verification
from onnx_optshift.report.model import Verification

REVERTED = "reverted: with it the outputs left the tolerance"
# Of the tolerance, what a shrunk shift aims at; and the least that a step shrinks by.
AIM, LEAST_SHRINK = 0.9, 0.9


def shrunk(grounds: Grounds, decision: Decision, proof: Verification) -> Decision:
    """The same layers at a smaller residual, in proportion to how far the outputs left the tolerance."""
    worst = max(output.rel for output in proof.outputs)
    share = decision.promise.tolerance / worst if worst > 0 else 1.0
    factor = LEAST_SHRINK if math.isnan(share) else min(AIM * share, LEAST_SHRINK)  # where no bound was set, inf / inf
    return decided(
        grounds,
        decision.way or as_given(decision.candidate),
        decision.candidate.tolerance * factor,
        decision.promise,
        "backed off: shifts",
        names=list(decision.candidate.arrays),
        before=decision,
    )


def reverted(grounds: Grounds, decision: Decision, floor: Floor) -> Decision:
    """As few shifts less as it takes, those that gain least first, found by bisection on trial runs."""
    candidate, promise = decision.candidate, decision.promise

    def gain(name: str) -> float:
        shift = candidate.solved[name].shift
        return shift.norm_before**2 - shift.norm_after**2

    order = sorted(candidate.arrays, key=gain)

    def passes(count: int) -> bool:
        arrays = candidate.only(order[count:]).arrays
        if not arrays:
            return True  # a copy
        results = grounds.bench.outputs.deviation(promise.covered, arrays).results()
        return verification(results, floor, promise).passed

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    before = replace(decision, rejected={**decision.rejected, **dict.fromkeys(order[:high], REVERTED)})
    way, left = decision.way or as_given(candidate), order[high:]
    return decided(grounds, way, candidate.tolerance, promise, "fewer layers", names=left, before=before)
