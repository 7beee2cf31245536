"""The report as one web page: no script, no network, for a phone, a desk and paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from onnx_optshift.report import section
from onnx_optshift.report.charts import charts
from onnx_optshift.report.figures import Cell, Name, Names, Word, finite, printable, text, typeset
from onnx_optshift.report.model import Report
from onnx_optshift.report.sections import KINDS, sections

_TEMPLATE = "page.html.j2"
# Colour alone tells not everybody.
_SIGNS = {"good": "\N{CHECK MARK}", "warn": "!", "bad": "\N{MULTIPLICATION X}", "plain": ""}


def render(report: Report) -> str:
    """The report as the text of one self-contained HTML file; the same text for the same report.

    Args:
        report: Of any command.
    """
    source = resources.files("onnx_optshift.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "text": lambda value: printable(str(value))}
    environment.tests |= {name: _is(name) for name in ("Facts", "Table", "Note", "ChartOf")}
    first, *rest = sections(report)
    drawn = charts(report)
    page = environment.from_string(source).render(
        report=report,
        kind=KINDS[report.command],
        # The folder too, as many models are called model.onnx.
        file=printable("/".join(re.split(r"[\\/]", report.model.input)[-2:])),
        result=first,
        sections=rest,
        charts={key: (chart, Markup(chart.svg)) for key, chart in drawn.items()},
    )
    # Names may hold halves of surrogate pairs, which no file can.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _is(name: str) -> Callable[[object], bool]:
    return lambda block: isinstance(block, getattr(section, name))


def _cell(cell: Cell, is_figure: bool = False) -> Markup:
    """One value: names may break behind their separators, words have a look, numbers keep their full value."""
    if isinstance(cell, Word):
        look = section.LOOKS.get(cell.text, "plain")
        shown = Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span> {}')
        return shown.format(look, _SIGNS[look], printable(cell.text), cell.mark)
    if isinstance(cell, Name):
        return _breakable(printable(cell.text))
    if isinstance(cell, Names):
        return Markup(", ").join(_breakable(printable(name)) for name in cell.names)
    if isinstance(cell, float):
        look = "" if finite(cell) else "odd"
        return Markup('<data class="{}" value="{}">{}</data>').format(look, repr(cell), typeset(text(cell)))
    # Text may hold names, which nobody may alter; in a column of figures there are none.
    return escape(text(cell) if isinstance(cell, str) and not is_figure else typeset(text(cell)))


def _breakable(name: str) -> Markup:
    parts = re.findall(r"[^/._:-]*[/._:-]|[^/._:-]+", name)
    return Markup('<span class="name">{}</span>').format(Markup("<wbr>").join(parts))
