"""A diagnosis for people: the verdict and its checklist, ranks, neural collapse and flatness.

Text from the model is printed as it is, never as markup, and control characters in it are shown as escapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_optshift.report.diagnosis import FAIL, GO, NO_GO, PASS, TRY_SMALL, WARN
from onnx_optshift.report.model import Report
from onnx_optshift.report.terminal import facts, middle_elided, printable

STYLES = {PASS: "green", WARN: "yellow", FAIL: "red", GO: "bold green", TRY_SMALL: "bold yellow", NO_GO: "bold red"}
NAME_WIDTH = 28


def render_diagnose(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Prints a diagnosis.

    Args:
        report: With `flatness` or `collapse`.
        console: Where to.
        verbose: Also the samples of each class.
    """
    model = report.model
    rows = [("model", f"{model.input} (opset {model.opset}, onnx-optshift {report.tool.version})")]
    rows.append(("device", report.device.note or f"{report.device.capture}, {report.device.solve}"))
    for label, data in (("calibration", report.calibration), ("held-out", report.heldout)):
        if data is not None:
            classes = f", {data.classes} classes" if data.classes else ""
            rows.append((label, f"{data.samples} samples{classes}, {data.source}"))
    facts(console, rows)
    conditions = report.collapse or {}
    _ranks(conditions.get("layers") or (), console)
    _collapse(conditions.get("features"), console, verbose)
    if report.flatness is not None:
        render_flatness(report.flatness, console)
    console.print()
    for warning in report.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))
    _verdict(conditions.get("verdict"), console)


def _verdict(verdict: Mapping[str, Any] | None, console: Console) -> None:
    if verdict is None:
        console.print(Text("nothing to shift: the model has no linear layer that can be", style=STYLES[NO_GO]))
        return
    table = _table(("check", "", "figure", "what to do"), right=())
    for check in verdict["checks"]:
        status = Text(check["status"], style=STYLES.get(check["status"], ""))
        table.add_row(check["name"], status, Text(printable(check["figure"])), Text(printable(check["advice"])))
    console.print(table)
    console.print()
    console.print(Text(f"{verdict['answer']}: ", style=STYLES.get(verdict["answer"], "")), end="")
    console.print(Text(printable(verdict["why"])))


def _ranks(layers: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not layers:
        return
    table = _table(("layer", "d", "rows", "rank", "needed", "effective", "stable"), right=range(1, 7))
    for layer in layers:
        counts = (str(layer[key]) for key in ("d", "rows", "rank", "needed"))
        table.add_row(_name(layer["name"]), *counts, f"{layer['effective']:.1f}", f"{layer['stable']:.1f}")
    console.print()
    console.print(table)


def _collapse(features: Mapping[str, Any] | None, console: Console, verbose: bool) -> None:
    if features is None:
        return
    parts = [
        f"NC1 (within classes) {_figure(features['nc1'])}",
        f"NC2 norms {_figure(features['nc2_norms'])}, angles {_figure(features['nc2_angles'])}",
    ]
    if features["nc3"] is not None:
        parts.append(f"NC3 (classifier against means) {_figure(features['nc3'])}")
    if features["nc4"] is not None:
        parts.append(f"NC4 (not the nearest mean) {100 * features['nc4']:.2f} %")
    rows = [("collapse", f"input of {features['layer']}, 0 is full collapse: {'; '.join(parts)}")]
    if verbose:
        rows.append(("per class", ", ".join(f"{label}: {count}" for label, count in features["counts"].items())))
    facts(console, rows)


def render_flatness(flatness: Mapping[str, Any], console: Console) -> None:
    """Prints the report's `flatness`: a table of traces, and sharpness and eigenvalue below it."""
    compared = flatness["loss_after"] is not None
    titles = ("layer", "trace", "after", "change", "relative", "after") if compared else ("layer", "trace", "relative")
    table = _table(titles, right=range(1, len(titles)))
    for layer in flatness["layers"]:
        cells = [*_compared(layer["trace"], compared), *_sides(layer["relative"], compared)]
        table.add_row(_name(layer["name"]), *cells)
    total = _compared(flatness["trace"], compared)
    table.add_row(Text("total", style="bold"), *total, *[""] * (len(titles) - 1 - len(total)))
    console.print()
    console.print(table)
    change = f" -> {_figure(flatness['loss_after'], 4)}" if compared else ""
    rows = [
        (
            "flatness",
            f"{flatness['loss']} {_figure(flatness['loss_before'], 4)}{change} on {flatness['samples']} samples; "
            f"{flatness['probes']} probes for each layer, noise of the loss {_figure(flatness['noise'], 2)}",
        )
    ]
    sharp = [f"{' -> '.join(_sides(s['rise'], compared))} at {s['sigma']:g}" for s in flatness["sharpness"]]
    if sharp:
        rows.append(("sharpness", f"rise of the loss under noise of this share of each filter: {', '.join(sharp)}"))
    tops = [top for top in (flatness["top_before"], flatness["top_after"]) if top is not None]
    if tops:
        text = " -> ".join(f"{_figure(top['lower'])} to {_figure(top['upper'])}" for top in tops)
        rows.append(("eigenvalue", f"largest of the Gauss-Newton matrix, bracketed: {text}"))
    facts(console, rows)


def _sides(figure: Mapping[str, Any], compared: bool) -> list[str]:
    return [_figure(figure[side]["value"]) for side in (("before", "after") if compared else ("before",))]


def _compared(figure: Mapping[str, Any], compared: bool) -> list[str]:
    """Both sides and their difference, whose error alone says whether there is one."""
    if not compared:
        return [_estimate(figure["before"])]
    return [*_sides(figure, compared), _estimate(figure["change"])]


def _estimate(estimate: Mapping[str, Any]) -> str:
    error = "" if estimate["error"] is None else f" ± {_figure(estimate['error'], 2)}"
    return f"{_figure(estimate['value'])}{error}"


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _name(name: str) -> Text:
    return Text(middle_elided(printable(name), NAME_WIDTH))


def _table(titles: Sequence[str], *, right: Iterable[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    justified = set(right)
    for k, title in enumerate(titles):
        # Numbers never wrap: names give way, in their middle.
        table.add_column(title, justify="right" if k in justified else "left", no_wrap=k in justified)
    return table
