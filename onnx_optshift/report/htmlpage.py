"""The report as one web page: no script, no network, for a phone, a desk and paper."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from onnx_optshift.report.figures import Cell, Figure, Name, Word, finite, printable, text, typeset
from onnx_optshift.report.model import Report
from onnx_optshift.report.section import Table, look
from onnx_optshift.report.sections import KINDS, sections

# Colour alone tells not everybody.
_SIGNS = {"good": "\N{CHECK MARK}", "warn": "!", "bad": "\N{MULTIPLICATION X}", "plain": ""}
# Singular values below this share of the largest end a curve at the bottom: near float32's rounding unit.
_WEAKEST = 1e-6


def render(report: Report) -> str:
    """The report as the text of one self-contained HTML file; the same text for the same report."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": _cell,
        "bars": _bars,
        "points": _points,
        "text": lambda value: printable(str(value)),
    }
    environment.filters["kind_of"] = lambda block: type(block).__name__
    first, *rest = sections(report)
    source = resources.files("onnx_optshift.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        report=report,
        kind=KINDS[report.command],
        # The folder too, as many models are called model.onnx.
        file=printable("/".join(re.split(r"[\\/]", report.model.input)[-2:])),
        result=first,
        sections=rest,
    )
    # Names may hold halves of surrogate pairs, which no file can.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _cell(cell: Cell) -> Markup:
    """One value: names may break behind their separators, words have a look, numbers keep their full value."""
    if isinstance(cell, Word):
        word, _, mark = printable(cell).partition(" [")
        shown = Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>{}')
        return shown.format(look(cell), _SIGNS[look(cell)], word, f"\N{NO-BREAK SPACE}[{mark}" if mark else "")
    if isinstance(cell, (Name, tuple)):
        names = cell if isinstance(cell, tuple) else (cell,)
        return Markup(", ").join(_breakable(printable(name)) for name in names)
    if isinstance(cell, float):
        odd = "" if finite(cell) else "odd"
        return Markup('<data class="{}" value="{}">{}</data>').format(odd, repr(cell), typeset(text(cell)))
    # Text may hold names, which nobody may alter.
    return escape(typeset(text(cell)) if isinstance(cell, Figure) else text(cell))


def _bars(table: Table) -> list[list[float]]:
    """Lengths of each row's bars, as per cent of the longest one."""
    k = list(table.titles).index(table.drawn)
    cells = [row[k] for row in table.rows]
    sizes = [(cell,) if isinstance(cell, float) else getattr(cell, "sizes", ()) for cell in cells]
    sizes = [found if finite(*found) and min(found) >= 0 else () for found in sizes if found]
    longest = max((size for found in sizes for size in found), default=0.0) or 1.0
    return [[round(100 * size / longest, 2) for size in found] for found in sizes]


def _points(curve: Sequence[float]) -> str:
    """A curve in a box of 100 by 24, from 1 at the top to `_WEAKEST` at the bottom, as far as it is above 0."""
    places = ((100 * k / (len(curve) - 1), value) for k, value in enumerate(curve) if value > 0)
    return " ".join(f"{x:.1f},{24 * min(1.0, math.log(value) / math.log(_WEAKEST)):.1f}" for x, value in places)


def _breakable(name: str) -> Markup:
    parts = re.findall(r"[^/._:-]*[/._:-]|[^/._:-]+", name)
    return Markup('<span class="name">{}</span>').format(Markup("<wbr>").join(parts))
