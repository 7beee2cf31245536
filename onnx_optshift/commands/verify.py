"""Two models on the same data: do the outputs match, which layers changed by how much, and does the data still fit?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_optshift.commands.outcome import pair_summary
from onnx_optshift.decide.decision import Decision
from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.weights import Weight
from onnx_optshift.prove.floor import Promise
from onnx_optshift.prove.written import Prover
from onnx_optshift.report.build import Clock, Findings, build_report
from onnx_optshift.report.diagnosis import Drift
from onnx_optshift.report.model import Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.candidate import Candidate, Solved
from onnx_optshift.run.capture import captured
from onnx_optshift.run.drift import drift, layer_drifts
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import find_calibration, prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.solve.objective import Norm
from onnx_optshift.solve.shift import Outcome, Shift


def verify(
    original: str | Path,
    changed: str | Path,
    calibration: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
    *,
    baseline: Sequence[object] | None = None,
) -> Report:
    """Compares the outputs of two models on some data, and those of each layer whose weight differs.

    At tolerance 0 they must be equal within the noise floor. `baseline` are sources of the calibration data, whose
    drift is to stand beside that of the data.

    Raises:
        InputError: A file or the data is missing.
    """
    clock = Clock(progress)
    with progress.stage("preparation"):
        prepared = prepare(original, settings, calibration, progress=progress)
    a, b, data = prepared.model, ModelFile.load(changed), prepared.data
    if b.path is None or a.path is None:
        raise InputError("verify compares two files: give the paths of both models.")
    if data is None:
        raise InputError("verify needs data to run both models on: give it with --calib.")
    bench, samples = prepared.bench, data.calibration
    matching = [weight for weight in prepared.weights if _matches(a, b, weight)]
    differing = [
        w for w in matching if not np.array_equal(a.initializer(w.name), b.initializer(w.name), equal_nan=True)
    ]
    apart = len(prepared.weights) - len(matching)
    unmatched = (
        (
            f"{apart} of {len(prepared.weights)} weights have no match in {b.path} by name, shape and type, as "
            "after quantization: outputs are compared, the layers of these weights are not.",
        )
        if apart
        else ()
    )
    promise = Promise(settings.tolerance if isinstance(settings.tolerance, float) else 0.0, "tolerance", samples)
    found = Findings("verify", prepared, sha256=b.sha256, output=b.path)
    drifted: Drift | None = None
    if prepared.weights:
        with clock("capture"):
            layers, _ = captured(prepared, data, Norm())
        with clock("solve"):
            layers.survey()
            solved = {w.name: _changed(layers, w, b) for w in differing if w.name in layers.facts}
        found = replace(found, layers=layers, decision=Decision(Candidate(solved, 0.0, layers.facts), promise))
        other = find_calibration(a, baseline, settings) if baseline else None
        pairs = {
            w.name: (layers.matrix(w), as_matrix(b.initializer(w.name), w.form, bench.device.solve)) for w in differing
        }
        calm = None if other is None else layer_drifts(bench, pairs, other)
        drifted = drift(layer_drifts(bench, pairs, samples), calm, settings.max_drift)
    with clock("verify"):
        proof = Prover(bench, settings.seed).compare(b.path, b.sha256, [w.name for w in differing], promise)
    found = replace(found, verification=proof)
    report = build_report(found, clock, summary="", drift=drifted, warnings=(*data.warnings, *unmatched))
    return replace(report, summary=pair_summary(proof, len(differing), drifted))


def _matches(a: ModelFile, b: ModelFile, weight: Weight) -> bool:
    """Whether the second model has a weight of this name, shape and dtype; a quantized copy has none."""
    try:
        new = b.initializer(weight.name)
    except (InputError, KeyError):
        return False
    old = a.initializer(weight.name)
    return new.shape == old.shape and new.dtype == old.dtype


def _changed(layers: Layers, weight: Weight, model: ModelFile) -> Solved:
    """How far one layer's outputs move on the data, by its weight in another model alone."""
    problem = layers.problem(weight)
    shift = Shift.unchanged(problem.matrix, Outcome.SHIFTED, rank=layers.facts[weight.name].rank)
    solved = layers.measured(weight, problem, shift, model.initializer(weight.name))
    return replace(solved, shift=replace(solved.shift, predicted_residual=solved.residual))
