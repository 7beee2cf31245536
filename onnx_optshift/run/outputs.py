"""Outputs of the original model and of trials beside it, batch by batch, kept in little memory: the rest in a file.

Trials never touch a file: one session has the weights as overridable inputs, and each trial feeds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.session import Session
from onnx_optshift.capture.stream import real_outputs
from onnx_optshift.prove.compare import OutputsDifference
from onnx_optshift.run.budget import KEPT_IN_FILES
from onnx_optshift.run.candidate import Arrays
from onnx_optshift.run.sessions import Sessions
from onnx_optshift.run.world import ALONE, World

Values = dict[str, NDArray[Any]]


@dataclass
class _Kept:
    """Outputs of the original on one set of samples, batch by batch."""

    batches: list[Values]
    memory: int = 0  # bytes of them in memory
    files: int = 0  # bytes of them in files


class Outputs:
    """Runs the original, and trials of other contents of the initializers named, on data."""

    def __init__(
        self, sessions: Sessions, names: Sequence[str], batch_size: int, kept_bytes: int, world: World = ALONE
    ) -> None:
        self.world = world
        self._sessions = sessions
        self._names = tuple(names)
        self._batch_size = batch_size
        self._room = kept_bytes  # for outputs of the original in memory, over all sets of samples together
        self._kept: dict[str, _Kept] = {}  # by fingerprint of the samples

    def share(self, samples: Samples) -> Samples:
        """Those of some samples that are this process's to run."""
        return samples.share(self.world.rank, self.world.size, self._batch_size)

    def reference(self, samples: Samples) -> Iterator[tuple[Batch, Values]]:
        """The original model's outputs, batch by batch, without padding; kept for the next time while they fit."""
        batches = samples.batches(self._batch_size)
        kept = self._kept.get(samples.fingerprint)
        if kept is None and len(samples) and self._sessions.large and self._fits_on_disk(samples):
            # All of them first: what the caller runs on each batch needs a session of its own.
            kept = _Kept([self._run(batch) for batch in samples.batches(self._batch_size)])
            self._kept[samples.fingerprint] = kept
            self._sessions.rest()
        if kept is not None:
            for pair in zip(batches, kept.batches, strict=True):
                yield pair
                self._sessions.let_go()
            return
        found = _Kept([])
        whole = not self._sessions.large
        for batch in batches:
            outputs = self._run(batch)
            whole = whole and self._keep(outputs, found)
            found = found if whole else _Kept([])
            yield batch, outputs
        if whole:
            self._kept[samples.fingerprint] = found

    def trial(self, samples: Samples, arrays: Arrays) -> Iterator[tuple[Batch, Values, Values]]:
        """Batches with the outputs of trial weights and the original's; without weights, the original's twice."""
        for batch, reference in self.reference(samples):
            yield batch, (self.run(batch, arrays) if arrays else reference), reference
        self._sessions.rest()

    def run(self, batch: Batch, arrays: Arrays) -> Values:
        """Outputs of one batch with trial weights, without padding."""
        return real_outputs(self._sessions.trial(self._names).run({**batch.feeds, **arrays}), batch)

    def deviation(
        self, samples: Samples, arrays: Arrays, other: Callable[[], Session] | None = None
    ) -> OutputsDifference:
        """How far outputs with these weights, or of another session (a written file, a noise run), are off.

        Every process runs its share of the samples, and all know what all have found.
        """
        difference = OutputsDifference()
        session: Session | None = None
        for batch, reference in self.reference(self.share(samples)):
            if other is not None and session is None:
                session = other()  # not before the reference is there: it may need the place
            outputs = self.run(batch, arrays) if session is None else real_outputs(session.run(batch.feeds), batch)
            difference.update(outputs, reference, len(batch.indices))
        del session
        self._sessions.rest()
        found = OutputsDifference()
        for part in self.world.gather(difference):
            found.merge(part)
        return found

    def _run(self, batch: Batch) -> Values:
        outputs = real_outputs(self._sessions.original().run(batch.feeds), batch)
        return {name: self._sessions.keep(value) for name, value in outputs.items()}

    def _fits_on_disk(self, samples: Samples) -> bool:
        """Whether the original's outputs on all samples leave half of the disk's free space."""
        (first,) = samples.select(np.arange(1)).batches(1)
        one = _bytes(self._run(first))
        self._sessions.rest()
        return 2 * len(samples) * one < self._sessions.disk_space()

    def _keep(self, outputs: Values, found: _Kept) -> bool:
        """Keeps outputs of one more batch: in memory while there is room, then in a file; False where neither has."""
        size, sets = _bytes(outputs), [*self._kept.values(), found]
        if sum(kept.memory for kept in sets) + size <= self._room:
            found.memory += size
        elif sum(kept.files for kept in sets) + size <= KEPT_IN_FILES and 2 * size <= self._sessions.disk_space():
            found.files += size
            outputs = {name: self._sessions.in_file(value) for name, value in outputs.items()}
        else:
            return False
        found.batches.append(outputs)
        return True


def _bytes(values: Values) -> int:
    return sum(value.nbytes for value in values.values())
