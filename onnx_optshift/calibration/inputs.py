"""The model's inputs as data has to fit them, and whether samples can be stacked along axis 0 for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    def dims(self) -> tuple[Dim, ...] | None:
        """The shape with symbols that stand for anything (such as `?`) as None."""
        return None if self.shape is None else tuple(None if dim in _ANONYMOUS else dim for dim in self.shape)

    def __str__(self) -> str:
        kind = "unknown type" if self.dtype is None else "string" if self.dtype.kind in "OUS" else self.dtype.name
        shape = "any shape" if self.dims is None else ", ".join("?" if dim is None else str(dim) for dim in self.dims)
        return f"{self.name}: {kind}[{shape}]"


def describe(inputs: Sequence[InputSpec]) -> str:
    """The model's inputs for a message, such as `ids: int64[batch, ?], mask: bool[batch, 8]`."""
    return ", ".join(map(str, inputs)) or "no inputs"


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """Size of the batch axis where all inputs that fix their leading dimension fix it alike, else None."""
    leads = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    return leads.pop() if len(leads) == 1 else None


def why_feeds(inputs: Sequence[InputSpec]) -> str | None:
    """Why arrays for these inputs can only be one feed, or None when axis 0 can number the samples."""
    known = [(spec.name, spec.dims) for spec in inputs if spec.dims is not None]
    for name, dims in known:
        if not dims:
            return f"input {name!r} is a scalar"
    leads = {dims[0] for _, dims in known}
    if len({lead for lead in leads if isinstance(lead, int)}) > 1:
        return "the inputs fix different leading dimensions"
    for name, dims in known:
        for axis, dim in enumerate(dims[1:], start=1):
            if isinstance(dim, str) and dim in leads:
                return f"leading dimension {dim!r} is also axis {axis} of input {name!r}"
    return None
