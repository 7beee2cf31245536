"""Samples: what a model is run on to see which inputs its layers meet.

Samples come in two kinds, which may be chained. *Stacked* arrays share axis 0, one sample a row, and are cut into
batches of any size. A *feed* is one complete set of model inputs, of any shapes: it is run alone, as it is, and counts
as one sample whatever its leading dimension. Feeds that come from folders are read again on every pass, one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.errors import InputError

Array = NDArray[Any]
Feeds = dict[str, Array]
Dim = int | str | None

# Names that exporters give to every dimension they know nothing of, so that equal names do not mean equal sizes.
_ANONYMOUS = frozenset({"", "?", "None", "none", "-1", "unk", "unknown", "dynamic"})


@dataclass(frozen=True)
class InputSpec:
    """One input of the model, as far as the model file tells.

    Attributes:
        name: The input's name.
        dtype: Element type; None when it is not a tensor or not known.
        shape: A size, a symbol or None (unknown) for each axis; None when even the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[Dim, ...] | None

    @property
    def dims(self) -> tuple[int | str | None, ...] | None:
        """The shape with symbols that stand for anything (such as `?`) as None."""
        return None if self.shape is None else tuple(None if dim in _ANONYMOUS else dim for dim in self.shape)

    def __str__(self) -> str:
        kind = "unknown type" if self.dtype is None else "string" if self.dtype.kind in "OUS" else self.dtype.name
        shape = (
            "[any shape]" if self.dims is None else f"[{', '.join('?' if d is None else str(d) for d in self.dims)}]"
        )
        return f"{self.name}: {kind}{shape}"


def describe(inputs: Sequence[InputSpec]) -> str:
    """The model's inputs for a message, such as `ids: int64[batch, ?], mask: bool[batch, 8]`."""
    return ", ".join(map(str, inputs)) or "no inputs"


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """Size of the batch axis when the model fixes it, else None.

    Where inputs fix their leading dimension differently there is no common batch axis, and None is returned too.
    """
    leads = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    return leads.pop() if len(leads) == 1 else None


def why_feeds(inputs: Sequence[InputSpec]) -> str | None:
    """Why arrays for these inputs can only be one feed, or None when axis 0 can number the samples."""
    known = [(spec.name, spec.dims) for spec in inputs if spec.dims is not None]
    for name, dims in known:
        if not dims:
            return f"input {name!r} is a scalar"
    leads = {dims[0] for _, dims in known if dims}
    if len({lead for lead in leads if isinstance(lead, int)}) > 1:
        return "the inputs fix different leading dimensions"
    for name, dims in known:
        for axis, dim in enumerate(dims[1:], start=1):
            if isinstance(dim, str) and dim in leads:
                return f"leading dimension {dim!r} is also axis {axis} of input {name!r}"
    return None


@dataclass(frozen=True, eq=False)
class Batch:
    """What one run of the model gets.

    Attributes:
        feeds: Array by input name. They may be views of the source's arrays: not to be written to.
        labels: Labels of the real samples, or None. Of a feed, one label, or one for each of its rows.
        indices: Numbers of the real samples in the `Samples` whose `batches` gave this batch, `[samples]`.
        padding: Copies of the last sample at the end, which only fill a fixed batch dimension.
    """

    feeds: Feeds
    labels: Array | None
    indices: NDArray[np.int64]
    padding: int = 0


@dataclass(frozen=True, eq=False)
class Part:
    """Samples that are read together: one set of stacked arrays, or one feed.

    Attributes:
        rows: Number of samples; 1 for a feed.
        stacked: Whether axis 0 of every array numbers the samples.
        read: Gives the arrays, checked; reads them from disk where they live there.
        labels: `[rows, ...]`, or of a feed `[1]` or one for each of its rows; None without labels.
    """

    rows: int
    stacked: bool
    read: Callable[[], Feeds]
    labels: Array | None = None


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows of one part on their way into a batch."""

    feeds: Feeds
    labels: Array | None
    positions: NDArray[np.int64]

    def fits(self, other: _Piece) -> bool:
        """Whether the two can be rows of one batch."""
        return _layout(self.feeds, self.labels) == _layout(other.feeds, other.labels)


class Samples:
    """A re-iterable collection of samples with random access; a selection of it is a view.

    Attributes:
        source: Where the samples come from, for the report.
        synthetic: Whether they are made up.
        notes: What was done to the data on the way in (conversions, ignored arrays), one sentence each.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        source: str,
        batch: int | None = None,
        synthetic: bool = False,
        notes: Sequence[str] = (),
        order: NDArray[np.int64] | None = None,
    ) -> None:
        """Puts parts one after the other.

        Args:
            parts: What there is.
            source: Where it comes from, for the report and for errors.
            batch: The model's fixed batch size, or None when it takes any.
            synthetic: Whether the samples are made up.
            notes: What was done to the data on the way in.
            order: Sample numbers over all parts, `[samples]`; None for every sample once, in order.

        Raises:
            InputError: Only some parts have labels, or some have class labels and some targets.
        """
        self.source = source
        self.synthetic = synthetic
        self.notes = list(notes)
        self._parts = list(parts)
        self._batch = batch
        self._starts = np.cumsum([0] + [part.rows for part in parts], dtype=np.int64)
        self._order = np.arange(self._starts[-1], dtype=np.int64) if order is None else order
        self._fingerprint: str | None = None
        kinds = {None if part.labels is None else part.labels.dtype for part in parts}
        if len(kinds) > 1:
            found = ", ".join(sorted("none" if kind is None else kind.name for kind in kinds))
            raise InputError(
                f"{source}: the parts of the data disagree about labels ({found}). Give every part integer class "
                "labels, or every part float targets, or leave labels out everywhere."
            )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def labels(self) -> Array | None:
        """Integer class labels or float targets, `[samples, ...]`.

        None without labels, and also when feeds carry one label per row: those only come with their batches.
        """
        found = [part.labels for part in self._parts if part.labels is not None]
        if not found or any(len(part.labels) != part.rows for part in self._parts if part.labels is not None):
            return None
        if len({labels.shape[1:] for labels in found}) > 1:
            return None
        labels: Array = np.concatenate(found)[self._order]
        return labels

    @property
    def classes(self) -> int | None:
        """Number of distinct class labels; None without integer labels."""
        found: list[Array] = []
        for part, rows, _ in self._runs():
            if part.labels is None or part.labels.dtype.kind != "i":
                return None
            found.append(part.labels[rows] if part.stacked else part.labels)
        return len(np.unique(np.concatenate(found))) if found else None

    @property
    def parts(self) -> list[Part]:
        """The samples of this view as parts, for chaining with others."""
        if np.array_equal(self._order, np.arange(self._starts[-1])):
            return list(self._parts)
        return [piece for part, rows, _ in self._runs() for piece in _taken(part, rows)]

    @property
    def fingerprint(self) -> str:
        """sha256 over names, types, shapes, bytes, labels and order of the samples, however they are stored.

        A row of stacked arrays counts as the feed of leading dimension 1 that it would be. Computed once, on demand,
        in one pass over the data.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(b"samples, version 1\n")
            for part, rows, _ in self._runs():
                feeds = part.read()
                for row in rows:
                    for name in sorted(feeds):
                        _digest(digest, name, feeds[name][row : row + 1] if part.stacked else feeds[name])
                    if part.labels is not None:
                        _digest(digest, "\n", part.labels[row : row + 1] if part.stacked else part.labels)
                    digest.update(b"\n")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Samples:
        """A view of some samples, in the order given; the same sample may come twice.

        Args:
            indices: Sample numbers in this collection, `[chosen]`.

        Raises:
            IndexError: There is no such sample.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"sample numbers {chosen.min()} to {chosen.max()} of {len(self)} samples")
        return Samples(
            self._parts,
            source=self.source,
            batch=self._batch,
            synthetic=self.synthetic,
            notes=self.notes,
            order=self._order[chosen],
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The samples in order, in batches; at most the arrays of one batch and of one file are alive.

        Where the model fixes its batch dimension, stacked samples come in batches of exactly that size, whatever
        `batch_size` says; the last one is filled up with copies of its last sample. A feed is its own batch.

        Args:
            batch_size: Stacked samples per batch; fewer at the end, before a feed, and where shapes change.

        Raises:
            InputError: `batch_size` is not positive, or a file cannot be read again.
        """
        if batch_size < 1:
            raise InputError(f"batch size: expected at least 1, found {batch_size}.")
        size = self._batch or batch_size
        held: list[_Piece] = []
        room = size
        for part, rows, positions in self._runs():
            feeds = part.read()
            if not part.stacked:
                if held:
                    yield self._join(held)
                    held, room = [], size
                for position in positions:
                    yield Batch(dict(feeds), part.labels, np.array([position]))
                del feeds
                continue
            start = 0
            while start < len(rows):
                piece = _cut(part, feeds, rows[start : start + room], positions[start : start + room])
                if held and not held[0].fits(piece):
                    yield self._join(held)
                    held, room = [], size
                    continue
                held.append(piece)
                room -= len(piece.positions)
                start += len(piece.positions)
                if room == 0:
                    yield self._join(held)
                    held, room = [], size
            del feeds, piece  # else they would live on while the next file is read
        if held:
            yield self._join(held)

    def _join(self, pieces: Sequence[_Piece]) -> Batch:
        indices = np.concatenate([piece.positions for piece in pieces])
        padding = self._batch - len(indices) if self._batch else 0
        feeds: Feeds = {}
        for name in pieces[0].feeds:
            arrays = [piece.feeds[name] for piece in pieces]
            if padding:
                arrays.append(np.repeat(arrays[-1][-1:], padding, axis=0))
            feeds[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        labels = [piece.labels for piece in pieces if piece.labels is not None]
        return Batch(feeds, np.concatenate(labels) if labels else None, indices, padding)

    def _runs(self) -> Iterator[tuple[Part, NDArray[np.int64], NDArray[np.int64]]]:
        """(part, rows in it, positions in this view) for each stretch of samples of the same part."""
        owner = np.searchsorted(self._starts, self._order, side="right") - 1
        stretches = np.flatnonzero(np.diff(owner)) + 1
        for positions in np.split(np.arange(len(self._order), dtype=np.int64), stretches):
            if len(positions):
                number = int(owner[positions[0]])
                yield self._parts[number], self._order[positions] - self._starts[number], positions


def _cut(part: Part, feeds: Feeds, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> _Piece:
    return _Piece(_at(feeds, rows), None if part.labels is None else part.labels[rows], positions)


def _at(feeds: Feeds, rows: NDArray[np.int64]) -> Feeds:
    """Rows of every array; a view, not a copy, when they are consecutive."""
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return {name: array[rows[0] : rows[0] + len(rows)] for name, array in feeds.items()}
    return {name: array[rows] for name, array in feeds.items()}


def _taken(part: Part, rows: NDArray[np.int64]) -> list[Part]:
    if not part.stacked:
        return [part] * len(rows)
    labels = None if part.labels is None else part.labels[rows]
    return [Part(len(rows), True, lambda: _at(part.read(), rows), labels)]


def _layout(feeds: Feeds, labels: Array | None) -> dict[str, object]:
    layout: dict[str, object] = {name: (array.dtype, array.shape[1:]) for name, array in feeds.items()}
    return layout | {"\n": None if labels is None else labels.shape[1:]}


def _digest(digest: hashlib._Hash, name: str, array: Array) -> None:
    text = array.dtype.kind in "OUS"  # the width of a text array's elements depends on its longest one
    digest.update(f"{name!r} {'text' if text else array.dtype.name} {array.shape}\n".encode())
    digest.update(repr(array.tolist()).encode() if text else array.tobytes())
