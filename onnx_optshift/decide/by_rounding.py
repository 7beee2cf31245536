"""Weights that are going to be rounded: every layer at the residual whose ROUNDED weight is closest, judged once.

No run of the model chooses a residual: each layer's own output error does, on rows that did not fit it. The model's
outputs are compared once, quantized against quantized, and layers whose group is rejected keep their weights. Where it
is worth its runs, layers are also rounded one after the other, and held-out data chooses between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.decision import Decision, Grounds, Way, decided, unbounded
from onnx_optshift.decide.recapture import rounded_in_order, worth_it
from onnx_optshift.run.candidate import Candidate, while_held
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.on_grid import Starts, best_starts, placed

SNAPPED = "on the quantizer's grid, every layer at its own residual"
NARROWED = "narrowed, every layer at its own residual"
IN_ORDER = "on the quantizer's grid, layer by layer, each making up for those before it"


def by_rounding(grounds: Grounds, *, snap: bool, most: float = 1.0) -> Decision:
    """What to write for a quantizer: weights on its grid, or only narrow for it, from a residual of so much at most.

    It promises no bound: what the outputs deviate by is measured on the written file.
    """
    starts = best_starts(grounds.fit, most, snap=snap)

    def capped(solve: Callable[[Starts], Candidate]) -> Callable[[float], Candidate]:
        """Residual -> shifts; one above 0 caps the residuals that were chosen."""
        return while_held(
            lambda cap: solve({
                name: replace(start, residual=min(start.residual, cap or 1.0)) for name, start in starts.items()
            }),
            grounds.bench.world,
        )

    def way(name: str, solve: Callable[[Layers, Samples, Starts], Candidate], *, separable: bool) -> Way:
        full = capped(partial(solve, grounds.full, grounds.samples))
        fit = full if grounds.fit is grounds.full else capped(partial(solve, grounds.fit, grounds.tried_on))
        return Way(name, full, fit, separable)

    def at_once(layers: Layers, _: Samples, starts: Starts) -> Candidate:
        return placed(layers, starts, snap=snap)

    taken = way(SNAPPED if snap else NARROWED, at_once, separable=True)
    if snap and grounds.gate is not None and starts and worth_it(grounds.full, grounds.recapture):
        after = way(IN_ORDER, partial(rounded_in_order, grounds.bench), separable=False)
        trials = taken.fit(0.0), after.fit(0.0)  # held, so that neither is solved again
        _, parallel = grounds.gate.judge(trials[0].arrays, taken.name, 0.0)
        verdict, in_order = grounds.gate.judge(trials[1].arrays, after.name, 0.0)
        if verdict.accepted and grounds.gate.deciding(in_order).mean() < grounds.gate.deciding(parallel).mean():
            taken = after
    decision = decided(grounds, taken, 0.0, unbounded(grounds), taken.name)
    residuals = sorted(start.residual for start in starts.values())
    spread = f"{residuals[0]:.2g} to {residuals[-1]:.2g}" if residuals else "none"
    note = f"{taken.name}: residuals {spread} before rounding, chosen on rows that did not fit them"
    return replace(decision, notes=(*decision.notes, note))
