"""The report as text: the sections one below the other, in the width that there is, with nothing cut.

Tables whose columns do not fit wrap their names and sentences, never their figures; where that is not enough, each row
becomes a small list. Text from the model is printed as it is, never as markup.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.containers import Lines
from rich.padding import Padding
from rich.text import Text

from onnx_optshift.report.figures import printable, text
from onnx_optshift.report.model import Report
from onnx_optshift.report.section import Block, Fact, Facts, Note, Table, look
from onnx_optshift.report.sections import sections, title

_STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "plain": ""}
# Names listed before the rest is only counted, unless verbose; the page and the JSON report have them all.
_MOST_NAMES = 3
# Narrower columns of names or sentences are worse to read than a list.
_NARROWEST = 10
_GAP = 2
# A pipe has no right edge, and tools that read lines want a row in one.
_UNBROKEN = 10_000


def console() -> Console:
    """Standard output: as wide as the terminal or COLUMNS, and without an edge where it is a pipe or a file."""
    has_edge = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if has_edge else _UNBROKEN)


def render(report: Report, out: Console, *, verbose: bool = False) -> None:
    """Prints a report of any command, in the width of `out`; verbose also details: settings, versions, all names."""
    for part in _parts(report, out.width, verbose):
        for line in out.render_lines(part, pad=False):
            shown = Text.assemble(*((segment.text, segment.style or "") for segment in line))
            shown.rstrip()
            out.print(shown, soft_wrap=True)


def _parts(report: Report, width: int, verbose: bool) -> Iterator[RenderableType]:
    """Paragraphs and grids, from the top to the bottom."""
    yield _plain(title(report), "bold")
    for section in sections(report):
        blocks = [block for block in section.blocks if verbose or not block.detail]
        if blocks and section.key != "result":
            yield Text()
            yield _plain(section.title, "bold")
        for block in blocks:
            yield from _block(block, width, verbose)
    yield Text()
    yield from (_plain(f"warning: {warning}", "yellow") for warning in report.warnings)
    yield _plain(report.summary, "bold")
    if report.next_step:
        yield _plain(report.next_step)


def _block(block: Block, width: int, verbose: bool) -> Iterator[RenderableType]:
    if isinstance(block, Note):
        yield _plain(block.text, _STYLES[block.look])
    if isinstance(block, (Facts, Table)) and block.title:
        yield _plain(block.title, "italic")
    if isinstance(block, Facts):
        yield _grid(block.rows, None if verbose else _MOST_NAMES)
    if isinstance(block, Table):
        yield from _table(block, width, verbose)
        if block.note and verbose:
            yield _plain(block.note, "dim")


def _grid(rows: Iterable[Fact], most_names: int | None = None) -> RenderableType:
    """Labels, and their values beside them."""
    grid = rich_table.Table.grid(padding=(0, _GAP, 0, 0))
    for label, value, remark in rows:
        shown = f"{text(value, most_names)}{f', {printable(remark)}' if remark else ''}"
        grid.add_row(_plain(label, "dim"), _plain(shown, _STYLES[look(value)]))
    return grid


def _table(table: Table, width: int, verbose: bool) -> Iterator[RenderableType]:
    kept = [k for k, title in enumerate(table.titles) if verbose or title != table.more]
    # A title gives way as far as its longest word, a figure not at all.
    widths = [
        max(cell_len(part) for part in [*table.titles[k].split(), *(text(row[k]) for row in table.rows)]) for k in kept
    ]
    figures = [is_figure for k, is_figure in enumerate(table.figures) if k in kept]
    least = sum(w if is_figure else min(w, _NARROWEST) for w, is_figure in zip(widths, figures, strict=True))
    if least + _GAP * (len(kept) - 1) > width:
        for row in table.rows:
            yield _plain(text(row[0]))
            yield Padding(_grid(Fact(table.titles[k], row[k]) for k in kept[1:]), (0, 0, 0, _GAP))
        return
    grid = rich_table.Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
    for k, is_figure, longest in zip(kept, figures, widths, strict=True):
        grid.add_column(
            _plain(table.titles[k]), justify="right" if is_figure else "left", width=longest if is_figure else None
        )
    for row in table.rows:
        grid.add_row(*(_plain(text(row[k]), _STYLES[look(row[k])]) for k in kept))
    yield grid


def _plain(line: str, style: str = "") -> Text:
    """Text that is no markup."""
    return _Folding(printable(line), style=style, overflow="fold")


class _Folding(Text):
    """Text that breaks at spaces, where it must behind a separator of names, and anywhere if there is none."""

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        lines = [""]
        for word in re.findall(r"\s*\S+", self.plain):
            pieces = re.findall(r"[^/._:-]*[/._:-]?", word) if cell_len(word.strip()) > width else [word]
            for piece in pieces:
                if lines[-1] and cell_len(lines[-1] + piece) > width:
                    lines.append(piece.lstrip())
                else:
                    lines[-1] += piece
        return Text("\n".join(lines), self.style, overflow="fold").wrap(console, width, **options)
