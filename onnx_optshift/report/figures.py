"""Figures for people: three digits, a real minus sign, and a word for what has no number."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
# Outside these, powers of ten are easier to read than zeros.
_SMALL, _LARGE = 1e-3, 1e5
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: object) -> float | None:
    """The number, or None where there is none: not measured, not a number, infinite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value) if math.isfinite(value) else None


def estimate(value: object) -> tuple[float | None, float | None]:
    """A figure and its standard error: of a number, or of a mapping with `value` and `error`."""
    if isinstance(value, Mapping):
        return finite(value.get("value")), finite(value.get("error"))
    return finite(value), None


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and with a power of ten where zeros would hide them."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    if value == 0:
        return "0"
    sign = MINUS if value < 0 else ""
    mantissa, _, power = f"{abs(value):.{digits - 1}e}".partition("e")
    if _SMALL <= abs(value) < _LARGE:
        return sign + f"{abs(value):.{max(digits - 1 - int(power), 0)}f}"
    return f"{sign}{mantissa}×10{str(int(power)).translate(_RAISED)}"


def percent(share: float | None, decimals: int = 2) -> str:
    """A share, 0 to 1, in per cent."""
    if share is None or not math.isfinite(share):
        return number_text(share)
    return f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", MINUS)


def change(before: float | None, after: float | None) -> str:
    """The relative change in per cent; empty where it means nothing."""
    if before is None or after is None or not before or not math.isfinite(before) or not math.isfinite(after):
        return ""
    if before == after:
        return "same"
    share = 100 * (after / before - 1)
    if abs(share) < 0.1:
        return f"{MINUS if share < 0 else '+'}<0.1\N{NO-BREAK SPACE}%"
    decimals = 0 if abs(share) >= 10 else 1
    return f"{MINUS if share < 0 else '+'}{abs(share):.{decimals}f}\N{NO-BREAK SPACE}%"
