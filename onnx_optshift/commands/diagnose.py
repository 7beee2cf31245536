"""Do the method's conditions hold, and what would a shift do to flatness? Writes no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_optshift.commands.next_step import next_step
from onnx_optshift.decide.decision import Decision
from onnx_optshift.decide.share import share_out
from onnx_optshift.diagnosis.conditions import conditions
from onnx_optshift.diagnosis.flatness import DEFAULT_PROBES, flatness_of
from onnx_optshift.errors import InputError
from onnx_optshift.prove.floor import Promise
from onnx_optshift.report.build import Clock, Findings, build_report
from onnx_optshift.report.model import Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.capture import captured
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import Norm

if TYPE_CHECKING:
    import onnx


def diagnose(
    model: str | Path | onnx.ModelProto,
    calibration: Sequence[object] | None,
    heldout: Sequence[object] | None,
    settings: Settings,
    probes: int = DEFAULT_PROBES,
    progress: Progress = SILENT,
) -> Report:
    """Measures whether the method's conditions hold, and what a shift at a tolerance would do to flatness.

    Flatness takes so many random directions for each layer; 0 leaves it out.

    Raises:
        InputError: There is no data.
    """
    clock = Clock(progress)
    with progress.stage("preparation"):
        prepared = prepare(model, settings, calibration, heldout, progress=progress)
    data, found = prepared.data, Findings("diagnose", prepared)
    if data is None:
        raise InputError("diagnose needs data to look at: give it with --calib.")
    if not prepared.weights:
        return build_report(found, clock, summary="Nothing to diagnose: there is no layer that could be shifted.")
    whole = replace(data, fit=data.calibration, heldout=None, split=False)
    with clock("capture"):
        layers, _ = captured(prepared, whole, Norm())
    with clock("solve"):
        samples, candidate = data.calibration, layers.candidate(0.0)
        if isinstance(settings.tolerance, float) and settings.tolerance > 0:
            outputs = prepared.bench.outputs
            candidate = share_out(outputs, samples, layers.candidate, settings.tolerance, settings.seed).candidate
    flat = flatness_of(prepared.bench, samples, settings, candidate.arrays or None, probes) if probes else None
    found = replace(found, layers=layers, decision=Decision(candidate, Promise(0.0, "noise", samples)))
    diagnosis = conditions(prepared.bench, layers, data, exact=settings.tolerance == 0)
    summary = f"{diagnosis.verdict.answer}: {diagnosis.verdict.why}"
    report = build_report(found, clock, flatness=flat, collapse=diagnosis, summary=summary)
    return replace(report, next_step=next_step(report, layers))
