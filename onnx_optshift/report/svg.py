"""Drawings for a web page: matplotlib's SVG, coloured by the page, with no font, no network and no trace of its maker.

Colours are names of CSS variables, so that one drawing serves a light screen, a dark one and paper. Text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, NullFormatter, ScalarFormatter

from onnx_optshift.report.figures import number, typeset

# Stand-ins that no drawing uses otherwise; each becomes a CSS variable of the page.
COLOURS = {
    name: f"#0a0b{k:02x}" for k, name in enumerate(("ink", "muted", "line", "before", "after", "good", "bad"), 1)
}
_BY_COLOUR = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_WIDTH = 4.6  # inches; 331 units of the drawing, about a phone's width, so that text keeps its size there
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["muted"]),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), COLOURS["ink"]),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "figure.constrained_layout.use": True,
    "font.size": 10.0,
    "axes.titlesize": 9.5,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    # Names may hold dollar signs, which would start a formula.
    "text.parse_math": False,
}


@contextmanager
def drawing(height: float, panels: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty drawing, inches high, of panels that share their scales; the user's own settings do not count."""
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.subplots(-(-panels // 2), min(panels, 2), sharex=True, sharey=True, squeeze=False).flatten()
        for left_over in axes[panels:]:
            left_over.remove()
        for lowest in axes[:panels][-2:]:
            lowest.tick_params(labelbottom=True)
        yield figure, axes[:panels].tolist()


def to_svg(figure: Figure, key: str, alt: str) -> str:
    """The drawing as an `<svg>` element; `key` makes its ids different from other drawings', `alt` is read out."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        # Labels of our own: those of matplotlib hold markup, which one version or another does not resolve.
        axis.set_minor_formatter(NullFormatter())
        if isinstance(axis.get_major_formatter(), (ScalarFormatter, LogFormatter)):
            axis.set_major_formatter(FuncFormatter(lambda value, _: typeset(_tick(value))))
    stream = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": key}):
        # Of characters that the font of the measurements lacks: the reader's fonts have them.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawn = re.sub(r"<(metadata|style)\b.*?</\1>", "", stream.getvalue(), flags=re.DOTALL)
    root, _, marks = drawn.partition("<svg")[2].partition(">")
    box = re.findall(r'viewBox="([^"]*)"', root)[0]
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(alt)}">{re.sub("<[^>]*>", _for_page, marks)}'


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else number(value).replace(".0e", "e")


def _for_page(tag: re.Match[str]) -> str:
    """A tag with the page's colours and fonts, and no ids but those that are referred to."""
    shown = re.sub(r'(?<=<g) id="[^"]*"', "", tag[0]).replace("xlink:href", "href")
    # Before and since matplotlib 3.11.
    shown = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*;? ?", "", shown))
    return re.sub(r"#0a0b..", lambda found: _BY_COLOUR[found[0]], shown)
