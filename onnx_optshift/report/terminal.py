"""The report for people: a table of layers, the proof, the gate, and one sentence that says how it went.

Text from the model is printed as it is, never as markup, and control characters in it are shown as escapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_optshift.report.model import DataInfo, HeldoutResult, LayerReport, NoiseFloor, OutputComparison, Report

STYLES = {"shifted": "green", "rejected": "yellow"}
# Fewer columns than this cannot tell layers of one network apart.
NARROWEST_NAME = 16
# Names listed for one reason to skip before the rest is only counted; the JSON report has them all.
NAMES_PER_REASON = 3


def render(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Prints the report of a run, or of a comparison of two models.

    Args:
        report: What to print.
        console: Where to; its width decides how names are shortened.
        verbose: Also every candidate that held-out data judged, and every skipped name.
    """
    _head(report, console)
    _layers(report, console, verbose)
    rows = _verification_rows(report) + _heldout_rows(report.heldout_result, verbose)
    rows += _drift_rows(report.drift) + _quantization_rows(report)
    rows += [("decided", note) for note in report.decisions] + _frontier_rows(report)
    rows.append(("time", _timing(report)))
    facts(console, rows)
    _tail(report, console)


def render_inspect(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Prints what an inspection found: layers, the freedom that the data leaves them, and skips with reasons.

    Args:
        report: What to print.
        console: Where to.
        verbose: Also every skipped name.
    """
    _head(report, console)
    _layers(report, console, verbose)
    facts(console, _frontier_rows(report))
    _tail(report, console)


def middle_elided(name: str, width: int) -> str:
    """A name cut in the middle to at most `width` characters: both ends tell layers apart, the middle seldom does."""
    if len(name) <= width:
        return name
    kept = max(width - 3, 2)
    tail = kept // 2
    return f"{name[: kept - tail]}...{name[-tail:]}"[: max(width, 1)]


def printable(text: str) -> str:
    """The text with control characters as escapes: a model may not move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _head(report: Report, console: Console) -> None:
    model = report.model
    title = f"{model.input} -> {model.output}" if model.output else model.input
    rows = [("model", f"{title} (opset {_count(model.opset)}, onnx-optshift {report.tool.version})")]
    rows.append(("device", report.device.note or f"{report.device.capture}, {report.device.solve}"))
    rows.append(("calibration", _data(report.calibration) if report.calibration else "none"))
    if report.heldout:
        rows.append(("held-out", _data(report.heldout)))
    facts(console, rows)


def _data(data: DataInfo) -> str:
    count = f"{data.samples} {'sample' if data.samples == 1 else 'samples'}"
    classes = f", {data.classes} classes" if data.classes else ""
    if data.split:
        return f"{count}{classes}, split off the calibration data to judge; the final solve covers them too"
    return ". ".join([f"{count}{classes}, {data.source}", *data.notes])


def _layers(report: Report, console: Console, verbose: bool) -> None:
    candidates = [layer for layer in report.layers if layer.status != "skipped"]
    by_range = report.settings.get("objective") == "range"
    reasons = list(dict.fromkeys(layer.reason for layer in candidates if _tells(layer)))
    if candidates:
        cells = [_cells(layer, by_range, reasons) for layer in candidates]
        header = ("layer", "d x m", "rank/d", "range" if by_range else "norm", "residual", "status")
        widths = [max(len(row[k]) for row in [header, *cells]) for k in range(1, len(header))]
        # Two columns of padding and a divider for each cell; what is left over is the name's.
        room = max(NARROWEST_NAME, console.width - sum(widths) - 3 * len(header))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        for k, title in enumerate(header):
            table.add_column(title, no_wrap=True, justify="left" if k in {0, 5} else "right")
        for layer, row in zip(candidates, cells, strict=True):
            name = Text(middle_elided(row[0], room))
            table.add_row(name, *map(Text, row[1:-1]), Text(row[-1], style=STYLES.get(layer.status, "")))
        console.print()
        console.print(table)
    rows = [(f"[{k}]", reason) for k, reason in enumerate(reasons, 1)]
    facts(console, rows + _skip_rows(report.layers, None if verbose else NAMES_PER_REASON))


def _cells(layer: LayerReport, by_range: bool, reasons: list[str]) -> tuple[str, ...]:
    shape = f"{_count(layer.d)} x {_count(layer.m)}"
    if layer.groups is not None and layer.groups > 1:
        shape = f"{layer.groups} of {shape}"
    rank = f"{layer.rank}/{_count(layer.d)}" if layer.rank is not None else "-"
    before, after = (layer.range_before, layer.range_after) if by_range else (layer.norm_before, layer.norm_after)
    if before is None or after is None:
        change = "-"
    else:
        change = _figure(before) if before == after else f"{_figure(before)} -> {_figure(after)}"
    residual = _figure(layer.measured_residual, 2) if layer.status == "shifted" else "-"
    mark = f" [{reasons.index(layer.reason) + 1}]" if _tells(layer) else ""
    return (printable(layer.name), shape, rank, change, residual, layer.status + mark)


def _tells(layer: LayerReport) -> bool:
    """Whether the reason says more than the status."""
    return layer.reason not in {"", layer.status}


def _skip_rows(layers: Iterable[LayerReport], most: int | None) -> list[tuple[str, str]]:
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        if layer.status == "skipped":
            by_reason.setdefault(layer.reason, []).append(layer.name)
    rows = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:most])
        more = f" and {len(names) - most} more" if most is not None and len(names) > most else ""
        rows.append((f"skipped {len(names)}", f"{reason} ({shown}{more})"))
    return rows


def _verification_rows(report: Report) -> list[tuple[str, str]]:
    proof = report.verification
    if proof is None:
        return []
    rows = [("verified" if proof.passed else "FAILED", _output(output)) for output in proof.outputs]
    if proof.noise_floor is not None:
        rows.append(("noise floor", _noise(proof.noise_floor)))
    elif proof.identical_bytes:
        rows.append(("verified", "a byte-for-byte copy: nothing to run"))
    if proof.reverted:
        rows.append(("put back", ", ".join(proof.reverted)))
    return rows


def _output(output: OutputComparison) -> str:
    top1 = "" if output.top1_agreement is None else f", top-1 agreement {_percent(output.top1_agreement)}"
    kept = "" if output.passed else ": NOT within its bounds"
    return (
        f"{output.name}: relative {_figure(output.rel, 2)} of {_figure(output.bound, 2)} allowed, largest of a sample "
        f"{_figure(output.max_rel, 2)}, absolute {_figure(output.max_abs, 2)}{top1}, {output.samples} samples{kept}"
    )


def _noise(noise: NoiseFloor) -> str:
    parts = [f"relative {_figure(noise.rel, 2)}, largest of a sample {_figure(noise.max_rel, 2)}"]
    if noise.rounding is not None:
        parts.append(f"weights moved by one rounding {_figure(noise.rounding, 2)}")
    if noise.other_batch_size is not None:
        parts.append(f"one sample at a time {_figure(noise.other_batch_size, 2)}, not part of it")
    return f"{'; '.join(parts)} ({', '.join(noise.runs)}, batch size {noise.batch_size})"


def _heldout_rows(result: HeldoutResult | None, verbose: bool) -> list[tuple[str, str]]:
    if result is None:
        return []
    before, after = result.before, result.after
    top1 = f", top-1 {_percent(before.top1)} -> {_percent(after.top1)}" if before.top1 is not None else ""
    verdict = "accepted" if result.accepted else "no shift was accepted"
    text = f"{result.loss_name} {_figure(before.loss, 4)} -> {_figure(after.loss, 4)}{top1}, {after.n} samples: "
    rows = [("judged", text + verdict)]
    if verbose:
        for trial in result.tried:
            top1 = f", top-1 {_percent(trial.top1)}" if trial.top1 is not None else ""
            found = f"{trial.what}: {result.loss_name} {_figure(trial.loss, 4)}{top1}"
            change = f"change {_figure(trial.mean_difference, 2)} +- {_figure(trial.standard_error, 2)}"
            rows.append(("accepted" if trial.accepted else "refused", f"{found}, {change}: {trial.reason}"))
    return rows


def _drift_rows(drift: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the changes mean for the data, layer by layer, and beside it for the baseline."""
    if drift is None or not drift["layers"]:
        return []
    beside = {layer["name"]: layer for layer in drift["baseline"] or ()}
    rows = []
    for layer in drift["layers"]:
        shares = ", ".join(f"{share:.2g} at {float(q):.0%}" for q, share in layer["quantiles"].items())
        worst = ", ".join(str(number) for number, _ in layer["worst"])
        calm = beside.get(layer["name"])
        known = f"; baseline {calm['quantiles'][str(drift['quantile'])]:.2g}" if calm else ""
        rows.append(("drift", f"{layer['name']}: share of a sample's output {shares}{known}; worst samples {worst}"))
    limit = "" if drift["limit"] is None else f", allowed {drift['limit']:.3g}"
    rows.append(("drift", f"{drift['figure']:.3g} at {drift['quantile']:.0%} of the samples{limit}"))
    return rows


def _quantization_rows(report: Report) -> list[tuple[str, str]]:
    """Errors under round-to-nearest, a geometric mean over layers for each bit width; the JSON report has them all."""
    rows = []
    found = report.quantization or ()
    for bits in dict.fromkeys(entry["bits"] for entry in found):
        pairs = [(e["error_before"], e["error_after"]) for e in found if e["bits"] == bits]
        usable = [(before, after) for before, after in pairs if before > 0 and after > 0]
        if usable:
            means = [math.exp(sum(math.log(pair[k]) for pair in usable) / len(usable)) for k in (0, 1)]
            worse = sum(after > before for before, after in pairs)
            change = f"{means[0]:.3g} -> {means[1]:.3g} ({means[1] / means[0]:.2f}x), worse in {worse}"
            rows.append(("quantized", f"{bits} bits, output error of a layer, mean of {len(usable)}: {change}"))
    return rows


def _frontier_rows(report: Report) -> list[tuple[str, str]]:
    """What a tolerance would buy, over all layers: the norm as the root of summed squares, the range as the mean."""
    layers = [layer for layer in report.layers if layer.frontier and layer.norm_before]
    by_range = report.settings.get("objective") == "range"
    whole = math.fsum((layer.norm_before or 0.0) ** 2 for layer in layers)
    if not layers or not whole:
        return []
    parts = []
    for k, point in enumerate(layers[0].frontier):
        points = [layer.frontier[k] for layer in layers if len(layer.frontier) > k]
        ratios = [p.range_ratio if by_range else p.norm_ratio for p in points]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) < len(layers):
            continue
        if by_range:
            share = math.fsum(known) / len(known)
        else:
            squares = ((r * (layer.norm_before or 0.0)) ** 2 for r, layer in zip(known, layers, strict=True))
            share = math.sqrt(math.fsum(squares) / whole)
        parts.append(f"{_figure(share)} at {point.tolerance:g}")
    if not parts:
        return []
    what = "mean range" if by_range else "norm of all weights"
    return [("frontier", f"{what}, as a share of the original's, at a layer residual: {', '.join(parts)}")]


def _timing(report: Report) -> str:
    timing = report.timing
    stages = f"capture {timing.capture:.1f}, solve {timing.solve:.1f}, verify {timing.verify:.1f}"
    peak = f", peak memory {report.peak_memory_bytes / 2**20:.0f} MiB" if report.peak_memory_bytes else ""
    return f"{timing.total:.1f} s ({stages}){peak}"


def _tail(report: Report, console: Console) -> None:
    console.print()
    for warning in report.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))
    console.print(Text(printable(report.summary), style="bold"))


def facts(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """A blank line and labelled lines; long ones wrap beside their label, and inside a word if it must be."""
    if not rows:
        return
    console.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, min_width=11)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(label, style="dim"), Text(printable(text)))
    console.print(grid)


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)
