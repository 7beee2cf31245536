"""The report as text: the sections one below the other, in the width that there is, with nothing cut.

Tables whose columns do not fit wrap their names and sentences, never their figures; where that is not enough, each row
becomes a small list. Text from the model is printed as it is, never as markup.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from onnx_optshift.report.figures import Cell, Word, printable, text
from onnx_optshift.report.model import Report
from onnx_optshift.report.section import LOOKS, Block, ChartOf, Facts, Note, Table
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
    """Prints a report of any command.

    Args:
        report: What to print.
        out: Where to; its width decides where lines break.
        verbose: Also details: trials, settings, versions, all names.
    """

    def say(line: str, style: str = "") -> None:
        for part in _folded(printable(line), out.width):
            out.print(Text(part, style=style), soft_wrap=True)

    say(title(report), "bold")
    for section in sections(report):
        blocks = [block for block in section.blocks if verbose or not block.detail]
        if not blocks:
            continue
        if section.key != "result":
            out.print()
            say(section.title, "bold")
        for block in blocks:
            for line in _block(block, out.width, verbose):
                out.print(line, soft_wrap=True)
    out.print()
    for warning in report.warnings:
        say(f"warning: {warning}", "yellow")
    say(report.summary, "bold")
    if report.next_step:
        say(report.next_step)


def _block(block: Block, width: int, verbose: bool) -> Iterator[Text]:
    most = None if verbose else _MOST_NAMES
    match block:
        case Note():
            yield from (Text(part, style=_STYLES[block.look]) for part in _folded(printable(block.text), width))
        case Facts():
            if block.title:
                yield Text(block.title, style="italic")
            rows = [
                (row.label, f"{text(row.value, most)}{f', {row.remark}' if row.remark else ''}") for row in block.rows
            ]
            yield from _facts([(printable(label), printable(value), "") for label, value in rows], width)
        case Table():
            if block.title:
                yield Text(block.title, style="italic")
            yield from _table(block, width, verbose)
            if block.note and verbose:
                yield from (Text(part, style="dim") for part in _folded(printable(block.note), width))
        case ChartOf():
            return


def _facts(rows: Sequence[tuple[str, str, str]], width: int, indent: str = "") -> Iterator[Text]:
    """Label, value, style: values stand beside their labels, or below them where there is no room."""
    edge = max((cell_len(label) for label, _, _ in rows), default=0) + _GAP + len(indent)
    beside = width - edge >= _NARROWEST + _GAP
    for label, value, style in rows:
        parts = _folded(value, width - edge if beside else width - _GAP)
        if beside:
            lead = Text(_padded(indent + label, edge), style="dim")
            yield lead + Text(parts[0], style=style)
        else:
            yield from (Text(indent + part, style="dim") for part in _folded(label, width - len(indent)))
        yield from (Text(" " * (edge if beside else _GAP) + part, style=style) for part in parts[beside:])


def _table(table: Table, width: int, verbose: bool) -> Iterator[Text]:
    kept = [k for k, column in enumerate(table.columns) if verbose or not column.detail]
    columns = [table.columns[k] for k in kept]
    rows = [[row[k] for k in kept] for row in table.rows]
    cells = [[printable(text(cell)) for cell in row] for row in rows]
    styles = [[_style(cell) for cell in row] for row in rows]
    widths = _widths([column.is_figure for column in columns], [[c.title for c in columns], *cells], width)
    if widths is None:
        labels = [column.title for column in columns]
        for names, looks in zip(cells, styles, strict=True):
            yield from map(Text, _folded(names[0], width))
            yield from _facts(list(zip(labels, names, looks, strict=True))[1:], width, indent="  ")
        return
    titles = [_folded(column.title, width) for column, width in zip(columns, widths, strict=True)]
    right = [column.is_figure for column in columns]
    yield from _lines(titles, widths, right, ["dim"] * len(columns))
    for names, looks in zip(cells, styles, strict=True):
        yield from _lines(
            [_folded(name, width) for name, width in zip(names, widths, strict=True)], widths, right, looks
        )


def _widths(figures: Sequence[bool], cells: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Columns' widths, so that no figure breaks and the rest shares the room; None where there is too little."""
    longest = (
        [max(map(cell_len, column)) for column in zip(*cells[1:], strict=True)] if cells[1:] else [0] * len(figures)
    )
    # A title gives way as far as its longest word.
    least = [max(map(cell_len, name.split()), default=0) for name in cells[0]]
    widths = [max(pair) for pair in zip(longest, least, strict=True)]
    room = width - _GAP * (len(widths) - 1) - sum(w for w, figure in zip(widths, figures, strict=True) if figure)
    flexible = sorted((k for k, figure in enumerate(figures) if not figure), key=lambda k: widths[k])
    for place, k in enumerate(flexible):
        share = room // (len(flexible) - place)
        if share < min(widths[k], _NARROWEST):
            return None
        widths[k] = min(widths[k], share)
        room -= widths[k]
    return widths if room >= 0 else None


def _lines(
    cells: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[bool], looks: Sequence[str]
) -> Iterator[Text]:
    """One row of a table, in as many lines as its longest cell has."""
    for n in range(max(map(len, cells), default=0)):
        line = Text()
        for parts, width, is_right, look in zip(cells, widths, right, looks, strict=True):
            part = parts[n] if n < len(parts) else ""
            space = " " * (width - cell_len(part))
            line.append(f"{space if is_right else ''}{part}{'' if is_right else space}", style=look)
            line.append(" " * _GAP)
        line.rstrip()
        yield line


def _style(cell: Cell) -> str:
    return _STYLES[LOOKS.get(cell.text, "plain")] if isinstance(cell, Word) else ""


def _padded(part: str, width: int) -> str:
    return part + " " * (width - cell_len(part))


def _folded(line: str, width: int) -> list[str]:
    """The text in lines of a width: broken at spaces, in names behind a separator, and anywhere if it must be."""
    lines = [""]
    for word in re.findall(r"\s*\S+", line):
        pieces = [word]
        if cell_len(word.strip()) > width:
            pieces = [chop for piece in re.findall(r"[^/._:-]*[/._:-]?", word) for chop in chop_cells(piece, width)]
        for piece in pieces:
            if cell_len(lines[-1] + piece) <= width:
                lines[-1] += piece
            else:
                lines.append(piece.lstrip())
    return lines if lines[0] or len(lines) == 1 else lines[1:]
