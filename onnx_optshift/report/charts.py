"""The report's charts: which figures they need, what they show and what they say to those who cannot see them.

A chart is drawn only where it says more than the tables and their bars do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from onnx_optshift.report.figures import finite, number, printable
from onnx_optshift.report.model import HeldoutResult, Report
from onnx_optshift.report.sections import candidates
from onnx_optshift.report.svg import COLOURS, drawing, to_svg

_LONGEST_NAME = 22  # characters of a layer's name above a panel
_MOST_PANELS = 6
# Marker, colour and size of a trial.
_TRIALS = {"accepted": ("o", "after", 5.0), "rejected": ("X", "bad", 6.0), "chosen": ("*", "good", 13.0)}
_ROUND = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 3)]


@dataclass(frozen=True)
class Chart:
    """One drawing; `svg` is an element with a text alternative, safe to put into a page."""

    title: str
    caption: str  # what it shows and how to read it
    svg: str


def charts(report: Report) -> dict[str, Chart]:
    """All charts that the report has figures for, by key."""
    drawn = {"spectrum": _spectrum(report), "heldout": _heldout(report.heldout_result)}
    return {key: chart for key, chart in drawn.items() if chart is not None}


def _spectrum(report: Report) -> Chart | None:
    """Panels of the layers with most freedom: a full spectrum has no end to look at."""
    lines = [
        (layer, [value for value in layer.spectrum if value > 0], layer.rank / layer.d)
        for layer in candidates(report)
        if layer.rank is not None and layer.d and layer.rank < layer.d and finite(*layer.spectrum)
    ]
    lines = sorted((line for line in lines if len(line[1]) > 1), key=lambda line: line[2])
    shown = lines[:_MOST_PANELS]
    if not shown:
        return None
    with drawing(0.6 + 1.6 * math.ceil(len(shown) / 2), panels=len(shown)) as (figure, panels):
        for axes, (layer, values, share) in zip(panels, shown, strict=True):
            x = [100 * place / (len(layer.spectrum) - 1) for place in range(len(values))]
            axes.plot(x, values, color=COLOURS["after"], linewidth=1.4)
            axes.axvline(100 * share, color=COLOURS["muted"], linestyle="--", linewidth=1.0)
            axes.set_title(_short(layer.name))
            axes.set(yscale="log", xlim=(-2, 102), xticks=(0, 50, 100))
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


def _heldout(result: HeldoutResult | None) -> Chart | None:
    """What the trials were judged by, over the deviation that each allowed; draws of one deviation are numbered."""
    if result is None or len(result.tried) < 2:
        return None
    first = result.tried[0].quantized[0] if all(trial.quantized for trial in result.tried) else None
    original = first.before if first else result.before.loss
    tolerances = sorted({trial.tolerance for trial in result.tried if finite(trial.tolerance)})
    by_tolerance = len(tolerances) > 1
    points: dict[str, list[tuple[float, float, float]]] = {word: [] for word in _TRIALS}
    for n, trial in enumerate(result.tried, 1):
        value = trial.quantized[0].after if first else trial.loss
        error = trial.standard_error if finite(trial.standard_error) and not first else 0.0
        if finite(value, trial.tolerance):
            word = "chosen" if trial.chosen else "accepted" if trial.accepted else "rejected"
            points[word].append((trial.tolerance if by_tolerance else n, value, error))
    values = [value for group in points.values() for _, value, _ in group]
    if not values or not finite(original):
        return None
    with drawing(3.3) as (figure, (axes,)):
        axes.axhline(original, color=COLOURS["muted"], linestyle="--", linewidth=1.2, label="original")
        for (word, group), (marker, colour, size) in zip(points.items(), _TRIALS.values(), strict=True):
            if group:
                x, y, errors = zip(*group, strict=True)
                style: dict[str, Any] = {"fmt": marker, "color": COLOURS[colour], "markersize": size}
                axes.errorbar(x, y, None if first else errors, capsize=2.5, label=word, **style)
        if by_tolerance:
            # The exact shift stands left of the smallest tolerance, where a logarithmic axis has no place.
            smallest = next(tolerance for tolerance in tolerances if tolerance > 0)
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.3)
            labels = {0.0: "exact"} if 0 in tolerances else {}
            labels |= {t: f"{100 * t:g} %" for t in _ROUND if 0.9 * smallest <= t <= 1.1 * tolerances[-1]}
            axes.set_xticks(list(labels), list(labels.values()))
            axes.set_xlim((-0.2 if 0 in tolerances else 0.6) * smallest, 1.1 * tolerances[-1])
        else:
            axes.set_xticks(range(1, len(result.tried) + 1, math.ceil(len(result.tried) / 10)))
        unit = f"output error at {first.bits} bits" if first else "held-out loss"
        where = "deviation allowed in each layer's output" if by_tolerance else "trial, numbered as in the table"
        axes.set(xlabel=where, ylabel=unit)
        axes.grid(axis="y")
        judge = "" if first else f" The loss is {printable(result.loss_name)}, with one standard error of its change."
        missing = len(result.tried) - len(values)
        caption = f"Lower is better.{judge}{f' {missing} without a finite value are in the table.' if missing else ''}"
        alt = (
            f"{len(values)} trials, {unit} from {number(min(values))} to {number(max(values))}; the original has "
            f"{number(original)}. {len(points['rejected'])} were rejected."
        )
        return _chart(figure, "heldout", "Every trial on held-out data", caption, alt)


def _chart(figure: Figure, key: str, title: str, caption: str, alt: str) -> Chart:
    if labels := figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=len(labels), columnspacing=1.0, handletextpad=0.5)
    return Chart(title, caption, to_svg(figure, key, alt))


def _short(name: str) -> str:
    """The name's end, which tells layers apart; whole in the table."""
    name = printable(name)
    longest = _LONGEST_NAME if name.isascii() else _LONGEST_NAME // 2  # characters of other scripts are wider
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
