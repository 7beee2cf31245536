"""Two models beside each other: which weights differ, how far that moves each layer, and whether outputs match."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.weights import Weight
from onnx_optshift.prove.floor import Promise, noise_floor, verification
from onnx_optshift.report.model import Verification
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.layers import Layers, Solved
from onnx_optshift.solve.shift import Outcome, Shift


def differs(a: ModelFile, b: ModelFile, weight: Weight) -> bool:
    """Whether a weight has other content in the second model.

    Raises:
        InputError: The second model has no such weight, or one of another shape or dtype.
    """
    try:
        new = b.initializer(weight.name)
    except (InputError, KeyError) as error:
        raise InputError(
            f"{b.path}: weight {weight.name!r} of {a.path} is missing. "
            "verify compares a model with a shifted copy of it."
        ) from error
    old = a.initializer(weight.name)
    if new.shape != old.shape or new.dtype != old.dtype:
        raise InputError(
            f"{b.path}: weight {weight.name!r} is {new.dtype}{list(new.shape)}, expected {old.dtype}{list(old.shape)}. "
            "verify compares a model with a shifted copy of it."
        )
    return not np.array_equal(old, new, equal_nan=True)


def changed_layer(layers: Layers, weight: Weight, changed: ModelFile) -> Solved:
    """How far one layer's outputs move on the data, by its new weight alone."""
    problem = layers.problem(weight)
    shift = Shift.unchanged(problem.matrix, Outcome.SHIFTED, rank=layers.facts[weight.name].rank)
    solved = layers.measured(weight, problem, shift, changed.initializer(weight.name))
    return replace(solved, shift=replace(solved.shift, predicted_residual=solved.residual))


def matching(bench: Bench, changed: ModelFile, names: frozenset[str], promise: Promise, seed: int) -> Verification:
    """Whether the outputs of two models match; two files that are the same byte for byte need no run.

    Args:
        bench: The original.
        changed: The other model.
        names: Weights that differ.
        promise: What the outputs are held to.
        seed: Of the rounding floor's directions.
    """
    if changed.sha256 == bench.model.sha256:
        return Verification(passed=True, outputs=(), noise_floor=None, identical_bytes=True)
    floor = noise_floor(bench, promise.covered, names, seed)
    difference = bench.outputs.deviation(promise.covered, {}, lambda: bench.sessions.open(changed.path))
    return verification(difference.results(), floor, promise)
