"""Statistics of what flows into the layers: moments by tap, captured in explicit waves, held, saved and merged.

Where they come from is one function, the backend: `taps -> moments`. Today it streams the data through this process; a
folder of finished statistics, or a reduction over several processes, is another function of the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from onnx_optshift.geometry import Tap
from onnx_optshift.stats.moments import InputMoments

Moments = Mapping[Tap, InputMoments]
Backend = Callable[[Sequence[Tap]], Moments]


class StatisticsStore:
    """Moments of every tap over one set of samples, of which one wave is held at a time.

    A wave is a set of taps whose moments fit into memory together. Asking for another wave than the one held lets go
    of that one, and captures anew: `load` says so by its name, and nothing else here runs a model.

    Args:
        waves: The taps of each wave; together all taps.
        backend: Gives the moments of the taps of one wave.
        rows: Rows that all samples give each tap, as far as a run of the first sample tells.
        held: Moments of the only wave, where they are there already.
    """

    def __init__(
        self,
        waves: Sequence[Sequence[Tap]],
        backend: Backend,
        rows: Mapping[Tap, int] | None = None,
        held: Moments | None = None,
    ) -> None:
        self.waves = tuple(tuple(wave) for wave in waves)
        self._backend = backend
        self._expected = dict(rows or {})
        self._number = {tap: number for number, wave in enumerate(self.waves) for tap in wave}
        self._held: Moments = held or {}
        self._wave = 0 if held is not None else None

    @classmethod
    def of(cls, moments: Moments) -> StatisticsStore:
        """A store of one wave, of moments that are there already."""
        return cls([tuple(moments)], lambda _: moments, held=moments)

    def wave_of(self, tap: Tap) -> int:
        """Number of the wave that a tap belongs to."""
        return self._number[tap]

    def load(self, wave: int) -> Moments:
        """Moments of one wave, captured unless they are held."""
        if wave != self._wave:
            self._held, self._wave = {}, None  # before the next wave is captured, not after
            self._held = self._backend(self.waves[wave])
            self._wave = wave
        return self._held

    def rows(self, tap: Tap) -> int:
        """Rows of a tap over all samples: counted where its wave is held, else as expected; runs nothing."""
        return self._held[tap].rows if tap in self._held else self._expected.get(tap, 0)

    def merged(self, other: StatisticsStore) -> StatisticsStore:
        """The statistics of the samples of both, which must be disjoint; of stores of one wave.

        Taps that the other lacks stay as they are.
        """
        mine, theirs = self.load(0), other.load(0)
        return StatisticsStore.of({
            tap: moments.merge(theirs[tap]) if tap in theirs else moments for tap, moments in mine.items()
        })

    def state(self, wave: int) -> dict[str, Tensor]:
        """Moments of one wave as tensors by `tap.key/field`, to be saved or sent."""
        return state_of(self.load(wave))


def state_of(moments: Moments) -> dict[str, Tensor]:
    """Moments as tensors by `tap.key/field`."""
    return {f"{tap.key}/{field}": tensor for tap, found in moments.items() for field, tensor in found.state().items()}


def from_state(
    taps: Sequence[Tap],
    state: Mapping[str, Tensor],
    device: str | torch.device | None = None,
    products: torch.dtype = torch.float64,
) -> dict[Tap, InputMoments]:
    """Moments of these taps from what `state_of` gave, as `InputMoments.from_state` makes them.

    Raises:
        KeyError: One is not in it; with its key.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        key, _, field = name.rpartition("/")
        parts.setdefault(key, {})[field] = tensor
    return {tap: InputMoments.from_state(parts[tap.key], device, products) for tap in taps}
