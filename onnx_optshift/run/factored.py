"""Rows of weights with their factorizations: made once, kept as long as the moments that they were made from."""

from __future__ import annotations

from functools import reduce
from weakref import WeakKeyDictionary

import torch

from onnx_optshift.capture.statistics import Moments, StatisticsStore
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.run.checkpoint import content
from onnx_optshift.run.feature_curvature import metric_of
from onnx_optshift.run.spanning import Spanning, representative
from onnx_optshift.run.threads import threads_for
from onnx_optshift.solve.spectrum import Spectrum, factor
from onnx_optshift.solve.weighted_norm import Metric
from onnx_optshift.stats.moments import InputMoments


class Factored:
    """Moments, factorizations and metrics of the rows that meet a weight; asking for one loads its wave.

    Args:
        store: Moments of every tap.
        slopes: Moments of how far earlier weights move the rows of every tap; None where no metric is wanted.
        spanning: Factorizations of taps that needed no more rows, where captures looked for these.

    Attributes:
        threads: That a step of a solver may take at most.
    """

    def __init__(
        self, store: StatisticsStore, slopes: StatisticsStore | None = None, spanning: Spanning | None = None
    ) -> None:
        self._store = store
        self._slopes = slopes
        self._spanning = spanning
        self.threads = torch.get_num_threads()
        # Of the wave that is held. (moments it was made from, factorization): moments captured anew make it stale.
        self._spectra: dict[tuple[Tap, ...], tuple[InputMoments, Spectrum]] = {}
        self._metrics: dict[tuple[Tap, ...], tuple[Metric | None, str]] = {}
        self._hashes: WeakKeyDictionary[InputMoments, str] = WeakKeyDictionary()

    def wave(self, weight: Weight) -> int:
        """Number of the wave that a weight's taps belong to."""
        return self._store.wave_of(weight.uses[0].tap)

    def load(self, weight: Weight) -> None:
        """Has all processes of a run capture what a weight's owner is going to ask for."""
        held = self._store.load(self.wave(weight))
        if self._slopes is not None and any(held[use.tap].rows for use in weight.uses):
            self._slopes.load(self.wave(weight))

    def moments(self, weight: Weight) -> InputMoments:
        """Moments of all rows that meet a weight: those of its uses, stacked."""
        return stacked(self._store.load(self.wave(weight)), weight)

    def spectrum(self, weight: Weight) -> Spectrum:
        """Factorization of the rows that meet a weight."""
        key, held = _key(weight), self._store.load(self.wave(weight))
        if key not in self._spectra or self._spectra[key][0] is not held[key[0]]:
            stale = [k for k, (moments, _) in self._spectra.items() if held.get(k[0]) is not moments]
            for k in stale:
                self._spectra.pop(k)
                self._metrics.pop(k, None)
            with threads_for(weight.groups * weight.d**2, self.threads):
                self._spectra[key] = (held[key[0]], self._stopped(weight) or factor(stacked(held, weight)))
        return self._spectra[key][1]

    def metric(self, weight: Weight) -> tuple[Metric | None, str]:
        """The norm that earlier weights give a weight, or why it is the plain one."""
        if self._slopes is None:
            return None, ""
        key, spectrum = _key(weight), self.spectrum(weight)
        if key not in self._metrics:
            slopes = stacked(self._slopes.load(self.wave(weight)), weight)
            with threads_for(weight.groups * weight.d**2, self.threads):
                self._metrics[key] = metric_of(spectrum, slopes)
        return self._metrics[key]

    def representative(self, weight: Weight) -> bool:
        """Whether the rows say what all rows would: they are all, or were many when the capture ended."""
        return self._stopped(weight) is None or representative(self.moments(weight))

    def hashes(self, weight: Weight) -> list[str]:
        """Of the content of all statistics that a weight's equation is made from."""
        stopped = self._stopped(weight)
        found = [] if stopped is None else [content(stopped.eigenvalues, stopped.basis)]
        for store in (self._store, *((self._slopes,) if self._slopes is not None else ())):
            held = store.load(self.wave(weight))
            found += [self._hash(held[use.tap]) for use in weight.uses]
        return found

    def _hash(self, moments: InputMoments) -> str:
        if moments not in self._hashes:
            self._hashes[moments] = content(*moments.state().values())
        return self._hashes[moments]

    def _stopped(self, weight: Weight) -> Spectrum | None:
        """Factorization of a weight's rows where the capture ended with them, as they span; None elsewhere."""
        if self._spanning is None or len(weight.uses) > 1:
            return None
        tap = weight.uses[0].tap
        moments, spectrum = self._spanning.spectra.get(tap, (None, None))
        return spectrum if moments is self._store.load(self.wave(weight))[tap] else None


def stacked(moments: Moments, weight: Weight) -> InputMoments:
    """Moments of all uses of a weight, as one."""
    return reduce(lambda a, b: a.merge(b), (moments[tap] for tap in _key(weight)))


def _key(weight: Weight) -> tuple[Tap, ...]:
    """What tells apart the rows of weights. Uses at the same tap must count twice: the rows are stacked twice."""
    return tuple(sorted((use.tap for use in weight.uses), key=repr))
