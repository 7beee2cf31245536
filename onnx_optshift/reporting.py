"""From findings to the report: every figure named, every skip with its reason, one sentence that says how it went."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx_optshift import journal
from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.session import Device, versions
from onnx_optshift.data import Data
from onnx_optshift.decide.choose import Decision
from onnx_optshift.decide.gate import Gate
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.layers import Candidate, Layers, Solved
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.report.model import (
    DataInfo,
    DeviceInfo,
    FrontierPoint,
    HeldoutResult,
    LayerReport,
    ModelInfo,
    Report,
    Score,
    Timing,
    ToolInfo,
    Verification,
)
from onnx_optshift.settings import Settings
from onnx_optshift.solve.shift import Outcome as ShiftOutcome

# Places along a layer's spectrum that the report shows.
SPECTRUM_POINTS = 33
# The tolerances of the frontier: one factorization gives the norm and range at each.
FRONTIER = (0.0, 0.003, 0.01, 0.03, 0.1, 0.2)


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
    """What a run knows before it writes.

    Attributes:
        model: The original.
        settings: All choices.
        device: What ran where.
        weights: Weights that could be solved for.
        skips: Weights that could not, with reasons.
        data: The samples; None when none were needed.
        layers: Statistics of all calibration samples; None before capture.
        decision: What to write; None when nothing was solved.
        gate: The held-out judge and its trials.
        grids: What the weights are going to be quantized to.
    """

    model: ModelFile
    settings: Settings
    device: Device
    weights: tuple[Weight, ...]
    skips: tuple[Skip, ...]
    data: Data | None
    layers: Layers | None = None
    decision: Decision | None = None
    gate: Gate | None = None
    grids: tuple[Grid, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What stands in the file that the report is about.

    Attributes:
        sha256: Of the model file.
        candidate: The shifts that are in it.
        reverted: Initializers put back because the outputs left the tolerance.
        verification: The proof; None when there was no data to run.
    """

    sha256: str
    candidate: Candidate
    reverted: tuple[str, ...]
    verification: Verification | None


def build_report(findings: Findings, outcome: Outcome | None, clock: Clock, out: Path | None) -> Report:
    """Puts the report of a run together; without an outcome it is that of an inspection."""
    candidate = outcome.candidate if outcome else (findings.decision.candidate if findings.decision else None)
    layers = [_layer(weight, findings, outcome, candidate) for weight in findings.weights]
    layers += [_skipped(skip) for skip in findings.skips]
    proof = outcome.verification if outcome else None
    data = findings.data
    runtime, torch_version = versions()
    source = findings.model
    return Report(
        tool=ToolInfo(
            version=metadata.version("onnx-optshift"),
            python=platform.python_version(),
            onnx=metadata.version("onnx"),
            onnxruntime=runtime,
            torch=torch_version,
            numpy=metadata.version("numpy"),
        ),
        model=ModelInfo(
            input=str(source.path) if source.path else "ModelProto",
            output=str(out) if out and not findings.settings.dry_run else None,
            sha256_in=source.sha256,
            sha256_out=outcome.sha256 if outcome else None,
            opset=source.opset,
            ir_version=source.ir_version,
        ),
        settings={f.name: getattr(findings.settings, f.name) for f in dataclass_fields(findings.settings)},
        device=DeviceInfo(
            requested=findings.device.requested,
            capture=findings.device.capture,
            solve=findings.device.solve,
            note=findings.device.note,
        ),
        calibration=_data_info(data.calibration, split=False) if data else None,
        heldout=_data_info(data.judge, split=data.split) if data and data.judge is not None else None,
        layers=tuple(layers),
        verification=proof,
        heldout_result=_heldout(findings, candidate) if outcome else None,
        quantization=_quantization(findings, candidate),
        timing=clock.timing(),
        peak_memory_bytes=peak_memory(),
        warnings=data.warnings if data else (),
        decisions=(*findings.decision.notes, *_weighed(candidate)) if findings.decision else (),
        summary=_summary(findings, outcome, layers),
    )


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


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


def _layer(weight: Weight, findings: Findings, outcome: Outcome | None, candidate: Candidate | None) -> LayerReport:
    decision, layers = findings.decision, findings.layers
    common: dict[str, Any] = {
        "name": weight.name,
        "node": weight.uses[0].node,
        "op_type": weight.uses[0].op_type,
        "weight": weight.name,
        "d": weight.d,
        "m": weight.m,
        "groups": weight.groups,
        "dtype": weight.dtype,
        "uses": tuple(use.node for use in weight.uses),
    }
    if layers is None or decision is None or candidate is None:
        return LayerReport(**common, status="unchanged", reason="no calibration data was given")
    start = time.perf_counter()
    solved = candidate.solved.get(weight.name) or layers.solve(weight, decision.candidate.tolerance)
    moved = weight.name in candidate.arrays
    status, reason = _status(weight.name, solved, moved, findings, outcome)
    shift = solved.shift
    return LayerReport(
        **common,
        rows=layers.moments(weight).rows,
        rank=shift.rank,
        status=status,
        reason=reason,
        tolerance=candidate.tolerance if moved else None,
        norm_before=shift.norm_before,
        norm_after=shift.norm_after if moved or outcome is None else shift.norm_before,
        range_before=shift.range_before,
        range_after=shift.range_after if moved or outcome is None else shift.range_before,
        predicted_residual=shift.predicted_residual if moved else 0.0,
        measured_residual=solved.residual if moved else 0.0,
        curvature_ratio=solved.weighted if moved else None,
        frontier=tuple(FrontierPoint(*point) for point in layers.frontier(weight, FRONTIER)),
        spectrum=layers.singular_values(weight, SPECTRUM_POINTS),
        seconds=time.perf_counter() - start,
    )


def _status(name: str, solved: Solved, moved: bool, findings: Findings, outcome: Outcome | None) -> tuple[str, str]:
    if outcome is None and solved.moved:
        return "unchanged", "inspection: this layer could be shifted"
    if moved:
        return "shifted", _reason(solved)
    if outcome is not None and name in outcome.reverted:
        return "rejected", "put back: the outputs left the tolerance"
    assert findings.decision is not None
    if name in findings.decision.rejected:
        return "rejected", findings.decision.rejected[name]
    broken = solved.shift.outcome in {ShiftOutcome.NONFINITE_ROWS, ShiftOutcome.NONFINITE_WEIGHT}
    return ("skipped" if broken else "unchanged"), _reason(solved)


def _reason(solved: Solved) -> str:
    outcome = solved.shift.outcome.value
    return f"{outcome} {solved.note}" if solved.note else outcome


def _weighed(candidate: Candidate | None) -> tuple[str, ...]:
    """What the objective "curvature" made small, in a sentence; none for other objectives."""
    ratios = (
        [solved.weighted for solved in candidate.solved.values() if solved.weighted is not None] if candidate else []
    )
    if not ratios:
        return ()
    mean = sum(ratios) / len(ratios)
    return (f"curvature: tr(WᵀMW) {mean:.3g} of the original's, mean over {len(ratios)} weights",)


def _quantization(findings: Findings, candidate: Candidate | None) -> tuple[dict[str, Any], ...] | None:
    """Errors of every layer under round-to-nearest, as the JSON schema has them; None when none were asked for."""
    if not findings.grids or findings.layers is None or candidate is None:
        return None
    arrays = candidate.arrays
    return tuple(
        {"layer": weight.name, "bits": grid.bits, "error_before": before, "error_after": after}
        for weight in findings.weights
        for grid, before, after in findings.layers.quantization_errors(
            weight, arrays.get(weight.name, findings.model.initializer(weight.name)), findings.grids
        )
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


def _heldout(findings: Findings, candidate: Candidate | None) -> HeldoutResult | None:
    gate = findings.gate
    if gate is None or candidate is None:
        return None
    judged = findings.decision.judged if findings.decision else None
    after = gate.before.score
    if candidate.arrays and findings.data is not None:
        if findings.data.split and judged is not None:
            # The judging samples have joined the final solve since: only the trial's score is of unseen data.
            after = Score(loss=judged.loss, top1=judged.top1, n=after.n)
        else:
            after = gate.run(candidate.arrays).score
    return HeldoutResult(
        before=gate.before.score,
        after=after,
        accepted=bool(candidate.arrays),
        loss_name=gate.loss.name,
        tried=tuple(gate.tried),
    )


def _summary(findings: Findings, outcome: Outcome | None, layers: list[LayerReport]) -> str:
    candidates = [layer for layer in layers if layer.status != "skipped"]
    shifted = [layer for layer in candidates if layer.status == "shifted"]
    if outcome is None:
        free = [layer for layer in candidates if layer.rank is not None and layer.d and layer.rank < layer.d]
        return f"{len(candidates)} layers, {len(free)} with freedom, {len(layers) - len(candidates)} skipped."
    if not candidates:
        return "Nothing to do: the model has no linear layer that can be shifted. It was written unchanged."
    if not shifted:
        refused = [trial for trial in findings.gate.tried if not trial.accepted] if findings.gate else []
        why = "every layer's equation has only one solution left"
        if refused:
            why = f"the held-out gate refused every shift ({refused[-1].reason})"
        return f"Nothing to gain: {why}. The model was written unchanged."
    where = ""
    if findings.decision is not None and findings.data is not None:
        covered, all_samples = len(findings.decision.covered), len(findings.data.calibration)
        where = f" on the {covered} samples that the stochastic shift keeps" if covered < all_samples else ""
    return f"{len(shifted)} of {len(candidates)} layers shifted; {_proved(outcome.verification)}{where}."


def _proved(proof: Verification | None) -> str:
    if proof is None or not proof.outputs:
        return "no output was compared"
    worst = max(proof.outputs, key=lambda output: output.rel)
    floor = proof.noise_floor.rel if proof.noise_floor else 0.0
    times = f", {worst.rel / floor:.1f}x the noise floor" if floor else ""
    return f"outputs deviate by {worst.rel:.2g} (relative{times}; allowed {worst.bound:.2g})"
