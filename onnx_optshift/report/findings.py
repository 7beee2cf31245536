"""Findings of any shape as facts and tables: what a diagnosis measured, without knowing which figures there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from onnx_optshift.report.figures import number_text

# A figure of two models, on the same terms.
_SIDES = ("before", "after", "change")
# More values than this are summed up: the JSON report has them all.
_MOST_LISTED = 12


@dataclass(frozen=True)
class Table:
    """Rows under named columns; cells are plain values, estimates (`value`, `error`) or None."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Findings:
    """What a mapping holds: single facts by label, and tables."""

    facts: tuple[tuple[str, Any], ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Verdict:
    """What a diagnosis advises: the answer, one sentence why, and its checklist."""

    answer: str
    why: str
    checks: Table | None


def verdict(*sources: Mapping[str, Any] | None) -> Verdict | None:
    """The verdict in the first mapping that has one: a word, or a mapping with `answer`, `why` and `checks`."""
    for source in sources:
        found = (source or {}).get("verdict")
        if isinstance(found, str):
            found = {"answer": found}
        if isinstance(found, Mapping):
            rows = found.get("checks") or (source or {}).get("checks")
            checks = _table("Checklist", rows) if _is_rows(rows) else None
            return Verdict(str(found.get("answer", "")), str(found.get("why", "")), checks)
    return None


def findings(source: Mapping[str, Any] | None) -> Findings | None:
    """Everything else that the mapping holds; None when there is nothing."""
    rest = {key: value for key, value in (source or {}).items() if key not in {"verdict", "checks"}}
    if not rest:
        return None
    facts: list[tuple[str, Any]] = []
    tables: list[Table] = []
    _collect(rest, "", facts, tables)
    return Findings(tuple(facts), tuple(tables))


def _collect(source: Mapping[str, Any], prefix: str, facts: list[tuple[str, Any]], tables: list[Table]) -> None:
    pairs = []
    for key, value in source.items():
        stem = key.removesuffix("_before")
        label = prefix + _words(key)
        if _is_comparison(value):
            pairs.append((label, *(value.get(side) for side in _SIDES)))
        elif key != stem and f"{stem}_after" in source and _is_cell(value):
            pairs.append((prefix + _words(stem), value, source[f"{stem}_after"], None))
        elif key.endswith("_after") and _is_cell(source.get(key.removesuffix("_after") + "_before", [])):
            continue
        elif _is_cell(value):
            facts.append((label, value))
        elif _is_rows(value):
            tables.append(_table(label, value))
        elif isinstance(value, Mapping) and any(not _is_cell(inner) for inner in value.values()):
            _collect(value, f"{label}: ", facts, tables)
        else:
            facts.append((label, _listed(value)))
    if pairs:
        # A column that holds nothing says nothing.
        kept = [k for k in range(4) if k == 0 or any(row[k] is not None for row in pairs)]
        columns = ("figure", *_SIDES)
        rows = tuple(tuple(row[k] for k in kept) for row in pairs)
        tables.insert(0, Table(prefix.rstrip(": "), tuple(columns[k] for k in kept), rows))


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with the union of their keys as columns; a comparison takes a column for each side that it has."""
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for key, value in row.items():
            if _is_comparison(value):
                cells |= {f"{key} {side}": value[side] for side in _SIDES if value.get(side) is not None}
            else:
                cells[key] = value if _is_cell(value) else _listed(value)
        flat.append(cells)
    keys = list(dict.fromkeys(key for cells in flat for key in cells))
    return Table(title, tuple(map(_words, keys)), tuple(tuple(cells.get(key) for key in keys) for cells in flat))


def _is_cell(value: object) -> bool:
    """Whether a value fits into one cell: anything single, or a figure with its error."""
    if isinstance(value, Mapping):
        return "value" in value and set(value) <= {"value", "error"}
    return not isinstance(value, (list, tuple))


def _is_comparison(value: object) -> bool:
    return isinstance(value, Mapping) and "before" in value and set(value) <= set(_SIDES)


def _is_rows(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _listed(value: Any) -> str:
    """Several values as one text."""
    named = isinstance(value, Mapping)
    texts = [_single(item) for item in (value.values() if named else value)]
    items = [f"{key}: {text}" for key, text in zip(value, texts, strict=True)] if named else texts
    if len(items) <= _MOST_LISTED:
        return ", ".join(items)
    numbers = [item for item in (value.values() if named else value) if isinstance(item, (int, float))]
    between = f", from {min(numbers):g} to {max(numbers):g}" if len(numbers) == len(items) else ""
    return f"{len(items)} values{between}"


def _single(value: object) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


def _words(key: str) -> str:
    return str(key).replace("_", " ")
