"""From what a run found to its report: a pure function, which runs no model and solves nothing."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.session import versions
from onnx_optshift.decide.decision import Decision
from onnx_optshift.decide.gate import Gate
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.report import model as schema
from onnx_optshift.report import run_info
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.budget import peak_memory
from onnx_optshift.run.candidate import Solved
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import Prepared
from onnx_optshift.solve.shift import Outcome

# Of the report's timing; judging is part of solving.
STAGES = ("capture", "solve", "verify", "judge")


@dataclass
class Clock:
    """Seconds spent by stage, each of which is one of progress too."""

    progress: Progress = SILENT
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time inside the block to a stage."""
        start = time.perf_counter()
        try:
            with self.progress.stage(stage):
                yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def timing(self) -> schema.Timing:
        """All stages, and the total since the clock was made."""
        return schema.Timing(**self.seconds, total=time.perf_counter() - self.started)


@dataclass(frozen=True)
class Findings:
    """What a command found; None is what it did not come to."""

    command: str  # shift, inspect, verify or diagnose
    prepared: Prepared  # what it started with
    layers: Layers | None = None  # their facts
    decision: Decision | None = None
    gate: Gate | None = None  # the held-out judge and its trials
    sha256: str | None = None  # of the file that was written or compared
    verification: schema.Verification | None = None
    output: Path | None = None  # where the file is


def build_report(findings: Findings, clock: Clock, **rest: Any) -> schema.Report:
    """Puts a report together; `rest` are further fields of it: summary, warnings, flatness and so on."""
    prepared, decision, data = findings.prepared, findings.decision, findings.prepared.data
    model, device, settings = prepared.model, prepared.bench.device, prepared.settings
    runtime, torch_version = versions()
    return schema.Report(
        command=findings.command,
        tool=run_info.ToolInfo(
            version=metadata.version("onnx-optshift"),
            python=platform.python_version(),
            onnx=metadata.version("onnx"),
            onnxruntime=runtime,
            torch=torch_version,
            numpy=metadata.version("numpy"),
        ),
        model=run_info.ModelInfo(
            input=str(model.path or "ModelProto"),
            output=str(findings.output) if findings.output else None,
            sha256_in=model.sha256,
            sha256_out=findings.sha256,
            opset=model.opset,
            ir_version=model.ir_version,
        ),
        settings={f.name: getattr(settings, f.name) for f in fields(settings)},
        device=run_info.DeviceInfo(device.requested, device.capture, device.solve, device.note),
        calibration=_data_info(data.calibration, split=False) if data else None,
        heldout=_data_info(data.heldout, split=data.split) if data and data.heldout is not None else None,
        layers=(*(_layer(weight, findings) for weight in prepared.weights), *map(_skipped, prepared.skips)),
        verification=findings.verification,
        heldout_result=_heldout(findings),
        quantization=_quantization(findings),
        checkpoint=prepared.bench.checkpoint.report(),
        timing=clock.timing(),
        peak_memory_bytes=peak_memory(),
        predicted_memory_bytes=prepared.predicted_memory,
        decisions=(*prepared.notes, *(decision.notes if decision else ())),
        **{"warnings": data.warnings if data else (), **rest},
    )


def _layer(weight: Weight, findings: Findings) -> schema.LayerReport:
    """One layer's line: where it ended, why, and its figures."""
    decision, layers = findings.decision, findings.layers
    known = schema.LayerReport(
        name=weight.name,
        node=weight.uses[0].node,
        op_type=weight.uses[0].op_type,
        weight=weight.name,
        status="unchanged",
        reason="no calibration data was given",
        d=weight.d,
        m=weight.m,
        groups=weight.groups,
        dtype=weight.dtype,
        uses=tuple(use.node for use in weight.uses),
        top_row_share=findings.prepared.top_shares.get(weight.name),
    )
    if layers is None or decision is None:
        return known
    solved, facts = decision.candidate.solved.get(weight.name), decision.candidate.facts.get(weight.name)
    status, reason = _end(weight.name, solved, findings)
    known = replace(known, status=status, reason=reason, rows=sum(layers.store.rows(use.tap) for use in weight.uses))
    if facts is None:
        return known
    moved = solved if solved is not None and solved.moved else None
    objective, figure = layers.objective, moved.figure if moved else facts.figure
    weighs = objective.needs_slopes and moved is not None and not moved.note
    # What is called the same on both sides needs no line of its own here: rows, rank, spectrum.
    found = vars(facts) | (vars(moved) if moved else {})
    known = replace(known, **{f.name: found[f.name] for f in fields(known) if f.name in found})
    return replace(
        known,
        growing=layers.growing(weight),
        tolerance=None if moved is None else decision.candidate.tolerance if moved.allowed is None else moved.allowed,
        norm_before=facts.norm,
        norm_after=moved.shift.norm_after if moved else facts.norm,
        range_before=facts.largest,
        range_after=moved.shift.range_after if moved else facts.largest,
        predicted_residual=moved.shift.predicted_residual if moved else 0.0,
        measured_residual=moved.residual if moved else 0.0,
        curvature_ratio=((figure / facts.figure) ** 2 if facts.figure else 1.0) if weighs else None,
        frontier=tuple(schema.FrontierPoint(tolerance, ratio, None) for tolerance, ratio in facts.frontier),
        headline=schema.Headline(objective.figure, facts.figure, figure),
    )


def _end(name: str, solved: Solved | None, findings: Findings) -> tuple[str, str]:
    """Status and reason, from what was decided and what the solver said."""
    rejected = findings.decision.rejected if findings.decision else {}
    said = f"{solved.shift.outcome.value} {solved.note}".rstrip() if solved else ""
    if solved is not None and solved.moved:
        ends = {"shift": ("shifted", said), "verify": ("shifted", "its weight differs between the two models")}
        return ends.get(findings.command, ("unchanged", f"{findings.command}: this layer could be shifted"))
    if name in rejected:
        return "rejected", rejected[name]
    if solved is None:
        return "unchanged", "its weight is the same" if findings.command == "verify" else "not solved for"
    broken = solved.shift.outcome in {Outcome.NONFINITE_ROWS, Outcome.NONFINITE_WEIGHT}
    return ("skipped" if broken else "unchanged"), said


def _quantization(findings: Findings) -> tuple[schema.QuantizationError, ...] | None:
    """Errors of every layer under round-to-nearest; None when none were asked for."""
    decision = findings.decision
    if not findings.prepared.settings.quantization_bits or decision is None:
        return None
    found = []
    for name, facts in decision.candidate.facts.items():
        solved = decision.candidate.solved.get(name)
        after = solved.rounding if solved is not None and solved.moved else facts.rounding
        found += [
            schema.QuantizationError(name, grid.bits, facts.rounding[grid], after[grid]) for grid in facts.rounding
        ]
    return tuple(found)


def _heldout(findings: Findings) -> schema.HeldoutResult | None:
    gate, decision = findings.gate, findings.decision
    if gate is None or decision is None:
        return None
    verdict, before = decision.verdict, gate.before.score
    return schema.HeldoutResult(
        before=before,
        after=schema.Score(verdict.loss, verdict.top1, before.n) if verdict else before,
        accepted=bool(decision.candidate.arrays),
        loss_name=gate.loss.name,
        tried=tuple(replace(trial, chosen=trial is verdict) for trial in gate.tried),
        quantized=verdict.quantized if verdict else (),
    )


def _data_info(samples: Samples, *, split: bool) -> run_info.DataInfo:
    return run_info.DataInfo(
        source=samples.source,
        samples=len(samples),
        synthetic=samples.synthetic,
        classes=samples.classes,
        fingerprint=samples.fingerprint,
        notes=tuple(samples.notes),
        split=split,
    )


def _skipped(skip: Skip) -> schema.LayerReport:
    name = skip.weight or skip.node
    return schema.LayerReport(name, skip.node, skip.op_type, skip.weight, status="skipped", reason=skip.reason)
