"""The report's charts: which figures they need, what they show and what they say to those who cannot see them.

A chart is drawn only where it says more than the tables do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onnx_optshift.report.diagnosis import FlatnessReport
from onnx_optshift.report.figures import finite, number, printable, relative_change, typeset
from onnx_optshift.report.model import HeldoutResult, LayerReport, QuantizationError, Report
from onnx_optshift.report.sections import candidates, frontier_points, headline, headline_name
from onnx_optshift.report.svg import COLOURS, drawing, tip, to_svg

_LONGEST_NAME = 22  # characters of a layer's name beside a bar
# More layers than this are told apart by their numbers only.
_MOST_NAMED = 16
_MOST_PANELS = 6
# Marker, colour and size of a trial.
_TRIALS = {"accepted": ("o", "after", 5.0), "rejected": ("X", "bad", 6.0), "chosen": ("*", "good", 13.0)}
_ROUND = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 3)]


@dataclass(frozen=True)
class Chart:
    """One drawing: `svg` is an element with a text alternative, safe to put into a page."""

    key: str  # once on a page
    title: str
    caption: str  # what it shows and how to read it
    svg: str


def charts(report: Report) -> dict[str, Chart]:
    """All charts that the report has figures for, by key."""
    layers, errors = candidates(report), report.quantization or ()
    drawn = [_headline(layers), _spectrum(layers), _frontier(report), _heldout(report.heldout_result)]
    drawn += [_quantization(bits, errors) for bits in dict.fromkeys(error.bits for error in errors)]
    drawn.append(_flatness(report.flatness))
    return {chart.key: chart for chart in drawn if chart is not None}


def _headline(layers: Sequence[LayerReport]) -> Chart | None:
    known = [(layer.name, figure) for layer in layers if (figure := headline(layer))]
    if all(figure.before == figure.after for _, figure in known):
        return None
    name = known[0][1].name
    rows = [(layer, figure.before, figure.after) for layer, figure in known]
    return _pairs("headline", f"{name.capitalize()} of each layer, before and after", f"{name} of the weight", rows)


def _quantization(bits: int, errors: Sequence[QuantizationError]) -> Chart | None:
    rows = [(error.layer, 100 * error.error_before, 100 * error.error_after) for error in errors if error.bits == bits]
    title = f"Error of each layer at {bits} bits, before and after"
    return _pairs(f"quantization-{bits}", title, "error of the layer's output, %", rows)


def _pairs(key: str, title: str, unit: str, found: Sequence[tuple[str, float, float]]) -> Chart | None:
    """Two bars for each layer, named where there is room."""
    rows = [(name, before, after) for name, before, after in found if finite(before, after)]
    if not rows:
        return None
    named = len(rows) <= _MOST_NAMED
    largest = max(max(before, after) for _, before, after in rows) or 1.0
    with drawing(min(1.1 + 0.3 * len(rows), 5.6)) as (figure, (axes,)):
        for y, (name, before, after) in enumerate(rows):
            # Beside each other where there is room for two bars, else the shorter one in front of the longer.
            for side, value, place in (("before", before, -0.19), ("after", after, 0.19)):
                bar = axes.barh(
                    y + place * named,
                    value,
                    0.36 if named else 1.0,
                    color=COLOURS[side],
                    label=side if y == 0 else None,
                    zorder=1 if value == max(before, after) else 2,
                )
                tip(list(bar), f"{name}: {number(before)} before, {number(after)} after")
            if named:
                change = typeset(relative_change(before, after))
                axes.text(max(before, after) + 0.02 * largest, y, change, va="center", fontsize=9.5)
        ticks = range(0, len(rows), 1 if named else math.ceil(len(rows) / 12))
        axes.set_yticks(ticks, [_short(rows[n][0]) if named else str(n + 1) for n in ticks])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        if not named:
            axes.set_ylabel("layer, in the order of the table")
        axes.set_xlim(0, largest * (1.26 if named else 1.02))
        axes.set_xlabel(unit)
        smaller = sum(after < before for _, before, after in rows)
        caption = f"Smaller is better; it is smaller in {smaller} of {len(rows)} layers."
        return _chart(figure, key, title, caption, f"Pairs of bars for {len(rows)} layers: {unit}. {caption}")


def _spectrum(layers: Sequence[LayerReport]) -> Chart | None:
    """Panels of the layers with most freedom: a full spectrum has no end to look at."""
    lines = [
        (layer, [value for value in layer.spectrum if value > 0], layer.rank / layer.d)
        for layer in layers
        if layer.rank is not None and layer.d and layer.rank < layer.d and finite(*layer.spectrum)
    ]
    lines = sorted((line for line in lines if len(line[1]) > 1), key=lambda line: line[2])
    shown = lines[:_MOST_PANELS]
    if not shown:
        return None
    with drawing(0.6 + 1.6 * math.ceil(len(shown) / 2), panels=len(shown)) as (figure, panels):
        for axes, (layer, values, share) in zip(panels, shown, strict=True):
            x = [100 * place / (len(layer.spectrum) - 1) for place in range(len(values))]
            line = axes.plot(x, values, color=COLOURS["after"], linewidth=1.4)
            mark = axes.axvline(100 * share, color=COLOURS["muted"], linestyle="--", linewidth=1.0)
            tip([*line, mark], f"{layer.name}: rank {layer.rank} of {layer.d}")
            axes.set_title(_short(layer.name), fontsize=9.5)
            axes.set_yscale("log")
            axes.set_xlim(-2, 102)
            axes.set_xticks([0, 50, 100])
            axes.grid(axis="y")
        figure.supxlabel("input directions, strongest first, %", fontsize=10)
        figure.supylabel("share of the strongest", fontsize=10)
        caption = (
            "How strongly the calibration data points in each input direction; the dashed line is the rank. A cliff "
            "there means that rank and freedom are clear-cut; with a slope they would change with the data."
        )
        caption += f" The {len(shown)} of {len(lines)} layers with most freedom." if len(lines) > len(shown) else ""
        alt = f"Lines for {len(shown)} layers: singular values of the inputs, with the rank marked."
        return _chart(figure, "spectrum", "Spectrum of the layers' inputs", caption, alt)


def _frontier(report: Report) -> Chart | None:
    points = frontier_points(report)
    if len(points) < 2:
        return None
    name = headline_name(report)
    with drawing(3.1) as (figure, (axes,)):
        mean, least, most = ([100 * shares[k] for _, shares in points] for k in range(3))
        places = range(len(points))
        if least != most:
            axes.fill_between(places, least, most, color=COLOURS["before"], label="least to most of a layer")
        line = axes.plot(places, mean, color=COLOURS["after"], marker="o", markersize=4.5, label="mean of the layers")
        said = [f"{value:.3g} % at {tolerance:g}" for value, (tolerance, _) in zip(mean, points, strict=True)]
        tip(line, ", ".join(said))
        axes.set_xticks(places, ["exact" if tolerance == 0 else f"{100 * tolerance:g} %" for tolerance, _ in points])
        axes.set_ylim(0, max(104, *most))
        axes.set_xlabel("deviation allowed in the layer's output")
        axes.set_ylabel(f"{name} left, %")
        axes.grid(axis="y")
        caption = "How small the weights could be made if each layer's output might deviate by that much."
        alt = f"A line of {name} left, mean of the layers: {', '.join(said)}."
        return _chart(figure, "frontier", "What is left, over the deviation", caption, alt)


def _heldout(result: HeldoutResult | None) -> Chart | None:
    """What the trials were judged by, over the deviation that each allowed; draws of one deviation are numbered."""
    if result is None or len(result.tried) < 2:
        return None
    first = result.tried[0].quantized[0] if all(trial.quantized for trial in result.tried) else None
    original = first.before if first else result.before.loss
    points = [(n, trial, trial.quantized[0].after if first else trial.loss) for n, trial in enumerate(result.tried, 1)]
    shown = [(n, trial, value) for n, trial, value in points if finite(value, trial.tolerance)]
    if not shown or not finite(original):
        return None
    tolerances = sorted({trial.tolerance for _, trial, _ in shown})
    by_tolerance = len(tolerances) > 1
    # On a logarithmic axis the exact shift gets a place of its own, left of all tolerances.
    exact = 0.5 * next((tolerance for tolerance in tolerances if tolerance > 0), 1.0)
    labelled: set[str] = set()
    with drawing(3.3) as (figure, (axes,)):
        axes.axhline(original, color=COLOURS["muted"], linestyle="--", linewidth=1.2, label="original")
        for n, trial, value in shown:
            look = "chosen" if trial.chosen else "accepted" if trial.accepted else "rejected"
            marker, colour, size = _TRIALS[look]
            style: dict[str, Any] = {"marker": marker, "color": COLOURS[colour], "markersize": size}
            style |= {"label": look} if look not in labelled else {}
            labelled.add(look)
            x = max(trial.tolerance, exact) if by_tolerance else n
            error = trial.standard_error if finite(trial.standard_error) and not first else 0.0
            bar = axes.errorbar(
                x, value, error, linestyle="none", capsize=2.5, zorder=9 if trial.chosen else 2, **style
            )
            tip([bar.lines[0]], f"{trial.what}: {number(value)}, {look}")
        if by_tolerance:
            axes.set_xscale("log")
            marks = {exact: "exact"} if 0 in tolerances else {}
            least = 2 * exact if 0 in tolerances else 0.9 * tolerances[0]
            marks |= {t: f"{100 * t:g} %" for t in _ROUND if least <= t <= 1.1 * tolerances[-1]}
            axes.set_xticks(list(marks), list(marks.values()))
            axes.set_xlabel("deviation allowed in each layer's output")
        else:
            axes.set_xticks([n for n, _, _ in shown][:: math.ceil(len(shown) / 10)])
            axes.set_xlabel("trial, numbered as in the table")
        unit = f"output error at {first.bits} bits" if first else "held-out loss"
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        bars = "" if first else f" The loss is {printable(result.loss_name)}, with one standard error of its change."
        missing = len(result.tried) - len(shown)
        caption = f"Lower is better.{bars}{f' {missing} without a finite value are in the table.' if missing else ''}"
        values = [value for _, _, value in shown]
        alt = (
            f"{len(shown)} trials, {unit} from {number(min(values))} to {number(max(values))}; the original has "
            f"{number(original)}. {sum(trial.accepted for _, trial, _ in shown)} were accepted."
        )
        return _chart(figure, "heldout", "Every trial on held-out data", caption, alt)


def _flatness(found: FlatnessReport | None) -> Chart | None:
    if found is None or not found.sharpness:
        return None
    with drawing(3.1) as (figure, (axes,)):
        last = []
        for side, colour, marker, line in (("before", "muted", "o", "--"), ("after", "after", "s", "-")):
            curve = [(s.sigma, e.value, e.error or 0.0) for s in found.sharpness if (e := getattr(s.rise, side))]
            if points := sorted(point for point in curve if finite(*point)):
                style: dict[str, Any] = {"color": COLOURS[colour], "marker": marker, "linestyle": line, "label": side}
                x, y, errors = zip(*points, strict=True)
                axes.errorbar(x, y, errors, capsize=2.5, markersize=4.5, **style)
                last.append(f"{number(points[-1][1])} {side}")
        if not last:
            return None
        axes.set_xlabel("noise σ, as a share of each filter of weights")
        axes.set_ylabel("rise of the mean loss")
        axes.grid(axis="y")
        caption = "How much the loss rises under random noise in the weights. Lower and flatter is more robust."
        alt = f"Loss against noise in the weights; at the largest noise it rises by {' and '.join(last)}."
        return _chart(figure, "flatness", "Loss under noise in the weights", caption, alt)


def _chart(figure: Figure, key: str, title: str, caption: str, alt: str) -> Chart:
    axes: Axes = figure.axes[0]
    if labels := axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=len(labels), frameon=False, columnspacing=1.0, handletextpad=0.5)
    return Chart(key, title, caption, to_svg(figure, key, alt))


def _short(name: str) -> str:
    """The name's end, which tells layers apart; whole in the table."""
    name = printable(name)
    longest = _LONGEST_NAME if name.isascii() else _LONGEST_NAME // 2  # characters of other scripts are wider
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
