"""Samples: what a model is run on to see which inputs its layers meet.

Samples come in two kinds, which may be chained. *Stacked* arrays share axis 0, one sample a row, and are cut into
batches of any size. A *feed* is one complete set of model inputs, of any shapes: it is run alone, as it is, and counts
as one sample whatever its leading dimension. What comes from folders and large files is read again on every pass, one
piece at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.errors import InputError

Array = NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Batch:
    """What one run of the model gets.

    Attributes:
        feeds: Array by input name. They may be views of the source's arrays: not to be written to.
        labels: Labels of the real samples, or None. Of a feed, one label, or one for each of its rows.
        indices: Numbers of the real samples in the `Samples` whose `batches` gave this batch, `[rows]`.
        padding: Copies of the last sample at the end, which only fill a fixed batch dimension.
        mask: Input whose zeros mark positions that the model ignores; None where all count.
    """

    feeds: Feeds
    labels: Array | None
    indices: NDArray[np.int64]
    padding: int = 0
    mask: str | None = None

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """Which positions `[rows, positions]` of the real samples count; None where all do."""
        if self.mask is None or self.mask not in self.feeds:
            return None
        values = self.feeds[self.mask]
        return np.asarray(values[: len(values) - self.padding] != 0)

    @property
    def rows(self) -> int:
        """Number of real samples, 1 for a feed. What the model gives beyond them is padding and never counted."""
        return len(self.indices)

    @property
    def size(self) -> int:
        """Number of samples that the model is run on: the real ones and the padding."""
        return self.rows + self.padding


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


class Samples:
    """A re-iterable collection of samples with random access; a selection of it is a view.

    Args:
        parts: What there is, one after the other.
        source: Where the samples come from, for the report and for errors.
        batch: The model's fixed batch size, or None when it takes any.
        synthetic: Whether they are made up.
        notes: What was done to the data on the way in (conversions, ignored arrays), one sentence each.

    Raises:
        InputError: Only some parts have labels, or some have class labels and some targets.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        source: str,
        batch: int | None = None,
        synthetic: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.synthetic = synthetic
        self.notes = list(notes)
        self._parts = list(parts)
        self._batch = batch
        self._mask: str | None = None
        self._first = 0  # what batches call the first sample
        self._starts = np.cumsum([0] + [part.rows for part in parts], dtype=np.int64)
        self._order = np.arange(self._starts[-1], dtype=np.int64)  # sample numbers over all parts
        # Of inputs alone, and of inputs with labels, by sample number over all parts; shared by all views.
        self._digests: dict[int, tuple[bytes, bytes]] = {}
        kinds = {"none" if part.labels is None else part.labels.dtype.name for part in parts}
        if len(kinds) > 1:
            raise InputError(
                f"{source}: the parts of the data disagree about labels ({', '.join(sorted(kinds))}). Give every part "
                "integer class labels, or every part float targets, or leave labels out everywhere."
            )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def labels(self) -> Array | None:
        """Integer class labels or float targets, `[samples, ...]`; None without, or with one for each row of feeds."""
        found = [part.labels for part in self._parts if part.labels is not None and len(part.labels) == part.rows]
        if len(found) < len(self._parts) or len({labels.shape[1:] for labels in found}) != 1:
            return None
        labels: Array = np.concatenate(found)[self._order]
        return labels

    @property
    def classes(self) -> int | None:
        """Number of distinct class labels; None without integer labels."""
        found = [
            part.labels[rows] if part.stacked else part.labels
            for part, rows, _ in self._stretches()
            if part.labels is not None and part.labels.dtype.kind == "i"
        ]
        return len(np.unique(np.concatenate(found))) if found else None

    @property
    def fingerprint(self) -> str:
        """sha256 over names, types, shapes, bytes, labels and order of the samples, however they are stored.

        A stacked row counts as the feed of leading dimension 1 that it would be. A sample is read once for all views.
        """
        return hashlib.sha256(b"samples, version 2\n" + b"".join(full for _, full in self._digested())).hexdigest()

    @property
    def arrangement(self) -> str:
        """What besides the batch size decides which samples are run together, and at which positions they count."""
        stretches = [(part.stacked, len(rows)) for part, rows, _ in self._stretches()]
        runs = [(kind, sum(n for _, n in run)) for kind, run in groupby(stretches, key=lambda stretch: stretch[0])]
        return f"batch {self._batch}, mask {self._mask!r}, stacked {runs}{f', from {self._first}' * (self._first > 0)}"

    @property
    def distinct(self) -> int:
        """Number of samples with different inputs, whatever their labels; reads no sample that `fingerprint` read."""
        return len({inputs for inputs, _ in self._digested()})

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Samples:
        """A view of the samples with these numbers, in the order given; the same sample may come twice.

        Raises:
            IndexError: There is no such sample.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"sample numbers {chosen.min()} to {chosen.max()} of {len(self)} samples")
        view = copy(self)
        view._order, view._first = self._order[chosen], 0
        return view

    def spread(self, most: int) -> Samples:
        """A view of so many samples at most, evenly spaced."""
        return self.select(np.unique(np.linspace(0, len(self) - 1, most).round().astype(int)))

    def share(self, number: int, of: int, batch_size: int) -> Samples:
        """A view of one of several shares: whole batches, one after the other, that keep their samples' numbers.

        Shares differ by one batch at most; the first ones are the larger ones, and the last ones may be empty.
        """
        size = self._batch or batch_size
        batches = -(-len(self) // size)
        first, last = (k * (batches // of) + min(k, batches % of) for k in (number, number + 1))
        start, stop = (min(len(self), size * batch) for batch in (first, last))
        view = self.select(np.arange(start, stop))
        view._first = self._first + start
        return view

    def masked(self, name: str) -> Samples:
        """A view whose batches say which positions the zeros of an input mask."""
        view = copy(self)
        view._mask = name
        return view

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The samples in order, in batches; at most the arrays of one batch and of one file are alive.

        Where the model fixes its batch dimension, stacked samples come in batches of exactly that size, whatever
        `batch_size` says; the last one is filled up with copies of its last sample. Where it does not, a batch has
        fewer than `batch_size` samples at the end, before a feed, and where shapes change. A feed is its own batch.

        Raises:
            InputError: `batch_size` is not positive, or a file cannot be read again.
        """
        if batch_size < 1:
            raise InputError(f"batch size: expected at least 1, found {batch_size}.")
        return (replace(batch, mask=self._mask) for batch in self._batches(self._batch or batch_size))

    def _batches(self, size: int) -> Iterator[Batch]:
        held: list[Batch] = []  # pieces of the batch in the making
        for part, rows, positions in self._stretches():
            feeds = part.read()
            start = 0
            positions = positions + self._first
            while start < len(rows):
                stop = start + size - sum(piece.rows for piece in held) if part.stacked else start + 1
                piece = _piece(part, feeds, rows[start:stop], positions[start:stop])
                if held and not (part.stacked and _layout(piece) == _layout(held[0])):
                    yield self._joined(held)
                    held = []
                    continue
                start += piece.rows
                if not part.stacked:
                    yield piece
                    continue
                held.append(piece)
                if sum(piece.rows for piece in held) == size:
                    yield self._joined(held)
                    held = []
            del feeds, piece  # else they would live on while the next file is read
        if held:
            yield self._joined(held)

    def _joined(self, pieces: Sequence[Batch]) -> Batch:
        rows = sum(piece.rows for piece in pieces)
        padding = self._batch - rows if self._batch else 0
        if len(pieces) == 1 and not padding:
            return pieces[0]
        feeds: Feeds = {}
        for name in pieces[0].feeds:
            arrays = [piece.feeds[name] for piece in pieces]
            feeds[name] = np.concatenate([*arrays, np.repeat(arrays[-1][-1:], padding, axis=0)])
        labels = [piece.labels for piece in pieces if piece.labels is not None]
        indices = np.concatenate([piece.indices for piece in pieces])
        return Batch(feeds, np.concatenate(labels) if labels else None, indices, padding)

    def _stretches(self) -> Iterator[tuple[Part, NDArray[np.int64], NDArray[np.int64]]]:
        """(part, rows in it, positions in this view) for each stretch of samples of the same part."""
        owner = np.searchsorted(self._starts, self._order, side="right") - 1
        cuts = np.flatnonzero(np.diff(owner)) + 1
        for positions in np.split(np.arange(len(self._order), dtype=np.int64), cuts):
            if len(positions):
                number = int(owner[positions[0]])
                yield self._parts[number], self._order[positions] - self._starts[number], positions

    def _digested(self) -> list[tuple[bytes, bytes]]:
        """Two digests of each sample; samples that no view has digested yet are read now."""
        for part, rows, positions in self._stretches():
            numbers = self._order[positions].tolist()
            fresh = {number: row for number, row in zip(numbers, rows, strict=True) if number not in self._digests}
            feeds = part.read() if fresh else {}
            for number, row in fresh.items():
                one = slice(row, row + 1) if part.stacked else slice(None)
                digest = hashlib.sha256()
                for name in sorted(feeds):
                    _digest(digest, name, feeds[name][one] if part.stacked else feeds[name])
                inputs = digest.digest()
                if part.labels is not None:
                    _digest(digest, "\n", part.labels[one])
                self._digests[number] = inputs, digest.digest()
            del feeds  # else they would live on while the next file is read
        return [self._digests[number] for number in self._order.tolist()]


def _piece(part: Part, feeds: Feeds, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
    if not part.stacked:
        return Batch(dict(feeds), part.labels, positions)
    # A slice is a view where an index array is a copy.
    consecutive = np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
    chosen = slice(rows[0], rows[0] + len(rows)) if consecutive else rows
    labels = None if part.labels is None else part.labels[chosen]
    return Batch({name: array[chosen] for name, array in feeds.items()}, labels, positions)


def _layout(piece: Batch) -> object:
    """What two pieces must have in common to be rows of one batch."""
    arrays = {name: (array.dtype, array.shape[1:]) for name, array in piece.feeds.items()}
    return arrays, None if piece.labels is None else piece.labels.shape[1:]


def _digest(digest: hashlib._Hash, name: str, array: Array) -> None:
    text = array.dtype.kind in "OUS"  # the width of a text array's elements depends on its longest one
    digest.update(f"{name!r} {'text' if text else array.dtype.name} {array.shape}\n".encode())
    digest.update(repr(array.tolist()).encode() if text else array.tobytes())
