"""Errors a user can meet. Every message says what, where, expected and found, and what to do next.

Imports nothing, so that any module may raise them.
"""


class OptShiftError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the command line's status."""

    exit_code = 2


class InputError(OptShiftError):
    """The model, the data or an option cannot be used. Nothing was written."""


class DeviceError(OptShiftError):
    """The device or execution provider that was asked for is unavailable. Nothing was written."""


class ToleranceError(OptShiftError):
    """The outputs left the tolerance and backing off did not help. Nothing was written."""

    exit_code = 3


class OptShiftWarning(UserWarning):
    """A result that should not be relied on as it is, such as one from made-up data."""


def closest(name: str, candidates: list[str], limit: int = 3) -> str:
    """A hint such as ` Close matches: 'a', 'b'.` for what a user wrote, or an empty string when nothing is close."""
    import difflib  # only needed on the way to an error message

    matches = difflib.get_close_matches(name, candidates, n=limit, cutoff=0.5)
    folded = [c for c in candidates if name.casefold() in c.casefold() and c not in matches]
    matches = (matches + folded)[:limit]
    return f" Close matches: {', '.join(repr(m) for m in matches)}." if matches else ""
