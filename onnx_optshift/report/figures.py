"""Single values of a report, and how each reads: three digits, a unit where there is one, a word for what is no number.

Everything is plain ASCII as long as names are, for terminals and pipes; `typeset` gives a page its own signs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from onnx_optshift.report.diagnosis import Estimate

NOTHING = "-"
# Outside these, powers of ten are easier to read than zeros.
_SMALL, _LARGE = 1e-3, 1e5
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Change:
    """A figure before and after; shares, 0 to 1, as per cent."""

    before: float | None
    after: float | None
    is_share: bool = False


@dataclass(frozen=True)
class Percent:
    """A share, 0 to 1, as per cent."""

    share: float | None


@dataclass(frozen=True)
class Name:
    """What a model's author called something: shown whole."""

    text: str


@dataclass(frozen=True)
class Names:
    """Several names, of which a terminal shows the first few."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Word:
    """A status, whose look is found under its word; `mark` points to a remark."""

    text: str
    mark: str = ""


Cell = str | int | float | None | Change | Percent | Estimate | Name | Names | Word


def text(cell: Cell, most_names: int | None = None) -> str:
    """A value as a person reads it.

    Args:
        cell: The value.
        most_names: Names listed before the rest is only counted; None lists all.
    """
    match cell:
        case None:
            return NOTHING
        case str() | Name():
            return printable(cell if isinstance(cell, str) else cell.text)
        case bool():
            return "yes" if cell else "no"
        case float():
            return number(cell)
        case Change():
            return _change(cell)
        case Percent(share):
            return number(share) if share is None or not math.isfinite(share) else f"{100 * share:.2f} %"
        case Estimate(value, error):
            return number(value) if error is None else f"{number(value)} +- {number(error)}"
        case Names(names):
            shown = ", ".join(map(printable, names[:most_names]))
            more = len(names) - most_names if most_names is not None else 0
            return f"{shown} and {more} more" if more > 0 else shown
        case Word(word, mark):
            return f"{printable(word)} {mark}" if mark else printable(word)
        case _:
            return str(cell)


def number(value: float | None) -> str:
    """A number with three significant digits; with two and a power of ten where zeros would hide them."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    if not _SMALL <= abs(value) < _LARGE:
        return f"{value:.1e}"
    power = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{max(2 - power, 0)}f}"


def relative_change(before: float | None, after: float | None) -> str:
    """The relative change in per cent; empty where it means nothing."""
    if before is None or after is None or not before or not math.isfinite(before) or not math.isfinite(after):
        return ""
    if before == after:
        return "same"
    percent = 100 * (after / before - 1)
    if abs(percent) < 0.1:
        return f"{'-' if percent < 0 else '+'}<0.1 %"
    return f"{percent:+.{0 if abs(percent) >= 10 else 1}f} %"


def percentage_points(before: float, after: float) -> str:
    """The difference of two shares in percentage points."""
    return f"{100 * (after - before):+.2f} points" if after != before else "same"


def _change(change: Change) -> str:
    if change.is_share and change.before is not None and change.after is not None:
        points = percentage_points(change.before, change.after)
        return f"{100 * change.before:.2f} -> {100 * change.after:.2f} % ({points})"
    before, after = number(change.before), number(change.after)
    if change.before == change.after or (before == NOTHING and after == NOTHING):
        return before
    relative = relative_change(change.before, change.after)
    return f"{before} -> {after} ({relative})" if relative else f"{before} -> {after}"


def finite(*values: float | None) -> bool:
    """Whether all of them are numbers: measured, and neither infinite nor NaN."""
    return all(value is not None and math.isfinite(value) for value in values)


def mean_change(pairs: Iterable[tuple[float | None, float | None]]) -> tuple[Change, int] | None:
    """Geometric means of figures of several layers, whose sizes differ, and how many had both above zero."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None and finite(a, b) and a > 0 and b > 0]
    if not known:
        return None
    before, after = (math.exp(math.fsum(map(math.log, side)) / len(known)) for side in zip(*known, strict=True))
    return Change(before, after), len(known)


def printable(text: str) -> str:
    """The text with control characters as escapes: a model may neither move the cursor nor colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def typeset(figure: str) -> str:
    """A figure of `text` with the signs of print: minus, arrow, powers of ten, and spaces that do not break."""
    figure = re.sub(
        r"e([+-]\d+)", lambda found: f"×10{str(int(found[1])).translate(_RAISED)}", figure.replace(" %", "\u00a0%")
    )
    return re.sub(r"-(?=[\d<i])", "\u2212", figure.replace("->", "→").replace("+-", "±")).replace(" x ", " × ")
