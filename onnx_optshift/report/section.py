"""What a report consists of, for every renderer: sections of facts, tables and notes.

`detail` marks what a page shows always and a terminal only when it is asked for more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from onnx_optshift.report.figures import Cell, Word, is_figure

# How the words of a verdict, a status or a check look; other words are plain.
_LOOKS = dict.fromkeys(("pass", "passed", "go", "accepted", "chosen", "shifted"), "good")
_LOOKS |= dict.fromkeys(("warn", "try small", "rejected"), "warn") | dict.fromkeys(("fail", "FAILED", "no-go"), "bad")


class Fact(NamedTuple):
    """One labelled value, and a remark that belongs to it."""

    label: str
    value: Cell
    remark: str = ""


@dataclass(frozen=True)
class Facts:
    """Labelled values."""

    rows: Sequence[Fact]
    title: str = ""
    detail: bool = False

    @property
    def known(self) -> Facts:
        """Those with a value."""
        return replace(self, rows=[row for row in self.rows if row.value is not None])


@dataclass(frozen=True)
class Table:
    """Rows with a cell for each title."""

    titles: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""  # what the columns mean
    detail: bool = False
    more: str = ""  # title of a column that is a detail
    drawn: str = ""  # title of a column whose figures a page draws too

    @property
    def figures(self) -> list[bool]:
        """Whether each column holds figures, which stand to the right and are never broken; text may wrap."""
        return [all(is_figure(row[k]) for row in self.rows) for k in range(len(self.titles))]

    @property
    def known(self) -> Table:
        """The table without columns that have nothing in any row."""
        kept = [k for k in range(len(self.titles)) if any(row[k] is not None for row in self.rows)]
        rows = [[row[k] for k in kept] for row in self.rows]
        return replace(self, titles=[self.titles[k] for k in kept], rows=rows)


@dataclass(frozen=True)
class Note:
    """A sentence or two; `look` is good, warn, bad or plain."""

    text: str
    look: str = "plain"
    detail: bool = False


Block = Facts | Table | Note


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading."""

    key: str
    title: str
    blocks: Sequence[Block]

    @property
    def known(self) -> Section:
        """The section without rows, columns and blocks that say nothing."""
        blocks = [block.known if isinstance(block, (Facts, Table)) else block for block in self.blocks]
        return replace(self, blocks=[block for block in blocks if isinstance(block, Note) or block.rows])


def look(cell: Cell) -> str:
    """How a value looks: good, warn, bad or plain."""
    return _LOOKS.get(cell.partition(" [")[0], "plain") if isinstance(cell, Word) else "plain"


def marks(reasons: Iterable[str]) -> dict[str, str]:
    """A mark for each different reason, by which a table points to it."""
    return {reason: f"[{k}]" for k, reason in enumerate(dict.fromkeys(reasons), 1)}


def explained(marked: dict[str, str], title: str = "", *, detail: bool = False) -> Facts:
    """The reasons beside their marks."""
    return Facts([Fact(mark, reason) for reason, mark in marked.items()], title, detail)
