"""Drawings for a web page: matplotlib's SVG, coloured by the page, with no font, no network and no trace of its maker.

Colours are names of CSS variables, so that one drawing serves a light screen, a dark one and paper. Text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, NullFormatter, ScalarFormatter

from onnx_optshift.report.figures import number, printable, typeset

# Stand-ins that no drawing uses otherwise; each becomes a CSS variable of the page.
_VARIABLES = ("ink", "muted", "line", "surface", "before", "after", "good", "bad")
COLOURS = {name: f"#0a0b{k:02x}" for k, name in enumerate(_VARIABLES, 1)}
_BY_COLOUR = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
WIDTH = 4.6  # inches; 331 units of the drawing, about a phone's width, so that text keeps its size there
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10.0,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "onnx-optshift",
    # Names may hold dollar signs, which would start a formula.
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.color": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"],
}


@contextmanager
def drawing(height: float, panels: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty drawing of one panel, or of several in two columns, whatever the user's own settings of matplotlib are.

    Args:
        height: In inches.
        panels: How many; those of one drawing share their scales.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height))
        rows, columns = -(-panels // 2), min(panels, 2)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
        for left_over in axes[panels:]:
            left_over.remove()
        yield figure, axes[:panels]


def tip(artists: Sequence[Artist], text: str) -> None:
    """Gives shapes a text that shows when the mouse rests on them."""
    for artist in artists:
        artist.set_gid(f"tip:{printable(text)}")


def to_svg(figure: Figure, prefix: str, alt: str) -> str:
    """The drawing as an `<svg>` element for a page.

    Args:
        figure: From `drawing`.
        prefix: Starts all ids in the drawing, as a page has each id once.
        alt: What a reader who cannot see it should know.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            # Labels of our own: those of matplotlib hold markup, which one version or another does not resolve.
            if axis.get_scale() == "log":
                axis.set_minor_formatter(NullFormatter())
            if isinstance(axis.get_major_formatter(), (ScalarFormatter, LogFormatter)):
                axis.set_major_formatter(FuncFormatter(lambda value, _: typeset(_tick(value))))
    stream = io.StringIO()
    with warnings.catch_warnings():
        # Of characters that the font of the measurements lacks: the reader's fonts have them.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
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


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else number(value).replace(".0e", "e")


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
        value = re.sub(r"#0a0b..", lambda found: _BY_COLOUR[found[0]], value)
        if name == "href":
            value = value.replace("#", f"#{prefix}-", 1)
        if element.tag == "text" and name == "style":
            # Before and since matplotlib 3.11.
            value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
            value = re.sub(r"font-family: [^;]*; ?", "", value)
        element.set(name, value)
