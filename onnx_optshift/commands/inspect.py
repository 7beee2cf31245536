"""Layers, the freedom that calibration data leaves them, and skips with reasons. Writes no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_optshift.commands.enough import growth
from onnx_optshift.commands.next_step import next_step
from onnx_optshift.decide.decision import Decision
from onnx_optshift.prove.floor import Promise
from onnx_optshift.report.build import Clock, Findings, build_report
from onnx_optshift.report.model import LayerReport, Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.capture import captured, objective_of
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings

if TYPE_CHECKING:
    import onnx


def inspect(
    model: str | Path | onnx.ModelProto,
    calibration: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
) -> Report:
    """Looks at a model's linear layers; without calibration data they are listed without rank."""
    clock = Clock(progress)
    with progress.stage("preparation"):
        prepared = prepare(model, settings, calibration, look_at_rows=True, progress=progress)
    found, data = Findings("inspect", prepared), prepared.data
    if data is not None and prepared.weights:
        with clock("capture"):
            layers, _ = captured(prepared, data, objective_of(prepared))
        with clock("solve"):
            decision = Decision(layers.candidate(0.0), Promise(0.0, "noise", data.calibration))
        found = replace(found, layers=layers, decision=decision)
    report = build_report(found, clock, summary="")
    prepared.bench.checkpoint.finish()
    return replace(report, summary=_summary(report.layers), next_step=next_step(report, found.layers))


def _summary(layers: Sequence[LayerReport]) -> str:
    candidates = [layer for layer in layers if layer.status != "skipped"]
    skipped = len(layers) - len(candidates)
    if not any(layer.rank is not None for layer in candidates):
        return f"{len(candidates)} layers, {skipped} skipped; which of them have freedom, calibration data would tell."
    free = [layer for layer in candidates if layer.free]
    more = growth(candidates)
    return f"{len(candidates)} layers, {len(free)} with freedom, {skipped} skipped{'; ' * bool(more)}{more}."
