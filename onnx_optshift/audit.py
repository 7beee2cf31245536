"""Two models on the same data: do the outputs agree, and which layers changed by how much?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_optshift import data as arrangement
from onnx_optshift.calibration.source import Samples
from onnx_optshift.data import Data
from onnx_optshift.decide.choose import Decision
from onnx_optshift.drift import as_report, layer_drifts
from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.weights import Weight
from onnx_optshift.layers import Candidate, Layers, Solved
from onnx_optshift.proof import noise_floor, verification
from onnx_optshift.report.model import Report, Verification
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.reporting import Clock, Findings, build_report
from onnx_optshift.reporting import Outcome as FileOutcome
from onnx_optshift.settings import Settings
from onnx_optshift.solve.shift import Outcome, Shift
from onnx_optshift.solve.spectrum import relative_residual
from onnx_optshift.workbench import Workbench, open_model, open_workbench


def compare(
    original: str | Path,
    changed: str | Path,
    calibration: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
    *,
    baseline: Sequence[object] | None = None,
) -> Report:
    """Compares the outputs of two models, and the outputs of each layer whose weight differs.

    Args:
        original: The model that the other is held against.
        changed: The other model; same inputs and outputs.
        calibration: The data; none looks beside the original.
        settings: `tolerance` is what the outputs may deviate by; 0 asks for equality within the noise floor.
        progress: Where long passes report to.
        baseline: Sources of the calibration data, whose drift is to stand beside that of the data.

    Returns:
        A report whose verification says whether the outputs agree, and whose drift what the changes mean for the data.

    Raises:
        InputError: A model or the data cannot be used.
    """
    clock = Clock()
    a, discovered, skips = open_model(original, settings)
    b = ModelFile.load(changed)
    if b.path is None or a.path is None:
        raise InputError("verify compares two files: give the paths of both models.")
    samples = arrangement.find_calibration(a, calibration, settings)
    if samples is None:
        raise InputError("verify needs data to run both models on: give it with --calib.")
    bench = open_workbench(a, discovered, settings, progress)
    unreached = bench.drop_unstackable(samples)
    weights = bench.weights
    data = Data(samples, samples, None, False)
    findings = Findings(a, settings, bench.device, weights, (*skips, *unreached), data)
    differing = [weight for weight in weights if _differs(a, b, weight)]
    candidate = Candidate({}, 0.0)
    found: dict[str, Any] | None = None
    if weights:
        with clock("capture"):
            bench.plan(samples)
            layers = Layers(weights, bench.collect(samples), a.initializer, device=bench.device.solve)
            candidate = Candidate({w.name: _drift(layers, w, b) for w in differing}, 0.0)
        findings = replace(findings, layers=layers, decision=Decision(candidate, 0.0, samples))
        found = _drifts(bench, layers, candidate, samples, baseline, settings)
    with clock("verify"):
        proof = _proof(bench, b.path, samples, candidate, settings)
    report = build_report(findings, FileOutcome(b.sha256, candidate, (), proof), clock, b.path)
    return replace(report, drift=found)


def _drifts(
    bench: Workbench,
    layers: Layers,
    candidate: Candidate,
    samples: Samples,
    baseline: Sequence[object] | None,
    settings: Settings,
) -> dict[str, Any]:
    """The report's `drift`, of the data and of the baseline."""
    changes = {
        name: (layers.matrix(layers.weights[name]), layers.as_matrix(layers.weights[name], array))
        for name, array in candidate.arrays.items()
    }
    other = arrangement.find_calibration(bench.model, baseline, settings) if baseline else None
    return as_report(
        layer_drifts(bench, changes, samples),
        None if other is None else layer_drifts(bench, changes, other),
        settings.max_drift,
    )


def _differs(a: ModelFile, b: ModelFile, weight: Weight) -> bool:
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
    return not np.array_equal(old, new)


def _drift(layers: Layers, weight: Weight, changed: ModelFile) -> Solved:
    """How far one layer's outputs move on the data, by its new weight alone."""
    new = changed.initializer(weight.name)
    before = layers.matrix(weight)
    after = layers.as_matrix(weight, new)
    shift = Shift.unchanged(before, Outcome.SHIFTED, rank=layers.solve(weight, 0.0).shift.rank)
    residual = relative_residual(layers.spectrum(weight), before, after)
    moved = Shift.unchanged(after, Outcome.SHIFTED)
    return Solved(
        replace(
            shift,
            matrix=before.new_empty(0),
            norm_after=moved.norm_before,
            range_after=moved.range_before,
            predicted_residual=residual,
        ),
        new,
        residual,
    )


def _proof(bench: Workbench, changed: Path, samples: Samples, candidate: Candidate, settings: Settings) -> Verification:
    floor = noise_floor(bench, samples, candidate.arrays, settings.seed)
    difference = bench.deviation(samples, {}, lambda: bench.session(changed))
    tolerance = settings.tolerance if isinstance(settings.tolerance, float) else 0.0
    return verification(difference.results(), floor, tolerance, attempts=1, reverted=())
