"""What a report says, section by section: what was asked for and what came out first, then the grounds for it.

A pure function of the report. To show a new figure, add it to the model, measure it, and name it here; one of a layer
has the same name in the model and where it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from onnx_optshift.report.figures import (
    NOTHING,
    Cell,
    Figure,
    Name,
    Word,
    change,
    drawn,
    finite,
    mean_change,
    number,
    percent,
    share_change,
)
from onnx_optshift.report.model import LayerReport, Report
from onnx_optshift.report.run_info import CheckpointInfo, DataInfo
from onnx_optshift.report.section import Fact, Facts, Note, Section, Table, explained, marks
from onnx_optshift.report.sections_diagnose import conditions, features, flatness, ranks
from onnx_optshift.report.sections_evidence import drift, heldout, outputs, quantization, worst_output

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


def sections(report: Report) -> list[Section]:
    """All sections that the report has something for, in the order of reading."""
    found = (
        _result(report),
        conditions(report.collapse),
        outputs(report),
        heldout(report),
        drift(report.drift),
        quantization(report.quantization or ()),
        _layers(report),
        ranks(report.collapse),
        features(report.collapse),
        flatness(report.flatness),
        _frontier(report),
        Section("decisions", "How it was decided", [Note(decision) for decision in report.decisions]),
        _run(report),
    )
    known = [section.known for section in found if section is not None]
    return [section for section in known if section.blocks]


def title(report: Report) -> str:
    """The kind of report and what it is about, in one line."""
    model = report.model
    return f"{KINDS[report.command]}: {f'{model.input} -> {model.output}' if model.output else model.input}"


def candidates(report: Report) -> list[LayerReport]:
    """The layers that are not skipped, in the order of the report."""
    return [layer for layer in report.layers if layer.status != "skipped"]


def headline_name(report: Report) -> str:
    """What the figure is called that was to become small."""
    return next((layer.headline.name for layer in candidates(report) if layer.headline), "norm")


def _result(report: Report) -> Section:
    layers, result, proof, collapse = candidates(report), report.heldout_result, report.verification, report.collapse
    rows = [Fact("verdict", Word(collapse.verdict.answer), collapse.verdict.why)] if collapse else []
    for score in result.quantized if result else ():
        rows.append(Fact(f"output error, {score.bits} bits", change(score.before, score.after), "held-out data"))
    errors = report.quantization or ()
    for bits in dict.fromkeys(error.bits for error in errors):
        pairs = [(error.error_before, error.error_after) for error in errors if error.bits == bits]
        if mean := mean_change(pairs):
            worse = sum(after > before for before, after in pairs)
            rows.append(Fact(f"layer error, {bits} bits", mean[0], f"mean of {mean[1]} layers; worse in {worse}"))
    moved = mean_change((layer.headline.before, layer.headline.after) for layer in layers if layer.headline)
    if moved and report.command == "shift":
        rows.append(Fact(headline_name(report), moved[0], f"mean of {moved[1]} layers"))
    rows.append(_counted(report, layers))
    if proof is not None and proof.outputs:
        rows.append(worst_output(proof.outputs, judged=report.judges_outputs))
    if report.drift is not None:
        limit = report.drift.limit
        rows.append(Fact("drift", report.drift.figure, "" if limit is None else f"allowed: {number(limit)}"))
    if result is not None:
        before, after, kind = result.before, result.after, " in float" if result.quantized else ""
        rows.append(Fact(f"held-out loss{kind}", change(before.loss, after.loss), f"{after.n} samples"))
        if before.top1 is not None and after.top1 is not None:
            rows.append(Fact(f"held-out accuracy{kind}", share_change(before.top1, after.top1)))
    return Section("result", "Result", [Note(f"Asked for: {_asked(report)}."), *_status(report), Facts(rows)])


def _counted(report: Report, layers: Sequence[LayerReport]) -> Fact:
    skipped = len(report.layers) - len(layers)
    label = {"shift": "layers shifted", "verify": "layers that differ"}.get(report.command, "layers with freedom")
    free = sum(bool(layer.free) for layer in layers)
    shifted = sum(layer.status == "shifted" for layer in layers)
    count = shifted if report.command in {"shift", "verify"} else free
    return Fact(label, f"{count} of {len(layers)}", f"{skipped} more skipped" if skipped else "")


def _asked(report: Report) -> str:
    settings = report.settings
    if report.command == "verify" and report.drift is not None and report.drift.limit is not None:
        return f"whether the data drifts by more than {number(report.drift.limit)}"
    if report.command != "shift":
        return _ASKED[report.command]
    tolerance = settings.get("tolerance", 0.0)
    bits = settings.get("quantization_bits")
    best = "rounded weights as close as each layer allows" if bits else "the deviation that serves held-out data best"
    asked = {"auto": best, 0.0: "the same outputs on calibration data"}
    parts = [asked.get(tolerance) or f"outputs within {tolerance:g} on calibration data"]
    if (batch := settings.get("stochastic")) is not None:
        parts[0] += f", for a batch of {batch} samples" if batch else ", for a batch that held-out data chooses"
    parts.append(f"objective {settings.get('objective', 'norm')}")
    if bits:
        parts.append(f"to be quantized to {', '.join(map(str, bits))} bits")
    return "; ".join(parts)


def _status(report: Report) -> Iterator[Note]:
    """How the question was answered."""
    drift, proof = report.drift, report.verification
    if drift is not None and drift.limit is not None:
        share = f"{number(drift.figure)} at {drift.quantile:.0%} of the samples, allowed {number(drift.limit)}"
        yield Note(f"The drift {'passed' if drift.passed else 'FAILED'}: {share}.", "good" if drift.passed else "bad")
    elif proof is not None and proof.passed and proof.identical_bytes:
        yield Note("The file is a byte-for-byte copy of the original.", "good")
    elif proof is not None:
        samples = max((output.samples for output in proof.outputs), default=0)
        failed = ", ".join(output.name for output in proof.outputs if not output.passed) or "no output was compared"
        shifted = "the written file" if report.model.output else "the shifted model (not written)"
        what = "the second model" if report.command == "verify" else shifted
        bound = any(output.bound_kind != "measured" for output in proof.outputs)
        found = "every output within its bound" if bound else "to measure its deviation; no bound was set"
        good = f"Verified: {what} was run on {samples} samples, {found}."
        bad = f"FAILED: not within bounds on {samples} samples: {failed}."
        yield Note(good, "good") if proof.passed else Note(bad, "bad")


def _layers(report: Report) -> Section:
    layers, name = candidates(report), headline_name(report)
    marked = marks(layer.reason for layer in layers if layer.reason not in {"", layer.status})
    rows: list[list[Cell]] = []
    for layer in layers:
        d, m = ("?" if width is None else width for width in (layer.d, layer.m))
        groups = f"{layer.groups} of " if (layer.groups or 1) > 1 else ""
        operator = f"{layer.op_type}, {layer.dtype}" if layer.dtype else layer.op_type
        rows.append([
            Name(layer.name),
            f"{operator}, {len(layer.uses)} uses" if len(layer.uses) > 1 else operator,
            Figure(f"{groups}{d} x {m}"),
            _rank(layer),
            change(layer.headline.before, layer.headline.after) if layer.headline else None,
            layer.measured_residual if layer.status == "shifted" else None,
            percent(layer.top_row_share) if report.command == "inspect" else None,
            Word(f"{layer.status} {marked.get(layer.reason, '')}".rstrip()),
        ])
    titles = ["layer", "operator", "d x m", "rank/d", name, "residual", "largest rows", "status"]
    note = (
        "d x m: inputs and outputs. Rank: input directions that the data uses, over all groups; the rest are free. A "
        "line shows how strongly it uses them, strongest first, on a logarithmic scale down to 1e-6 of the strongest, "
        "with the rank dashed: a cliff there means that rank and freedom are clear-cut, a slope that they would change "
        "with the data. Residual: relative change of the layer's own output. Largest rows: share of the output's "
        "energy in 1 % of the rows; far above 1 %, errors must count relative to each row, as --row-weighting relative "
        "has it."
    )
    by_reason: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.status == "skipped":
            by_reason.setdefault(layer.reason, []).append(layer.name)
    skips = [Fact(f"{len(names)} skipped", tuple(names), reason) for reason, names in by_reason.items()]
    table = Table(titles, rows, note=note, more="operator", drawn=name)
    return Section("layers", "Layers", [table, explained(marked, "Why"), Facts(skips, "Left alone")])


def _rank(layer: LayerReport) -> Cell:
    """The rank, with the spectrum where that has an end to look at."""
    if layer.rank is None or layer.d is None:
        return layer.rank
    whole = layer.d * (layer.groups or 1)  # of groups together: of most of them, some may have none
    used = layer.rank if layer.free is None else whole - layer.free
    curve = layer.spectrum if used < whole and finite(*layer.spectrum) else ()
    return drawn(f"{used}/{whole}", curve=curve, mark=used / whole)


def _frontier(report: Report) -> Section | None:
    """The objective's own path: per residual tolerance, what is left of its figure; none unless all layers have one."""
    paths = [layer.frontier for layer in candidates(report) if layer.headline]
    rows: list[list[Cell]] = []
    for column in zip(*paths, strict=False):
        ratios = [point.norm_ratio for point in column if point.norm_ratio is not None and finite(point.norm_ratio)]
        if len(ratios) == len(column):
            shares = (math.fsum(ratios) / len(ratios), min(ratios), max(ratios))
            tolerance = f"{column[0].tolerance:g}" if column[0].tolerance else "exact"
            rows.append([Figure(tolerance), *map(percent, shares)])
    if not rows or report.command == "verify":
        return None
    name = headline_name(report).capitalize()
    note = f"{name} as a share of the original's, over {len(paths)} layers; from statistics only."
    titles = ["layer residual", "mean left", "least left", "most left"]
    return Section("frontier", "What a tolerance would buy", [Table(titles, rows, note=note, drawn="mean left")])


def _run(report: Report) -> Section:
    timing, memory, device = report.timing, report.peak_memory_bytes, report.device
    judged = f" (of it judging {timing.judge:.1f})" if timing.judge else ""
    stages = f"capture {timing.capture:.1f}, solve {timing.solve:.1f}{judged}, verify {timing.verify:.1f}"
    predicted = report.predicted_memory_bytes
    planned = f"predicted {predicted / 2**20:.0f} MiB" if predicted else ""
    rows = [
        Fact("device", device.note or f"{device.capture}, {device.solve}"),
        *_data("calibration", report.calibration),
        *(_data("held-out", report.heldout) if report.heldout else []),
        *([_checkpoint(report.checkpoint)] if report.checkpoint else []),
        Fact("time", f"{timing.total:.1f} s", stages),
        Fact("peak memory", f"{memory / 2**20:.0f} MiB" if memory else None, planned),
    ]
    digests = {
        f"{label} fingerprint": data.fingerprint if data else None
        for label, data in (("calibration", report.calibration), ("held-out", report.heldout))
    }
    to_repeat = Facts(_listed(asdict(report.model) | digests | asdict(report.tool)), "To repeat it", detail=True)
    settings = Facts(_listed(report.settings), "Settings", detail=True)
    return Section("run", "This run", [Facts(rows), to_repeat, settings])


def _checkpoint(found: CheckpointInfo) -> Fact:
    """What was taken from former runs, and what of them was not used, with the reason."""
    taken = (
        f"{found.used} finished or begun parts of the work taken from {found.folder}" if found.used else "nothing taken"
    )
    said = [f"not used: {'; '.join(found.rejected)}"] if found.rejected else []
    return Fact("checkpoint", f"{taken}, {found.saved} added", "; ".join([*said, found.failed or ""]).rstrip("; "))


def _data(label: str, data: DataInfo | None) -> list[Fact]:
    if data is None:
        return [Fact(label, "none")]
    count = f"{data.samples} {'sample' if data.samples == 1 else 'samples'}"
    count += f", {data.classes} classes" if data.classes is not None else ""
    count += ", random inputs" if data.synthetic else ""
    source = "split off the calibration data; the final solve covers them too" if data.split else data.source
    return [Fact(label, f"{count}, {source}"), *(Fact("", note) for note in data.notes)]


def _listed(values: Mapping[str, Any]) -> list[Fact]:
    """Names and values, as they were given."""
    rows = []
    for name, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        rows.append(Fact(name.replace("_", " "), NOTHING if shown in {None, ""} else str(shown)))
    return rows
