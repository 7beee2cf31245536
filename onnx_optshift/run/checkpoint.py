"""Finished work of runs: one that was killed goes on where it was, and gives the same bytes.

What is kept is told apart by all that it was made from, so that what is found is right for this run, or is not found.
Where a run keeps it is another module's matter (`checkpoint_folder`); one that keeps nothing has the `Checkpoint` here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.capture.statistics import Moments
from onnx_optshift.geometry import Tap
from onnx_optshift.report.run_info import CheckpointInfo

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """What a file holds: arrays by name, and facts as JSON has them."""

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Beside(Protocol):
    """What a pass learns besides moments."""

    def state(self) -> dict[str, Tensor]:
        """All of it, by names `tap.key/field` that moments do not have."""
        ...

    def restore(self, moments: Moments, state: Mapping[str, Tensor]) -> None:
        """The inverse, where moments came back too."""
        ...


class Pass:
    """A pass over the data, step by step (mostly batches): from its beginning, and not kept.

    Attributes:
        done: Steps that a former run has taken.
        moments: What it had then, by tap.
    """

    done = 0

    def __init__(self, moments: Moments | None = None) -> None:
        self.moments: Moments = moments or {}

    def added(self, moments: Moments) -> None:
        """To be called after every step, with all that there is by then."""


class Checkpoint:
    """Keeps nothing: that of a run which was not asked to."""

    def once(
        self,
        kind: str,
        key: Callable[[], str],
        make: Callable[[], _T],
        pack: Callable[[_T], Entry],
        unpack: Callable[[Entry], _T],
    ) -> _T:
        """What `make` gives, now or in a former run; `key` is all that it depends on besides what all entries do."""
        return make()

    def moments(
        self,
        key: Callable[[], str],
        taps: Sequence[Tap],
        capture: Callable[[Pass], Moments],
        device: str,
        products: torch.dtype = torch.float64,
        beside: Beside | None = None,
    ) -> Moments:
        """Moments of these taps as `capture` gives them, which goes on where a former pass was killed.

        With `beside` comes back what it knew at the time.
        """
        return capture(Pass())

    def report(self) -> CheckpointInfo | None:
        """What was used, saved and rejected so far."""
        return None

    def finish(self) -> None:
        """Removes what only the run that has gone well could use again."""


def digest(*parts: str) -> str:
    """SHA-256 of words, hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)} {part}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def content(*tensors: torch.Tensor) -> str:
    """SHA-256 of types, shapes and bytes of tensors, hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        array = tensor.cpu().contiguous()
        found.update(f"{array.dtype} {tuple(array.shape)}\n".encode())
        found.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
