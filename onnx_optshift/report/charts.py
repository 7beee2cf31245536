"""The report's charts: which figures they need, what they show and what they say to those who cannot see them.

Layers are numbered as in the page's table; names stand beside the numbers where there is room for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from onnx_optshift.report.figures import change, estimate, finite, number_text
from onnx_optshift.report.model import HeldoutResult, LayerReport, Report, Trial
from onnx_optshift.report.svg import COLOURS, drawing, tip, to_svg
from onnx_optshift.report.terminal import middle_elided, printable

# Colour is never the only difference between two series.
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NAME = 18  # characters of a layer's name beside a bar
# More layers than this are told apart by their numbers only, and more lines than colours are drawn alike.
MOST_NAMED = 16
_MOST_COLOURED = len(_MARKERS)
_ROUND_TOLERANCES = tuple(digit * 10.0**power for power in range(-6, 1) for digit in (1, 3))


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        key: Short name of the chart, once on a page.
        title: Heading.
        caption: What it shows and how to read it.
        svg: An `<svg>` element with a text alternative, safe to put into a page.
    """

    key: str
    title: str
    caption: str
    svg: str


Numbered = tuple[int, LayerReport]


def charts(report: Report) -> dict[str, Chart]:
    """All charts that the report has figures for, by key."""
    layers = [(k, layer) for k, layer in enumerate(candidates(report), 1)]
    drawn = (
        _freedom(layers),
        _spectrum(layers),
        _before_after("norm", layers, lambda layer: (layer.norm_before, layer.norm_after)),
        _before_after("range", layers, lambda layer: (layer.range_before, layer.range_after)),
        _frontier("norm", layers),
        _frontier("range", layers),
        _heldout(report.heldout_result),
        _quantization(report.quantization),
        _flatness(report.flatness),
    )
    return {chart.key: chart for chart in drawn if chart is not None}


def candidates(report: Report) -> list[LayerReport]:
    """The layers that are numbered: all but the skipped ones, in the order of the report."""
    return [layer for layer in report.layers if layer.status != "skipped"]


def _freedom(layers: Sequence[Numbered]) -> Chart | None:
    known = [(k, layer, layer.rank, layer.d) for k, layer in layers if layer.rank is not None and layer.d]
    if not known:
        return None
    with drawing(_bars_height(len(known))) as (figure, axes):
        places, shares = range(len(known)), [100 * rank / d for _, _, rank, d in known]
        rests = [100 - share for share in shares]
        thick = 0.62 if len(known) <= MOST_NAMED else 1.0
        used = axes.barh(places, shares, thick, color=COLOURS["after"], label="used by the data")
        free = axes.barh(places, rests, thick, left=shares, color=COLOURS["before"], label="free")
        for y, bar, rest, (k, layer, rank, d) in zip(places, used, free, known, strict=True):
            tip([bar, rest], f"{k} {layer.name}: {rank} of {d} directions used, {d - rank} free")
            if len(known) <= MOST_NAMED:
                axes.text(102, y, f"{d - rank} free", va="center", fontsize=9.5)
        axes.set_xlim(0, 122 if len(known) <= MOST_NAMED else 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("share of the layer's input directions, %")
        _layer_axis(axes, [(k, layer) for k, layer, _, _ in known])
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        count = sum(rank < d for _, _, rank, d in known)
        alt = (
            f"Bars for {len(known)} layers: share of input directions that the data uses. {count} have some left free."
        )
        caption = (
            "Directions that no calibration sample uses are free: weight there changes nothing and can go. A layer "
            "with none free has only one exact solution."
        )
        return Chart("freedom", "Freedom of each layer", caption, to_svg(figure, "freedom", alt))


def _spectrum(layers: Sequence[Numbered]) -> Chart | None:
    lines = [(k, layer, [v for v in layer.spectrum if v > 0]) for k, layer in layers if len(layer.spectrum) > 1]
    lines = [(k, layer, values) for k, layer, values in lines if values]
    if not lines:
        return None
    few = len(lines) <= _MOST_COLOURED
    with drawing(3.1) as (figure, axes):
        for n, (k, layer, values) in enumerate(lines):
            x = [100 * place / (len(layer.spectrum) - 1) for place in range(len(values))]
            look: dict[str, Any] = {"color": COLOURS["after"], "linewidth": 0.8, "alpha": 0.45}
            if few:
                look = {"color": COLOURS[f"c{n + 1}"], "marker": _MARKERS[n], "markersize": 3.5, "linewidth": 1.4}
            line = axes.plot(x, values, label=_label(k, layer) if few else None, **look)
            tip(line, f"{k} {layer.name}: the last direction in use has {values[-1]:.2g} of the first")
        axes.set_yscale("log")
        axes.set_xlim(-2, 102)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("input directions, strongest first, %")
        axes.set_ylabel("share of the strongest")
        axes.grid(axis="y")
        if few:
            figure.legend(loc="outside upper left", ncols=1 if len(lines) < 4 else 2, frameon=False)
        ends = sum(len(values) < len(layer.spectrum) for _, layer, values in lines)
        alt = f"Lines for {len(lines)} layers: singular values of the inputs. {ends} end before the last direction."
        caption = (
            "How strongly the calibration data points in each input direction of a layer. A line that ends early "
            "leaves directions free; one that falls far leaves directions that a small tolerance can free."
        )
        return Chart("spectrum", "Spectrum of each layer's input", caption, to_svg(figure, "spectrum", alt))


def _before_after(
    what: str, layers: Sequence[Numbered], pick: Callable[[LayerReport], tuple[float | None, float | None]]
) -> Chart | None:
    known = [(k, layer, finite(pick(layer)[0]), finite(pick(layer)[1])) for k, layer in layers]
    rows = [(k, layer, a, b) for k, layer, a, b in known if a is not None and b is not None]
    if not rows:
        return None
    largest = max(max(before, after) for _, _, before, after in rows) or 1.0
    with drawing(_bars_height(len(rows))) as (figure, axes):
        places = range(len(rows))
        # Beside each other where there is room for two bars, else the shorter one in front of the longer.
        shift, thick = (0.19, 0.36) if len(rows) <= MOST_NAMED else (0.0, 1.0)
        befores, afters = [before for _, _, before, _ in rows], [after for _, _, _, after in rows]
        upper = axes.barh([y - shift for y in places], befores, thick, color=COLOURS["before"], label="before")
        lower = axes.barh([y + shift for y in places], afters, thick, color=COLOURS["after"], label="after")
        for y, first, second, (k, layer, before, after) in zip(places, upper, lower, rows, strict=True):
            first.set_zorder(1 if before >= after else 2)
            second.set_zorder(1 if after > before else 2)
            tip([first, second], f"{k} {layer.name}: {number_text(before)} before, {number_text(after)} after")
            if len(rows) <= MOST_NAMED:
                axes.text(max(before, after) + 0.02 * largest, y, change(before, after), va="center", fontsize=9.5)
        axes.set_xlim(0, largest * (1.24 if len(rows) <= MOST_NAMED else 1.02))
        name = {"norm": "Frobenius norm of the weight", "range": "largest absolute weight"}[what]
        axes.set_xlabel(name)
        _layer_axis(axes, [(k, layer) for k, layer, _, _ in rows])
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        smaller = sum(after < before for _, _, before, after in rows)
        alt = f"Pairs of bars for {len(rows)} layers: {name} before and after. It is smaller in {smaller}."
        title, caption = {
            "norm": (
                "Weight norm, before and after",
                "The norm bounds how curved the loss can be; a smaller weight with equal outputs tends to lie flatter.",
            ),
            "range": (
                "Weight range, before and after",
                "A quantizer divides the range into equal steps: half the range, half the step and half the error.",
            ),
        }[what]
        return Chart(what, title, caption, to_svg(figure, what, alt))


def _frontier(what: str, layers: Sequence[Numbered]) -> Chart | None:
    lines = []
    for k, layer in layers:
        ratios = [(p.tolerance, finite(p.norm_ratio if what == "norm" else p.range_ratio)) for p in layer.frontier]
        points = [(tolerance, 100 * ratio) for tolerance, ratio in ratios if ratio is not None]
        if len(points) > 1:
            lines.append((k, layer, points))
    if not lines:
        return None
    ticks = sorted({tolerance for _, _, points in lines for tolerance, _ in points})
    places = {tolerance: x for x, tolerance in enumerate(ticks)}
    few = len(lines) <= _MOST_COLOURED
    with drawing(3.1) as (figure, axes):
        for n, (k, layer, points) in enumerate(lines):
            x, y = [places[tolerance] for tolerance, _ in points], [ratio for _, ratio in points]
            look: dict[str, Any] = {"color": COLOURS["after"], "linewidth": 0.8, "alpha": 0.45}
            if few:
                look = {"color": COLOURS[f"c{n + 1}"], "marker": _MARKERS[n], "markersize": 4.5, "linewidth": 1.6}
            line = axes.plot(x, y, label=_label(k, layer) if few else None, **look)
            tip(line, f"{k} {layer.name}: {', '.join(f'{v:.3g} % at {t:g}' for t, v in points)}")
        axes.set_xticks(range(len(ticks)), ["exact" if t == 0 else f"{100 * t:g} %" for t in ticks])
        axes.set_ylim(0, max(104, *(ratio for _, _, points in lines for _, ratio in points)))
        axes.set_xlabel("deviation allowed in the layer's output")
        axes.set_ylabel(f"{what} left, %")
        axes.grid(axis="y")
        if few:
            figure.legend(loc="outside upper left", ncols=1 if len(lines) < 4 else 2, frameon=False)
        least = min(ratio for _, _, points in lines for _, ratio in points)
        reach = f"tolerances from {ticks[0]:g} to {ticks[-1]:g}"
        alt = f"Lines for {len(lines)} layers: {what} left at {reach}; the least is {least:.3g} %."
        caption = (
            f"How small each layer's {what} could be made, as a share of the original's, if its own output might "
            "deviate by that much. Computed from statistics, not tried on the model."
        )
        title = f"{what.capitalize()} left, over the tolerance"
        return Chart(f"frontier-{what}", title, caption, to_svg(figure, f"frontier-{what}", alt))


def _heldout(result: HeldoutResult | None) -> Chart | None:
    if result is None:
        return None
    shown = [(n, trial) for n, trial in enumerate(result.tried, 1) if finite(trial.loss) is not None]
    if not shown or finite(result.before.loss) is None:
        return None
    tolerances = sorted({trial.tolerance for _, trial in shown if finite(trial.tolerance) is not None})
    # Several tries of one tolerance, as the draws of the stochastic form are, have no order but their own.
    by_tolerance = len(tolerances) > 1 and tolerances[-1] > 0
    # On a logarithmic axis the exact shift gets a place of its own, left of all tolerances.
    exact = 0.5 * next((t for t in tolerances if t > 0), 1.0)
    with drawing(3.1) as (figure, axes):
        axes.axhline(result.before.loss, color=COLOURS["muted"], linestyle="--", linewidth=1.2, label="original")
        for accepted, name, marker, colour in ((True, "accepted", "o", "after"), (False, "refused", "X", "bad")):
            for first, (n, trial) in enumerate((n, trial) for n, trial in shown if trial.accepted == accepted):
                x = max(trial.tolerance, exact) if by_tolerance else n
                bar = axes.errorbar(
                    *(x, trial.loss, finite(trial.standard_error) or 0.0),
                    marker=marker,
                    color=COLOURS[colour],
                    linestyle="none",
                    capsize=2.5,
                    markersize=6,
                    elinewidth=1.0,
                    label=_once(name, first),
                )
                tip([bar.lines[0]], f"{trial.what}: loss {number_text(trial.loss, 4)}, {name}: {trial.reason}")
        if by_tolerance:
            axes.set_xscale("log")
            marks = {exact: "exact"} if 0 in tolerances else {}
            marks |= {t: f"{100 * t:g} %" for t in _ROUND_TOLERANCES if 2 * exact <= t <= 1.1 * tolerances[-1]}
            axes.set_xticks(list(marks), list(marks.values()))
            axes.set_xticks([], minor=True)
            axes.set_xlabel("deviation allowed in each layer's output")
        else:
            axes.set_xticks([n for n, _ in shown][:: math.ceil(len(shown) / 10)])
            axes.set_xlabel("trial, numbered as in the table")
        axes.set_ylabel("held-out loss")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
        alt = _heldout_alt(result, [trial for _, trial in shown])
        caption = (
            f"Lower is better ({printable(result.loss_name)}). The bars are one standard error of the difference to "
            "the original, sample by sample."
        )
        missing = len(result.tried) - len(shown)
        caption += f" {missing} without a finite loss are in the table only." if missing else ""
        return Chart("heldout", "Held-out loss of every trial", caption, to_svg(figure, "heldout", alt))


def _heldout_alt(result: HeldoutResult, shown: Sequence[Trial]) -> str:
    losses = [trial.loss for trial in shown]
    accepted = sum(trial.accepted for trial in shown)
    return (
        f"{len(shown)} trials with held-out losses from {number_text(min(losses))} to {number_text(max(losses))}; the "
        f"original has {number_text(result.before.loss)}. {accepted} were accepted."
    )


def _quantization(rows: Sequence[Mapping[str, Any]] | None) -> Chart | None:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows or ():
        width = finite(row.get("bits"))
        for side in ("before", "after"):
            error = finite(row.get(f"error_{side}"))
            if width is not None and error is not None and error > 0:
                lines.setdefault((printable(str(row.get("layer", ""))), side), []).append((width, error))
    if not lines:
        return None
    bits = sorted({b for points in lines.values() for b, _ in points}, reverse=True)
    layers = {name for name, _ in lines}
    with drawing(3.1) as (figure, axes):
        for side, marker in (("before", "o"), ("after", "s")):
            # The text colour for "before": the bars' grey is too light for lines.
            colour = COLOURS["muted" if side == "before" else "after"]
            own = [(name, sorted(points)) for (name, where), points in lines.items() if where == side]
            for n, (name, points) in enumerate(own):
                x, y = [bits.index(b) for b, _ in points], [100 * error for _, error in points]
                look: dict[str, Any] = {"linewidth": 1.4, "markersize": 4.5, "alpha": 1.0 if len(own) < 4 else 0.6}
                line = axes.plot(x, y, marker=marker, color=colour, label=_once(side, n), **look)
                tip(line, f"{name}, {side}: {', '.join(f'{100 * e:.3g} % at {b:g} bits' for b, e in points)}")
        axes.set_yscale("log")
        axes.set_xticks(range(len(bits)), [f"{b:g}" for b in bits])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("output error, %")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        alt = f"Lines for {len(layers)} layers: relative output error under quantization at {len(bits)} widths."
        caption = "A line for each layer: error of its output after rounding the weight, against the original's output."
        return Chart("quantization", "Quantization error", caption, to_svg(figure, "quantization", alt))


def _flatness(flatness: Mapping[str, Any] | None) -> Chart | None:
    curves: dict[str, list[tuple[float, float, float]]] = {"before": [], "after": []}
    for row in (flatness or {}).get("sharpness") or ():
        sigma = finite(row.get("sigma"))
        # Beside the noise level stand the two figures themselves, or one comparison that holds both.
        inner = next((value for value in row.values() if isinstance(value, Mapping) and "before" in value), row)
        for side, points in curves.items():
            value, error = estimate(inner.get(side))
            if sigma is not None and value is not None:
                points.append((sigma, value, error or 0.0))
    if not curves["before"]:
        return None
    with drawing(3.1) as (figure, axes):
        for side, points in curves.items():
            if points:
                x, y, errors = zip(*sorted(points), strict=True)
                look: dict[str, Any] = {
                    "marker": "o" if side == "before" else "s",
                    "linestyle": "--" if side == "before" else "-",
                }
                colour = COLOURS["muted" if side == "before" else "after"]
                axes.errorbar(x, y, errors, color=colour, capsize=2.5, markersize=4.5, label=side, **look)
        axes.set_xlabel("noise σ, relative to each filter of weights")
        axes.set_ylabel("rise of the mean loss")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        last = [f"{number_text(max(points)[1])} {side}" for side, points in curves.items() if points]
        alt = f"Loss against noise in the weights; at the largest noise it rises by {' and '.join(last)}."
        caption = "How much the loss rises when the weights are shaken at random. Lower and flatter is more robust."
        return Chart("flatness", "Loss under noise in the weights", caption, to_svg(figure, "flatness", alt))


def _bars_height(count: int) -> float:
    return min(1.1 + 0.3 * count, 5.6)


def _layer_axis(axes: Axes, layers: Sequence[Numbered]) -> None:
    """Layers from top to bottom, named where there is room."""
    step = 1 if len(layers) <= MOST_NAMED else math.ceil(len(layers) / 12)
    named = len(layers) <= MOST_NAMED
    ticks = range(0, len(layers), step)
    axes.set_yticks(ticks, [_label(*layers[n]) if named else str(layers[n][0]) for n in ticks])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0 if named else 3)
    if not named:
        axes.set_ylabel("layer, numbered as in the table")


def _label(number: int, layer: LayerReport) -> str:
    # Widths are measured with a font that knows few scripts beyond Latin; the number is enough there.
    name = middle_elided(printable(layer.name), _NAME)
    return f"{number} {name}" if name.isascii() else str(number)


def _once(label: str, index: int) -> str | None:
    """A legend needs each label once."""
    return label if index == 0 else None
