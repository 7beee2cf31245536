"""What a report consists of, for every renderer: sections of facts, tables, notes and charts.

`detail` marks what a page shows always and a terminal only when it is asked for more.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_optshift.report.figures import Cell

# How the words of a verdict, a status or a check look; other words are plain.
LOOKS = dict.fromkeys(("pass", "passed", "go", "accepted", "chosen", "shifted"), "good")
LOOKS |= dict.fromkeys(("warn", "try small", "rejected"), "warn")
LOOKS |= dict.fromkeys(("fail", "FAILED", "no-go"), "bad")


@dataclass(frozen=True)
class Fact:
    """One labelled value, and a remark that belongs to it."""

    label: str
    value: Cell
    remark: str = ""


@dataclass(frozen=True)
class Facts:
    """Labelled values."""

    rows: tuple[Fact, ...]
    title: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table: figures stand to the right and are never broken, text and names may wrap."""

    title: str
    is_figure: bool = False
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns; a row has a cell for each column."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""  # what the columns mean
    detail: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence or two; `look` as in `LOOKS`, or plain."""

    text: str
    look: str = "plain"
    detail: bool = False


@dataclass(frozen=True)
class ChartOf:
    """A place for the chart with this key, where the report has figures for it."""

    key: str
    detail: bool = True


Block = Facts | Table | Note | ChartOf


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading."""

    key: str
    title: str
    blocks: tuple[Block, ...]


def figures(*titles: str) -> tuple[Column, ...]:
    """Columns of figures."""
    return tuple(Column(title, is_figure=True) for title in titles)
