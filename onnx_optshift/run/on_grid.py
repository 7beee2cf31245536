"""All layers brought onto a quantizer's grid, or made narrow for it, each at the residual that suits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnx_optshift.run.candidate import Candidate, Solved
from onnx_optshift.run.layers import Layers
from onnx_optshift.solve.grid_rounding import Start
from onnx_optshift.solve.shift import Outcome

Starts = Mapping[str, Start]


def best_starts(layers: Layers, most: float, *, snap: bool) -> dict[str, Start]:
    """For every layer the start whose rounded weight has the least output error on rows that did not fit it.

    Args:
        layers: With an objective that has grids.
        most: Largest residual that a layer may have.
        snap: Whether weights are going to lie on the grid; they are only made narrow for it otherwise.
    """
    found: dict[str, Start] = {}
    for weight in layers.each("choose residuals", judged=True):
        if layers.blocked(weight) is None:
            found[weight.name] = layers.start(weight, most, snap=snap)
    everywhere = {name: start for part in layers.sharing.world.gather(found) for name, start in part.items()}
    return {name: everywhere[name] for name in layers.weights if name in everywhere}


def placed(layers: Layers, starts: Starts, *, snap: bool) -> Candidate:
    """Every layer from its start: on the grid, or narrow; a layer without a start keeps its weight."""
    solved: dict[str, Solved] = {}
    for weight in layers.each("solve"):
        start = starts.get(weight.name)
        if start is not None and snap:
            solved[weight.name] = layers.snap(weight, start)
        else:
            one = layers.solve(weight, start.residual if start is not None else 0.0)
            one = replace(one, allowed=start.residual) if start is not None and one.moved else one
            if one.shift.outcome in {Outcome.FULL_RANK, Outcome.ALREADY_MINIMAL} and start is not None:
                # Larger residuals were tried, and rounded worse.
                one = replace(one, shift=replace(one.shift, outcome=Outcome.ROUNDS_WORSE))
            solved[weight.name] = one
    return gathered(layers, starts, layers.together(solved))


def gathered(layers: Layers, starts: Starts, solved: Mapping[str, Solved]) -> Candidate:
    """Solutions of all layers as one candidate, in graph order; its tolerance is the largest residual of a start."""
    most = max((start.residual for start in starts.values()), default=0.0)
    return Candidate({name: solved[name] for name in layers.weights}, most, layers.facts)
