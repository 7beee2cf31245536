"""How each value of a report reads: three digits, a unit where there is one, a word for what is no number.

Everything is plain ASCII as long as names are, for terminals and pipes; `typeset` gives a page its own signs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

NOTHING = "-"
# Outside these, powers of ten are easier to read than zeros.
_SMALL, _LARGE = 1e-3, 1e5
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Figure(str):
    """A figure in its final form, with its unit: never broken, and to the right in a table.

    A page may draw below it: `sizes` as one bar, or one before and one after; `curve` as a line, whose x is 0 to 1,
    and which is marked at the x `mark`.
    """

    sizes: tuple[float | None, ...] = ()
    curve: tuple[float, ...] = ()
    mark: float = 0.0


def drawn(shown: str, *sizes: float | None, curve: tuple[float, ...] = (), mark: float = 0.0) -> Figure:
    """A figure with what a page draws below it."""
    figure = Figure(shown)
    figure.sizes, figure.curve, figure.mark = sizes, curve, mark
    return figure


class Name(str):
    """What a model's author called something: shown whole."""

    __slots__ = ()


class Word(str):
    """A status that has a look of its own; a mark behind it, as in "rejected [1]", points to a remark."""

    __slots__ = ()


# A tuple holds names, of which a terminal shows the first few. Plain text is prose.
Cell = str | float | None | tuple[str, ...]


def is_figure(cell: Cell) -> bool:
    """Whether a value belongs into a column of figures."""
    return cell is None or isinstance(cell, (float, int, Figure))


def text(cell: Cell, most_names: int | None = None) -> str:
    """A value as a person reads it; more than `most_names` names are only counted."""
    if cell is None:
        return NOTHING
    if isinstance(cell, float):
        return number(cell)
    if isinstance(cell, tuple):
        more = len(cell) - len(cell[:most_names])
        return ", ".join(map(printable, cell[:most_names])) + f" and {more} more" * (more > 0)
    return printable(str(cell))


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
    if before is None or after is None or not before or not finite(before, after):
        return ""
    if before == after:
        return "same"
    percent = 100 * (after / before - 1)
    if abs(percent) < 0.1:
        return f"{'-' if percent < 0 else '+'}<0.1 %"
    return f"{percent:+.{0 if abs(percent) >= 10 else 1}f} %"


def change(before: float | None, after: float | None) -> Cell:
    """A figure before and after, as one where they are the same; that before where there is no other."""
    if after is None or before is None:
        return before
    relative = relative_change(before, after)
    both = f"{number(before)} -> {number(after)}" + f" ({relative})" * bool(relative)
    return drawn(number(before) if before == after else both, before, after)


def percent(share: float | None) -> Cell:
    """A share, 0 to 1, as per cent."""
    return share if share is None or not math.isfinite(share) else drawn(f"{100 * share:.2f} %", share)


def share_change(before: float, after: float) -> Cell:
    """Two shares, 0 to 1, as per cent, with their difference."""
    points = f"{100 * (after - before):+.2f} points" if after != before else "same"
    return Figure(f"{100 * before:.2f} -> {100 * after:.2f} % ({points})")


def with_error(value: float | None, error: float | None) -> Cell:
    """A figure and its standard error, where that is known."""
    return value if error is None else Figure(f"{number(value)} +- {number(error)}")


def finite(*values: float | None) -> bool:
    """Whether all of them are numbers: measured, and neither infinite nor NaN."""
    return all(value is not None and math.isfinite(value) for value in values)


def mean_change(pairs: Iterable[tuple[float | None, float | None]]) -> tuple[Cell, int] | None:
    """The change of geometric means over layers, whose sizes differ, and how many have both figures above zero."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None and finite(a, b) and a > 0 and b > 0]
    if not known:
        return None
    before, after = (math.exp(math.fsum(map(math.log, side)) / len(known)) for side in zip(*known, strict=True))
    return change(before, after), len(known)


def printable(text: str) -> str:
    """The text with control characters as escapes: a model may neither move the cursor nor colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def typeset(figure: str) -> str:
    """A figure of `text` with the signs of print: minus, arrow, powers of ten, and spaces that do not break."""
    figure = re.sub(r"e([+-]\d+)", lambda found: f"×10{str(int(found[1])).translate(_RAISED)}", figure)
    figure = figure.replace(" %", "\u00a0%").replace("->", "→").replace("+-", "±").replace(" x ", " × ")
    return re.sub(r"-(?=[\d<i])", "\u2212", figure)
