"""Taps whose rows leave no weight a second solution: an exact run needs no more of them.

Rows that follow can only raise a rank, so once they span every direction `A W = A V` stays without freedom whatever
comes. Figures that describe the layer beside that, such as what a tolerance would buy, are estimates from the rows that
were seen, and are given only where these are `REPRESENTATIVE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.solve.problem import ROUNDING_UNIT
from onnx_optshift.solve.spectrum import Coordinates, Spectrum, factor
from onnx_optshift.stats.moments import InputMoments

# Rows for each direction from which on a few more change no figure that is shown.
REPRESENTATIVE = 4
# Rows that follow may bring outputs so much larger that small directions fall below their rounding: so many times what
# counts as rounding must be cleared.
MARGIN = 32.0
# Looking costs a Cholesky factorization: only where rows have become more by this factor since the last time.
GROWTH = 1.25


class Spanning:
    """Notices during a pass which taps have rows enough.

    Args:
        weights: That read the taps.
        content: Reads an initializer by name.
        device: The torch device of the moments.

    Attributes:
        spectra: Of taps that have: the moments at that time and their factorization, by tap.
    """

    def __init__(
        self, weights: Iterable[Weight], content: Callable[[str], NDArray[np.generic]], device: str = "cpu"
    ) -> None:
        self._readers: dict[Tap, list[Weight]] = {}
        for weight in weights:
            for tap in dict.fromkeys(use.tap for use in weight.uses):
                self._readers.setdefault(tap, []).append(weight)
        self._content = content
        self._device = device
        self.spectra: dict[Tap, tuple[InputMoments, Spectrum]] = {}
        self._looked: dict[Tap, int] = {}  # rows at the last look

    def begin(self) -> None:
        """Another pass begins: nothing is known of its rows."""
        self.spectra.clear()
        self._looked.clear()

    @property
    def key(self) -> str:
        """What decides when rows are enough, besides the weights themselves."""
        return f"until full rank of {[weight.name for readers in self._readers.values() for weight in readers]}"

    def state(self) -> dict[str, Tensor]:
        """All that is known, as tensors by `tap.key/field`."""
        found = {f"{tap.key}/looked": torch.tensor([rows]) for tap, rows in self._looked.items()}
        for tap, (_, spectrum) in self.spectra.items():
            counts = torch.tensor([spectrum.rows, spectrum.width])
            parts = {"eigenvalues": spectrum.eigenvalues, "basis": spectrum.basis, "spectrum": counts}
            found |= {f"{tap.key}/{field}": tensor for field, tensor in parts.items()}
        return found

    def restore(self, moments: Mapping[Tap, InputMoments], state: Mapping[str, Tensor]) -> None:
        """Knows what was known when `state` was taken, of these moments as they were then."""
        self.begin()
        for tap, found in moments.items():
            if (looked := state.get(f"{tap.key}/looked")) is not None:
                self._looked[tap] = int(looked)
            if (counts := state.get(f"{tap.key}/spectrum")) is not None:
                values, basis = (
                    state[f"{tap.key}/{field}"].to(found.device, copy=True) for field in ("eigenvalues", "basis")
                )
                self.spectra[tap] = (found, Spectrum(values, basis, *map(int, counts)))

    def open(self, taps: Iterable[Tap]) -> list[Tap]:
        """Those of some taps whose rows leave freedom so far."""
        return [tap for tap in taps if tap not in self.spectra]

    def wanted(self, moments: Mapping[Tap, InputMoments]) -> list[Tap]:
        """Taps of which more rows are wanted; none once all of them have enough."""
        for tap in self.open(moments):
            self._look(tap, moments[tap])
        if not self.open(moments):
            return []
        return [tap for tap in moments if tap not in self.spectra or not representative(moments[tap])]

    def _look(self, tap: Tap, moments: InputMoments) -> None:
        last = self._looked.get(tap, tap.width)
        if moments.rows <= last or (tap in self._looked and moments.rows < GROWTH * last):
            return
        self._looked[tap] = moments.rows
        if not _positive_definite(moments):
            return
        spectrum = factor(moments)
        if all(self._full_rank(weight, spectrum) for weight in self._readers[tap]):
            self.spectra[tap] = (moments, spectrum)

    def _full_rank(self, weight: Weight, spectrum: Spectrum) -> bool:
        matrix = as_matrix(self._content(weight.name), weight.form, self._device)
        return Coordinates.of(spectrum, matrix, MARGIN * ROUNDING_UNIT[weight.dtype]).full_rank


def representative(moments: InputMoments) -> bool:
    """Whether rows are enough for figures that all of them would give, more or less."""
    return moments.rows >= REPRESENTATIVE * moments.width


def _positive_definite(moments: InputMoments) -> bool:
    """Whether the smallest eigenvalue of G is clear of rounding, by a factorization far cheaper than the eigenbasis."""
    gram = moments.gram()
    least = 16 * torch.finfo(torch.float64).eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    gram.diagonal(dim1=-2, dim2=-1).sub_(least)
    _, info = torch.linalg.cholesky_ex(gram)
    return not bool(info.any())
