"""From what a run found to its report: a pure function, which runs no model and solves nothing."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx_optshift import journal
from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.session import versions
from onnx_optshift.decide.decision import Decision
from onnx_optshift.decide.gate import Gate
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.report.model import (
    DataInfo,
    DeviceInfo,
    FrontierPoint,
    Headline,
    HeldoutResult,
    LayerReport,
    ModelInfo,
    QuantizationError,
    Report,
    Score,
    Timing,
    ToolInfo,
    Verification,
)
from onnx_optshift.run.budget import peak_memory
from onnx_optshift.run.layers import LayerFacts, Layers, Solved
from onnx_optshift.run.prepare import Prepared
from onnx_optshift.solve.shift import Outcome


@dataclass
class Clock:
    """Seconds spent by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time inside the block to a stage."""
        start = time.perf_counter()
        try:
            with journal.stage(stage):
                yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def timing(self) -> Timing:
        """All stages, and the total since the clock was made."""
        stages = {name: self.seconds.get(name, 0.0) for name in ("capture", "solve", "verify")}
        return Timing(**stages, total=time.perf_counter() - self.started)


@dataclass(frozen=True)
class Findings:
    """What a command found.

    Attributes:
        command: shift, inspect, verify or diagnose.
        prepared: What it started with.
        layers: Their facts; None where there was no data.
        decision: What was decided on; None where nothing was solved.
        gate: The held-out judge and its trials; None where nothing was held out.
        sha256: Of the file that was written or compared; None where there is none.
        verification: The proof; None where outputs were not compared.
        output: Where the file is; None where none was written.
    """

    command: str
    prepared: Prepared
    layers: Layers | None = None
    decision: Decision | None = None
    gate: Gate | None = None
    sha256: str | None = None
    verification: Verification | None = None
    output: Path | None = None


def build_report(findings: Findings, clock: Clock, **rest: Any) -> Report:
    """Puts a report together.

    Args:
        findings: What was found.
        clock: Of the run.
        **rest: Further fields of the report: summary, warnings, flatness and so on.
    """
    prepared, decision, data = findings.prepared, findings.decision, findings.prepared.data
    runtime, torch_version = versions()
    device = prepared.bench.device
    return Report(
        command=findings.command,
        tool=ToolInfo(
            version=metadata.version("onnx-optshift"),
            python=platform.python_version(),
            onnx=metadata.version("onnx"),
            onnxruntime=runtime,
            torch=torch_version,
            numpy=metadata.version("numpy"),
        ),
        model=ModelInfo(
            input=str(prepared.model.path) if prepared.model.path else "ModelProto",
            output=str(findings.output) if findings.output else None,
            sha256_in=prepared.model.sha256,
            sha256_out=findings.sha256,
            opset=prepared.model.opset,
            ir_version=prepared.model.ir_version,
        ),
        settings={f.name: getattr(prepared.settings, f.name) for f in dataclass_fields(prepared.settings)},
        device=DeviceInfo(device.requested, device.capture, device.solve, device.note),
        calibration=_data_info(data.calibration, split=False) if data else None,
        heldout=_data_info(data.heldout, split=data.split) if data and data.heldout is not None else None,
        layers=(*(layer_report(weight, findings) for weight in prepared.weights), *map(_skipped, prepared.skips)),
        verification=findings.verification,
        heldout_result=_heldout(findings),
        quantization=_quantization(findings),
        timing=clock.timing(),
        peak_memory_bytes=peak_memory(),
        decisions=(*decision.notes, *_weighed(findings)) if decision else (),
        **{"warnings": data.warnings if data else (), **rest},
    )


def layer_report(weight: Weight, findings: Findings) -> LayerReport:
    """One layer's line: where it ended, why, and its figures."""
    decision, layers = findings.decision, findings.layers
    common = LayerReport(
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
    )
    if layers is None or decision is None:
        return common
    solved, facts = decision.candidate.solved.get(weight.name), decision.candidate.facts.get(weight.name)
    status, reason = _end(weight.name, solved, findings)
    known = replace(common, status=status, reason=reason, rows=sum(layers.store.rows(use.tap) for use in weight.uses))
    if facts is None:
        return known
    known = _with_facts(known, facts, layers.objective.figure)
    if solved is None or not solved.moved:
        return known
    shift = solved.shift
    return replace(
        known,
        tolerance=decision.candidate.tolerance,
        norm_before=shift.norm_before,
        norm_after=shift.norm_after,
        range_before=shift.range_before,
        range_after=shift.range_after,
        predicted_residual=shift.predicted_residual,
        measured_residual=solved.residual,
        curvature_ratio=_ratio(facts, solved) if layers.objective.needs_slopes and not solved.note else None,
        headline=Headline(layers.objective.figure, facts.figure, solved.figure),
    )


def _with_facts(layer: LayerReport, facts: LayerFacts, figure: str) -> LayerReport:
    return replace(
        layer,
        rows=facts.rows,
        rank=facts.rank,
        norm_before=facts.norm,
        norm_after=facts.norm,
        range_before=facts.largest,
        range_after=facts.largest,
        predicted_residual=0.0,
        measured_residual=0.0,
        frontier=tuple(FrontierPoint(tolerance, ratio, None) for tolerance, ratio in facts.frontier),
        spectrum=facts.spectrum,
        headline=Headline(figure, facts.figure, facts.figure),
    )


def _end(name: str, solved: Solved | None, findings: Findings) -> tuple[str, str]:
    """Status and reason, from what was decided and what the solver said."""
    assert findings.decision is not None
    if solved is not None and solved.moved:
        if findings.command == "shift":
            return "shifted", _reason(solved)
        if findings.command == "verify":
            return "shifted", "its weight differs between the two models"
        return "unchanged", f"{findings.command}: this layer could be shifted"
    if name in findings.decision.rejected:
        return "rejected", findings.decision.rejected[name]
    if solved is None:
        return "unchanged", "its weight is the same" if findings.command == "verify" else "not solved for"
    broken = solved.shift.outcome in {Outcome.NONFINITE_ROWS, Outcome.NONFINITE_WEIGHT}
    return ("skipped" if broken else "unchanged"), _reason(solved)


def _reason(solved: Solved) -> str:
    outcome = solved.shift.outcome.value
    return f"{outcome} {solved.note}" if solved.note else outcome


def _ratio(facts: LayerFacts, solved: Solved) -> float:
    return (solved.figure / facts.figure) ** 2 if facts.figure else 1.0


def _weighed(findings: Findings) -> tuple[str, ...]:
    """What the objective "curvature" made small, in a sentence; none for other objectives."""
    decision, layers = findings.decision, findings.layers
    if decision is None or layers is None or not layers.objective.needs_slopes:
        return ()
    moved = [(name, solved) for name, solved in decision.candidate.solved.items() if solved.moved and not solved.note]
    ratios = [_ratio(decision.candidate.facts[name], solved) for name, solved in moved]
    mean = sum(ratios) / max(1, len(ratios))
    return (f"curvature: tr(WᵀMW) {mean:.3g} of the original's, mean over {len(ratios)} weights",) if ratios else ()


def _quantization(findings: Findings) -> tuple[QuantizationError, ...] | None:
    """Errors of every layer under round-to-nearest; None when none were asked for."""
    layers, decision = findings.layers, findings.decision
    if not findings.prepared.settings.quantization_bits or layers is None or decision is None:
        return None
    found = []
    for name, facts in decision.candidate.facts.items():
        solved = decision.candidate.solved.get(name)
        after = solved.rounding if solved is not None and solved.moved else facts.rounding
        found += [QuantizationError(name, grid.bits, facts.rounding[grid], after[grid]) for grid in facts.rounding]
    return tuple(found)


def _heldout(findings: Findings) -> HeldoutResult | None:
    gate, decision = findings.gate, findings.decision
    if gate is None or decision is None:
        return None
    verdict = decision.verdict
    before = gate.before.score
    after = before if verdict is None else Score(loss=verdict.loss, top1=verdict.top1, n=before.n)
    return HeldoutResult(
        before=before,
        after=after,
        accepted=bool(decision.candidate.arrays),
        loss_name=gate.loss.name,
        tried=tuple(replace(trial, chosen=trial is verdict) for trial in gate.tried),
        quantized=verdict.quantized if verdict is not None else (),
    )


def _data_info(samples: Samples, *, split: bool) -> DataInfo:
    return DataInfo(
        source=samples.source,
        samples=len(samples),
        synthetic=samples.synthetic,
        classes=samples.classes,
        fingerprint=samples.fingerprint,
        notes=tuple(samples.notes),
        split=split,
    )


def _skipped(skip: Skip) -> LayerReport:
    return LayerReport(
        name=skip.weight or skip.node,
        node=skip.node,
        op_type=skip.op_type,
        weight=skip.weight,
        status="skipped",
        reason=skip.reason,
    )
