"""Weights that are going to be rounded: every layer at the residual whose ROUNDED weight is closest, judged once.

No run of the model chooses a residual: each layer's own output error does, on rows that did not fit it. The model's
outputs are compared once, quantized against quantized, and layers whose group is rejected keep their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnx_optshift.decide.decision import Decision, Grounds, Way, decided, unbounded
from onnx_optshift.run.candidate import Candidate, while_held
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.on_grid import best_starts, placed

SNAPPED = "on the quantizer's grid, every layer at its own residual"
NARROWED = "narrowed, every layer at its own residual"


def by_rounding(grounds: Grounds, *, snap: bool, most: float = 1.0) -> Decision:
    """What to write for a quantizer: weights on its grid, or only narrow for it, from a residual of so much at most.

    It promises no bound: what the outputs deviate by is measured on the written file.
    """
    starts = best_starts(grounds.fit, most, snap=snap)

    def way(layers: Layers) -> Callable[[float], Candidate]:
        """Residual -> shifts; one above 0 caps the residuals that were chosen."""
        return while_held(
            lambda cap: placed(
                layers,
                {name: replace(start, residual=min(start.residual, cap or 1.0)) for name, start in starts.items()},
                snap=snap,
            )
        )

    full = way(grounds.full)
    fit = full if grounds.fit is grounds.full else way(grounds.fit)
    name = SNAPPED if snap else NARROWED
    decision = decided(grounds, Way(name, full, fit), 0.0, unbounded(grounds), name)
    residuals = sorted(start.residual for start in starts.values())
    spread = f"{residuals[0]:.2g} to {residuals[-1]:.2g}" if residuals else "none"
    note = f"{name}: residuals {spread} before rounding, chosen on rows that did not fit them"
    return replace(decision, notes=(*decision.notes, note))
