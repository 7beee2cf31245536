"""Comparing a model's outputs with reference outputs, sample by sample, streaming.

Definitions, for an output y and its reference r, both read as float64:

* `max_abs`: the largest |y - r|.
* `max_rel`: the largest, over samples, of (largest |y - r| in the sample) / (largest |r| in the sample).
* `rel`: ||y - r||_F / ||r||_F over all samples. Tolerances are stated in this.

A value that is NaN or infinite must be so in both; otherwise the deviation is infinite. NaN in both shows nothing:
samples with it are counted as not compared, and their rows have no argmax. Outputs that are not numbers (strings) count
as 0 where equal and 1 where not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A comparison takes about 14 times the size of what it compares (float64, and several of them): larger outputs are
# compared in parts.
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Deviation:
    """How far one output is from its reference, in the measures that this module defines."""

    max_abs: float  # in the output's own unit
    max_rel: float
    rel: float
    top1_agreement: float | None  # share of rows with the same argmax over the last axis; None where that means nothing
    samples: int  # run
    nonfinite: int  # of them, with values that could not be compared
    compared: bool  # whether any value was


@dataclass
class OutputDifference:
    """Accumulates the deviation of one output over batches."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    squared_difference: float = 0.0
    squared_reference: float = 0.0
    agreeing: int = 0
    ranked: int = 0
    samples: int = 0
    nonfinite: int = 0
    compared: bool = False

    def update(self, value: NDArray[Any], reference: NDArray[Any], samples: int) -> None:
        """Adds one batch of outputs `[samples, ...]`; of any other shape it is one sample."""
        if value.nbytes > BLOCK_BYTES and value.shape == reference.shape and value.shape[0] == samples > 1:
            for part in (slice(0, samples // 2), slice(samples // 2, samples)):
                self.update(value[part], reference[part], len(value[part]))
            return
        self.samples += samples
        if value.shape != reference.shape:
            self.compared = True
            self.max_abs = self.max_rel = self.squared_difference = math.inf
            return
        y, r = _numbers(value, reference)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where((y == r) | (np.isnan(y) & np.isnan(r)), 0.0, np.abs(y - r))
        difference = np.where(np.isnan(difference), np.inf, difference)
        finite = np.where(np.isfinite(r), r, 0.0)
        if difference.size == 0:
            self.compared = True
            return
        rows = samples if r.ndim > 0 and r.shape[0] == samples else 1
        nothing = np.isnan(y) & np.isnan(r)
        unclear = nothing | (np.isinf(r) & (difference == 0))
        lost = nothing.reshape(rows, -1).any(axis=1) | unclear.reshape(rows, -1).all(axis=1)
        self.nonfinite += int(lost.sum()) if rows == samples else samples * bool(lost[0])
        self.compared |= not bool(unclear.all())
        worst = difference.reshape(rows, -1).max(axis=1)
        scale = np.abs(finite).reshape(rows, -1).max(axis=1)
        relative = np.divide(worst, scale, out=np.where(worst > 0, np.inf, 0.0), where=scale > 0)
        self.max_abs = max(self.max_abs, float(worst.max()))
        self.max_rel = max(self.max_rel, float(relative.max()))
        self.squared_difference += float(np.square(difference).sum())
        self.squared_reference += float(np.square(finite).sum())
        if r.ndim >= 2 and r.shape[-1] >= 2 and np.issubdtype(reference.dtype, np.floating) and not _embeddings(finite):
            same = (y.argmax(axis=-1) == r.argmax(axis=-1))[~np.isnan(r).any(axis=-1)]
            self.agreeing += int(same.sum())
            self.ranked += same.size

    def merge(self, other: OutputDifference) -> None:
        """Adds what another one has accumulated over other samples."""
        self.max_abs, self.max_rel = max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel)
        self.squared_difference += other.squared_difference
        self.squared_reference += other.squared_reference
        self.agreeing += other.agreeing
        self.ranked += other.ranked
        self.samples += other.samples
        self.nonfinite += other.nonfinite
        self.compared |= other.compared

    def result(self) -> Deviation:
        """The deviation over everything added so far."""
        if self.squared_reference > 0:
            rel = math.sqrt(self.squared_difference / self.squared_reference)
        else:
            rel = math.inf if self.squared_difference > 0 else 0.0
        agreement = self.agreeing / self.ranked if self.ranked else None
        figures = (self.max_abs, self.max_rel, rel, agreement, self.samples)
        return Deviation(*figures, self.nonfinite, self.compared)


def _embeddings(values: NDArray[np.float64]) -> bool:
    """Whether rows are vectors of norm 1 with negative entries: their largest entry answers nothing."""
    return bool((values < 0).any() and np.allclose(np.linalg.norm(values, axis=-1), 1, rtol=0, atol=1e-3))


@dataclass
class OutputsDifference:
    """Accumulates the deviation of every output of a model over batches."""

    outputs: dict[str, OutputDifference] = field(default_factory=dict)

    def update(self, values: Mapping[str, NDArray[Any]], references: Mapping[str, NDArray[Any]], samples: int) -> None:
        """Adds one batch of outputs; an output that only one side has deviates infinitely."""
        for name in {**references, **values}:
            entry = self.outputs.setdefault(name, OutputDifference())
            if name in values and name in references:
                entry.update(values[name], references[name], samples)
            else:
                entry.max_abs = entry.max_rel = entry.squared_difference = math.inf
                entry.compared = True

    def merge(self, other: OutputsDifference) -> None:
        """Adds what another one has accumulated over other samples."""
        for name, entry in other.outputs.items():
            self.outputs.setdefault(name, OutputDifference()).merge(entry)

    def results(self) -> dict[str, Deviation]:
        """Deviation by output name."""
        return {name: entry.result() for name, entry in self.outputs.items()}

    def largest_rel(self) -> float:
        """The largest `rel` of any output: what a tolerance is compared with. Infinite when nothing was compared."""
        return max((d.rel for d in self.results().values()), default=math.inf)


def _numbers(value: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    numeric = all(np.issubdtype(a.dtype, np.number) or a.dtype == np.bool_ for a in (value, reference))
    if numeric:
        return value.astype(np.float64), reference.astype(np.float64)
    return (value != reference).astype(np.float64), np.zeros(reference.shape)
