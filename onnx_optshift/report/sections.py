"""What a report says, section by section: what was asked for and what came out first, then the grounds for it.

A pure function of the report. To show a new figure, add it to the model, measure it, and name it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields

from onnx_optshift.report.figures import (
    Cell,
    Change,
    Name,
    Names,
    Percent,
    Word,
    finite,
    mean_change,
    number,
)
from onnx_optshift.report.model import DataInfo, Headline, LayerReport, OutputComparison, Report
from onnx_optshift.report.section import Block, ChartOf, Column, Fact, Facts, Note, Section, Table, figures
from onnx_optshift.report.sections_diagnose import conditions, features, flatness, ranks
from onnx_optshift.report.sections_evidence import drift, heldout, outputs, quantization

KINDS = {
    "shift": "Shift report",
    "inspect": "Inspection",
    "verify": "Comparison of two models",
    "diagnose": "Diagnosis",
}
_ASKED = {
    "inspect": "which layers could be shifted, and how far",
    "verify": "whether the outputs of both models match",
    "diagnose": "whether this model and its data are fit for a shift",
}


def sections(report: Report) -> tuple[Section, ...]:
    """All sections that the report has something for, in the order of reading."""
    everything = (
        _result(report),
        conditions(report.collapse),
        outputs(report),
        heldout(report),
        drift(report.drift),
        quantization(report.quantization),
        _layers(report),
        ranks(report.collapse),
        features(report.collapse),
        flatness(report.flatness),
        _frontier(report),
        _decisions(report),
        _run(report),
    )
    return tuple(section for section in everything if section is not None and section.blocks)


def title(report: Report) -> str:
    """The kind of report and what it is about, in one line."""
    model = report.model
    return f"{KINDS[report.command]}: {f'{model.input} -> {model.output}' if model.output else model.input}"


def candidates(report: Report) -> list[LayerReport]:
    """The layers that are not skipped, in the order of the report."""
    return [layer for layer in report.layers if layer.status != "skipped"]


def headline(layer: LayerReport) -> Headline | None:
    """The figure that was to become small; the norm where nothing was solved for another; None without figures."""
    if layer.headline is not None:
        return layer.headline
    if layer.norm_before is None or layer.norm_after is None:
        return None
    return Headline("norm", layer.norm_before, layer.norm_after)


def headline_name(report: Report) -> str:
    """What the headline figure is called."""
    return next((known.name for layer in candidates(report) if (known := headline(layer))), "norm")


def frontier_points(report: Report) -> list[tuple[float, tuple[float, float, float]]]:
    """Per residual tolerance, the shares that are left of the headline figure: mean, least and most of the layers."""
    layers = [layer for layer in candidates(report) if layer.frontier]
    by_range = headline_name(report) == "range"
    points = []
    for column in zip(*(layer.frontier for layer in layers), strict=False):
        ratios = [point.range_ratio if by_range else point.norm_ratio for point in column]
        known = [ratio for ratio in ratios if ratio is not None and finite(ratio)]
        if known and len(known) == len(ratios):
            points.append((column[0].tolerance, (math.fsum(known) / len(known), min(known), max(known))))
    return points


def _result(report: Report) -> Section:
    layers = candidates(report)
    skipped = len(report.layers) - len(layers)
    more = f"{skipped} more skipped" if skipped else ""
    rows: list[Fact] = []
    if report.collapse is not None:
        rows.append(Fact("verdict", Word(report.collapse.verdict.answer), report.collapse.verdict.why))
    if report.command == "shift":
        rows.append(Fact("layers shifted", f"{sum(x.status == 'shifted' for x in layers)} of {len(layers)}", more))
    elif report.command in {"inspect", "diagnose"}:
        free = sum(layer.rank is not None and layer.d is not None and layer.rank < layer.d for layer in layers)
        rows.append(Fact("layers with freedom", f"{free} of {len(layers)}", more))
    result = report.heldout_result
    for score in result.quantized if result else ():
        rows.append(Fact(f"output error, {score.bits} bits", Change(score.before, score.after), "held-out data"))
    for bits, pairs in _by_bits(report).items():
        if found := mean_change(pairs):
            worse = sum(after > before for before, after in pairs)
            rows.append(Fact(f"layer error, {bits} bits", found[0], f"mean of {found[1]} layers; worse in {worse}"))
    moved = mean_change((known.before, known.after) for layer in layers if (known := headline(layer)))
    if moved and report.command == "shift":
        rows.append(Fact(headline_name(report), moved[0], f"mean of {moved[1]} layers"))
    if report.verification is not None and report.verification.outputs:
        rows.append(_worst_output(report.verification.outputs, judged=report.judges_outputs))
    if report.drift is not None:
        limit = "" if report.drift.limit is None else f"allowed: {number(report.drift.limit)}"
        rows.append(Fact("drift", report.drift.figure, limit))
    if result is not None:
        kind = " in float" if result.quantized else ""
        loss = Change(result.before.loss, result.after.loss)
        rows.append(Fact(f"held-out loss{kind}", loss, f"{result.after.n} samples"))
        if result.before.top1 is not None and result.after.top1 is not None:
            accuracy = Change(result.before.top1, result.after.top1, is_share=True)
            rows.append(Fact(f"held-out accuracy{kind}", accuracy))
    notes = [Note(f"Asked for: {_asked(report)}.")]
    notes += [status] if (status := _status(report)) else []
    return Section("result", "Result", (*notes, Facts(tuple(rows))))


def _asked(report: Report) -> str:
    settings = report.settings
    if report.command == "verify" and report.drift is not None and report.drift.limit is not None:
        return f"whether the data drifts by more than {number(report.drift.limit)}"
    if report.command != "shift":
        return _ASKED[report.command]
    tolerance = settings.get("tolerance", 0.0)
    asked = {"auto": "the deviation that serves held-out data best", 0.0: "the same outputs on calibration data"}
    parts = [asked.get(tolerance) or f"outputs within {tolerance:g} on calibration data"]
    if (batch := settings.get("stochastic")) is not None:
        parts[0] += f", for a batch of {batch} samples" if batch else ", for a batch that held-out data chooses"
    parts.append(f"objective {settings.get('objective', 'norm')}")
    if bits := settings.get("quantization_bits"):
        parts.append(f"to be quantized to {', '.join(map(str, bits))} bits")
    return "; ".join(parts)


def _status(report: Report) -> Note | None:
    """How the question was answered."""
    drift, proof = report.drift, report.verification
    if drift is not None and drift.limit is not None:
        share = f"{number(drift.figure)} at {drift.quantile:.0%} of the samples, allowed {number(drift.limit)}"
        return Note(f"The drift {'passed' if drift.passed else 'FAILED'}: {share}.", "good" if drift.passed else "bad")
    if report.command == "diagnose" and report.collapse is None:
        return Note("Nothing to diagnose: the model has no linear layer that could be shifted.", "bad")
    if proof is None:
        return Note("No model was written, and no output was compared.") if report.command == "shift" else None
    samples = max((output.samples for output in proof.outputs), default=0)
    if not proof.passed:
        failed = ", ".join(printed.name for printed in proof.outputs if not printed.passed)
        return Note(f"FAILED: not within bounds on {samples} samples: {failed or 'no output was compared'}.", "bad")
    if report.command == "verify":
        return Note(f"The outputs match within their bounds on {samples} samples.", "good")
    if proof.identical_bytes:
        return Note("The file is a byte-for-byte copy of the original.", "good")
    what = "the written file" if report.model.output else "the shifted model (not written)"
    return Note(f"Verified: {what} was run on {samples} samples, every output within its bound.", "good")


def _worst_output(outputs: Iterable[OutputComparison], *, judged: bool) -> Fact:
    worst = max(outputs, key=lambda output: (math.isnan(output.rel), output.rel))
    words = {"noise": "allowed by noise", "tolerance": "allowed", "measured": "measured on the trial"}
    remark = f"{words[worst.bound_kind]}: {number(worst.bound)}" if judged else "reported only"
    agreed = [output.top1_agreement for output in outputs if output.top1_agreement is not None]
    # Nobody must read "within its bound" as "the same" where answers changed.
    remark += f"; same answer on {100 * min(agreed):.2f} %" if agreed else ""
    return Fact("output deviation", worst.rel, remark)


def _by_bits(report: Report) -> dict[int, list[tuple[float, float]]]:
    found: dict[int, list[tuple[float, float]]] = {}
    for row in report.quantization or ():
        found.setdefault(row.bits, []).append((row.error_before, row.error_after))
    return found


def _layers(report: Report) -> Section | None:
    layers = candidates(report)
    reasons = list(dict.fromkeys(layer.reason for layer in layers if layer.reason not in {"", layer.status}))
    is_shifted = any(layer.status == "shifted" for layer in layers)
    columns = (
        *(Column("layer"), Column("operator", detail=True)),
        *figures("d x m", "rank/d", headline_name(report), *(["residual"] if is_shifted else [])),
        Column("status"),
    )
    rows: list[tuple[Cell, ...]] = []
    for layer in layers:
        shape = f"{'?' if layer.d is None else layer.d} x {'?' if layer.m is None else layer.m}"
        shape = f"{layer.groups} of {shape}" if layer.groups is not None and layer.groups > 1 else shape
        uses = f", {len(layer.uses)} uses" if len(layer.uses) > 1 else ""
        known = headline(layer)
        rows.append((
            Name(layer.name),
            f"{layer.op_type}{f', {layer.dtype}' if layer.dtype else ''}{uses}",
            shape,
            None if layer.rank is None else f"{layer.rank}/{'?' if layer.d is None else layer.d}",
            None if known is None else Change(known.before, known.after),
            *([layer.measured_residual if layer.status == "shifted" else None] if is_shifted else []),
            Word(layer.status, f"[{reasons.index(layer.reason) + 1}]" if layer.reason in reasons else ""),
        ))
    note = (
        "d x m: inputs and outputs. Rank: input directions that the data uses; the rest are free."
        + " Residual: relative change of the layer's own output." * is_shifted
    )
    blocks: list[Block] = []
    if rows:
        blocks = [Table(columns, tuple(rows), note=note), ChartOf("headline"), ChartOf("spectrum")]
    why = [Facts(tuple(Fact(f"[{k}]", reason) for k, reason in enumerate(reasons, 1)), "Why")] if reasons else []
    by_reason: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.status == "skipped":
            by_reason.setdefault(layer.reason, []).append(layer.name)
    skips = tuple(Fact(f"{len(names)} skipped", Names(tuple(names)), reason) for reason, names in by_reason.items())
    return Section("layers", "Layers", (*blocks, *why, *([Facts(skips, "Left alone")] if skips else [])))


def _frontier(report: Report) -> Section | None:
    points = frontier_points(report)
    if not points or report.command == "verify":
        return None
    columns = figures("layer residual", "mean left", "least left", "most left")
    rows: list[tuple[Cell, ...]] = [
        ("exact" if tolerance == 0 else f"{tolerance:g}", *map(Percent, shares)) for tolerance, shares in points
    ]
    note = f"{headline_name(report).capitalize()} of a layer as a share of the original's, from statistics only."
    table = Table(columns, tuple(rows), note=note)
    return Section("frontier", "What a tolerance would buy", (table, ChartOf("frontier")))


def _decisions(report: Report) -> Section | None:
    return Section("decisions", "How it was decided", tuple(map(Note, report.decisions))) if report.decisions else None


def _run(report: Report) -> Section:
    model, timing, tool = report.model, report.timing, report.tool
    shown = [Fact("device", report.device.note or f"{report.device.capture}, {report.device.solve}")]
    shown += _data("calibration", report.calibration) + (_data("held-out", report.heldout) if report.heldout else [])
    stages = f"capture {timing.capture:.1f}, solve {timing.solve:.1f}, verify {timing.verify:.1f}"
    shown.append(Fact("time", f"{timing.total:.1f} s", stages))
    if report.peak_memory_bytes:
        shown.append(Fact("peak memory", f"{report.peak_memory_bytes / 2**20:.0f} MiB"))
    details = [Fact("command", tool.command), Fact("finished", f"{tool.finished} (UTC)")] if tool.command else []
    details += [Fact("original", model.input), Fact("sha256", model.sha256_in)]
    details += [Fact("written", model.output or "nothing"), Fact("sha256", model.sha256_out)]
    details.append(Fact("opset, IR version", f"{model.opset}, {model.ir_version}"))
    for label, data in (("calibration", report.calibration), ("held-out", report.heldout)):
        details += [Fact(f"{label} fingerprint", data.fingerprint)] if data is not None else []
    versions = tuple(Fact(f.name, getattr(tool, f.name)) for f in fields(tool) if f.name not in {"command", "finished"})
    settings = tuple(Fact(key.replace("_", " "), _setting(value)) for key, value in report.settings.items())
    blocks = (Facts(tuple(shown)), Facts(tuple(details), "To repeat it", detail=True))
    return Section("run", "This run", (*blocks, Facts(versions, "Versions", True), Facts(settings, "Settings", True)))


def _data(label: str, data: DataInfo | None) -> list[Fact]:
    if data is None:
        return [Fact(label, "none")]
    count = f"{data.samples} {'sample' if data.samples == 1 else 'samples'}"
    count += f", {data.classes} classes" if data.classes is not None else ""
    count += ", random inputs" if data.synthetic else ""
    source = "split off the calibration data; the final solve covers them too" if data.split else data.source
    return [Fact(label, f"{count}, {source}"), *(Fact("", note) for note in data.notes)]


def _setting(value: object) -> str | float | bool | None:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or None
    return value if value is None or isinstance(value, bool) else str(value)
