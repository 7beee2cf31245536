"""The report's charts as SVG for a web page: drawn by matplotlib, coloured by the page, no font and no network needed.

Colours are names of CSS variables, so that one drawing serves a light screen, a dark one and paper. Text stays text.
Layers are numbered as in the page's table; names stand beside the numbers where there is room for them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onnx_optshift.report.figures import change, estimate, finite, number_text
from onnx_optshift.report.model import HeldoutResult, LayerReport, Report, Trial
from onnx_optshift.report.terminal import middle_elided, printable

# Stand-ins that no drawing uses otherwise; each becomes a CSS variable of the page.
_VARIABLES = ("ink", "muted", "line", "surface", "before", "after", "bad", "c1", "c2", "c3", "c4", "c5", "c6")
_STANDINS = {name: f"#0a0b{k:02x}" for k, name in enumerate(_VARIABLES, 1)}
# Colour is never the only difference between two series.
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH = 4.6  # inches; 331 units of the drawing, about a phone's width, so that text keeps its size there
_NAME = 20  # characters of a layer's name beside a bar
# More layers than this are told apart by their numbers only, and more lines than colours are drawn alike.
MOST_NAMED = 16
_MOST_COLOURED = len(_MARKERS)
_STYLE = {
    "axes.edgecolor": _STANDINS["muted"],
    "axes.labelcolor": _STANDINS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9.0,
    "grid.color": _STANDINS["line"],
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "onnx-optshift",
    # Names may hold dollar signs, which would start a formula.
    "text.parse_math": False,
    "text.color": _STANDINS["ink"],
    "xtick.color": _STANDINS["muted"],
    "xtick.labelcolor": _STANDINS["ink"],
    "ytick.color": _STANDINS["muted"],
    "ytick.labelcolor": _STANDINS["ink"],
}


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
    with _drawing(_bars_height(len(known))) as (figure, axes):
        for y, (k, layer, rank, d) in enumerate(known):
            share = 100 * rank / d
            bar = axes.barh(y, share, 0.62, color=_STANDINS["after"], label=_once("used by the data", y))
            rest = axes.barh(y, 100 - share, 0.62, left=share, color=_STANDINS["before"], label=_once("free", y))
            _tip([*bar, *rest], f"{k} {layer.name}: {rank} of {d} directions used, {d - rank} free")
            if len(known) <= MOST_NAMED:
                axes.text(102, y, f"{d - rank} free", va="center", fontsize=8.5)
        axes.set_xlim(0, 122 if len(known) <= MOST_NAMED else 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("share of the layer's input directions, %")
        _layer_axis(axes, [(k, layer) for k, layer, _, _ in known])
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        free = sum(rank < d for _, _, rank, d in known)
        alt = f"Bars for {len(known)} layers: share of input directions that the data uses. {free} have free directions."
        caption = (
            "Directions that no calibration sample uses are free: weight there changes nothing and can go. A layer with "
            "none free has only one exact solution."
        )
        return Chart("freedom", "Freedom of each layer", caption, _svg(figure, "freedom", alt))


def _before_after(
    what: str, layers: Sequence[Numbered], pick: Callable[[LayerReport], tuple[float | None, float | None]]
) -> Chart | None:
    known = [(k, layer, finite(pick(layer)[0]), finite(pick(layer)[1])) for k, layer in layers]
    rows = [(k, layer, a, b) for k, layer, a, b in known if a is not None and b is not None]
    if not rows:
        return None
    largest = max(max(before, after) for _, _, before, after in rows) or 1.0
    with _drawing(_bars_height(len(rows))) as (figure, axes):
        for y, (k, layer, before, after) in enumerate(rows):
            first = axes.barh(y - 0.19, before, 0.36, color=_STANDINS["before"], label=_once("before", y))
            second = axes.barh(y + 0.19, after, 0.36, color=_STANDINS["after"], label=_once("after", y))
            _tip([*first, *second], f"{k} {layer.name}: {number_text(before)} before, {number_text(after)} after")
            if len(rows) <= MOST_NAMED:
                axes.text(max(before, after) + 0.02 * largest, y, change(before, after), va="center", fontsize=8.5)
        axes.set_xlim(0, largest * (1.24 if len(rows) <= MOST_NAMED else 1.02))
        name = {"norm": "Frobenius norm of the weight", "range": "largest absolute weight"}[what]
        axes.set_xlabel(name)
        _layer_axis(axes, [(k, layer) for k, layer, _, _ in rows])
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        smaller = sum(after < before for _, _, before, after in rows)
        alt = f"Pairs of bars for {len(rows)} layers: {name} before and after. It is smaller in {smaller}."
        title, caption = {
            "norm": ("Weight norm, before and after", "Smaller weights with the same outputs mean a flatter minimum."),
            "range": (
                "Weight range, before and after",
                "A quantizer divides the range into equal steps: half the range, half the step and half the error.",
            ),
        }[what]
        return Chart(what, title, caption, _svg(figure, what, alt))


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
    with _drawing(3.1) as (figure, axes):
        for n, (k, layer, points) in enumerate(lines):
            x, y = [places[tolerance] for tolerance, _ in points], [ratio for _, ratio in points]
            look: dict[str, Any] = {"color": _STANDINS["after"], "linewidth": 0.8, "alpha": 0.45}
            if few:
                look = {"color": _STANDINS[f"c{n + 1}"], "marker": _MARKERS[n], "markersize": 4.5, "linewidth": 1.6}
            line = axes.plot(x, y, label=_label(k, layer) if few else None, **look)
            _tip(line, f"{k} {layer.name}: {', '.join(f'{v:.3g} % at {t:g}' for t, v in points)}")
        axes.set_xticks(range(len(ticks)), ["exact" if t == 0 else f"{100 * t:g} %" for t in ticks])
        axes.set_ylim(0, max(104, *(ratio for _, _, points in lines for _, ratio in points)))
        axes.set_xlabel("deviation allowed in the layer's output")
        axes.set_ylabel(f"{what} left, % of the original's")
        axes.grid(axis="y")
        if few:
            figure.legend(loc="outside upper left", ncols=1 if len(lines) < 4 else 2, frameon=False)
        least = min(ratio for _, _, points in lines for _, ratio in points)
        alt = f"Lines for {len(lines)} layers: {what} left over tolerance {ticks[0]:g} to {ticks[-1]:g}; least {least:.3g} %."
        caption = (
            f"How small each layer's {what} could be made if its own output might deviate by that much; computed from "
            "statistics, not tried on the model."
        )
        return Chart(f"frontier-{what}", f"What a tolerance would buy: {what}", caption, _svg(figure, what + "f", alt))


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
    with _drawing(3.1) as (figure, axes):
        axes.axhline(result.before.loss, color=_STANDINS["muted"], linestyle="--", linewidth=1.2, label="original")
        for accepted, name, look in (
            (True, "accepted", {"marker": "o", "color": _STANDINS["after"]}),
            (False, "refused", {"marker": "X", "color": _STANDINS["bad"]}),
        ):
            for first, (n, trial) in enumerate((n, trial) for n, trial in shown if trial.accepted == accepted):
                x = max(trial.tolerance, exact) if by_tolerance else n
                bar = axes.errorbar(
                    *(x, trial.loss, finite(trial.standard_error) or 0.0),
                    linestyle="none",
                    capsize=2.5,
                    markersize=6,
                    elinewidth=1.0,
                    label=_once(name, first),
                    **look,
                )
                _tip([bar.lines[0]], f"{trial.what}: loss {number_text(trial.loss, 4)}, {name}: {trial.reason}")
        if by_tolerance:
            axes.set_xscale("log")
            marks = [exact] * (0 in tolerances) + _spread([t for t in tolerances if t > 0], 5)
            axes.set_xticks(marks, ["exact" if m == exact and 0 in tolerances else f"{100 * m:.2g} %" for m in marks])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("deviation allowed in each layer's output")
        else:
            axes.set_xticks(_spread([n for n, _ in shown], 10))
            axes.set_xlabel("trial, numbered as in the table")
        axes.set_ylabel("held-out loss")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
        alt = _heldout_alt(result, [trial for _, trial in shown])
        caption = (
            f"Lower is better ({printable(result.loss_name)}). The bars are one standard error of the difference to the "
            "original, sample by sample."
        )
        missing = len(result.tried) - len(shown)
        caption += f" {missing} without a finite loss are in the table only." if missing else ""
        return Chart("heldout", "Held-out loss of every trial", caption, _svg(figure, "heldout", alt))


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
        bits = finite(row.get("bits"))
        for side in ("before", "after"):
            error = finite(row.get(f"error_{side}"))
            if bits is not None and error is not None and error > 0:
                lines.setdefault((printable(str(row.get("layer", ""))), side), []).append((bits, error))
    if not lines:
        return None
    bits = sorted({b for points in lines.values() for b, _ in points}, reverse=True)
    layers = {name for name, _ in lines}
    with _drawing(3.1) as (figure, axes):
        for side, marker in (("before", "o"), ("after", "s")):
            # The text colour for "before": the bars' grey is too light for lines.
            colour = _STANDINS["muted" if side == "before" else "after"]
            own = [(name, sorted(points)) for (name, where), points in lines.items() if where == side]
            for n, (name, points) in enumerate(own):
                x, y = [bits.index(b) for b, _ in points], [100 * error for _, error in points]
                look: dict[str, Any] = {"linewidth": 1.4, "markersize": 4.5, "alpha": 1.0 if len(own) < 4 else 0.6}
                line = axes.plot(x, y, marker=marker, color=colour, label=_once(side, n), **look)
                _tip(line, f"{name}, {side}: {', '.join(f'{100 * e:.3g} % at {b:g} bits' for b, e in points)}")
        axes.set_yscale("log")
        axes.set_xticks(range(len(bits)), [f"{b:g}" for b in bits])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("output error, %")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        alt = f"Lines for {len(layers)} layers: relative output error under quantization at {len(bits)} widths."
        caption = "A line for each layer: error of its output after rounding the weight, against the original's output."
        return Chart("quantization", "Quantization error", caption, _svg(figure, "quantization", alt))


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
    with _drawing(3.1) as (figure, axes):
        for side, points in curves.items():
            if points:
                x, y, errors = zip(*sorted(points), strict=True)
                look = {"marker": "o" if side == "before" else "s", "linestyle": "--" if side == "before" else "-"}
                colour = _STANDINS["muted" if side == "before" else "after"]
                axes.errorbar(x, y, errors, color=colour, capsize=2.5, markersize=4.5, label=side, **look)
        axes.set_xlabel("noise σ, relative to each filter of weights")
        axes.set_ylabel("rise of the mean loss")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        last = [f"{number_text(max(points)[1])} {side}" for side, points in curves.items() if points]
        alt = f"Loss against noise in the weights; at the largest noise it rises by {' and '.join(last)}."
        caption = "How much the loss rises when the weights are shaken at random. Lower and flatter is more robust."
        return Chart("flatness", "Loss under noise in the weights", caption, _svg(figure, "flatness", alt))


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty drawing, in our style whatever the user's own settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, height))
        yield figure, figure.add_subplot()


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
    return f"{name}  {number}" if name.isascii() else str(number)


def _once(label: str, index: int) -> str | None:
    """A legend needs each label once."""
    return label if index == 0 else None


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    return list(values[:: math.ceil(len(values) / most)])


def _tip(artists: Sequence[Artist], text: str) -> None:
    for artist in artists:
        artist.set_gid(f"tip:{printable(text)}")


def _svg(figure: Figure, prefix: str, alt: str) -> str:
    """The drawing as an element for a page: own ids, colours of the page, tips, no trace of where it comes from."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    for name, standin in _STANDINS.items():
        text = text.replace(standin, f"var(--{name})")
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        _own(element, prefix)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {"metadata", "style"}:
                parent.remove(child)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def _own(element: ElementTree.Element, prefix: str) -> None:
    """Ids that no other drawing on the page has; a tip becomes the element's title; fonts are the page's."""
    identity = element.attrib.pop("id", "")
    if identity.startswith("tip:"):
        title = ElementTree.Element("title")
        title.text = identity.removeprefix("tip:")
        element.insert(0, title)
    elif identity:
        element.set("id", f"{prefix}-{identity}")
    for name, value in element.attrib.items():
        value = re.sub(r"url\(#", f"url(#{prefix}-", value)
        if name == "href":
            value = value.replace("#", f"#{prefix}-", 1)
        if element.tag == "text" and name == "style":
            value = re.sub(r"font-family: [^;]*; ?", "", value)
        element.set(name, value)
