"""Which positions the model ignores: an input of 0 and 1 such as `attention_mask`, found by trying.

A mask is one where nothing that stands at its zeros changes any output elsewhere. Rows at those positions are no data:
they would cost freedom, and weigh in every norm, for nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Feeds, Samples
from onnx_optshift.capture.stream import real_outputs
from onnx_optshift.errors import InputError
from onnx_optshift.prove.compare import OutputsDifference
from onnx_optshift.run.bench import Bench

AUTO, NONE = "auto", "none"
# Samples that masks are tried on.
TRIED = 8
# Relative change of an output that counts as none: a masked softmax is exact in float32, and rounds in half precision.
MOST_CHANGE = 1e-4


def find_mask(bench: Bench, samples: Samples, wanted: str) -> str | None:
    """The input whose zeros mark positions that the model ignores; None where there is none.

    Args:
        bench: Runs the model.
        samples: Of which a few are tried.
        wanted: The name of an input, `"auto"` or `"none"`.

    Raises:
        InputError: The input that was named is no mask.
    """
    if wanted == NONE:
        return None
    names = [spec.name for spec in bench.model.inputs]
    if wanted != AUTO and wanted not in names:
        raise InputError(f"--row-mask {wanted}: is no input of the model. Inputs are {', '.join(names)}.")
    few = samples.spread(TRIED)
    batches = list(few.batches(TRIED))
    candidates = [name for name in names if wanted in {AUTO, name} and any(_zeros(b.feeds, name) for b in batches)]
    found = next((name for name in candidates if _ignored(bench, few, name, only=wanted == AUTO)), None)
    bench.sessions.rest()
    if found is None and wanted != AUTO:
        raise InputError(
            f"--row-mask {wanted}: outputs change with what stands where it is 0, or it is not [batch, positions] of 0 "
            "and 1 with both among the first samples. Give another input, or none."
        )
    return found


def _zeros(feeds: Feeds, name: str) -> bool:
    """Whether an input could be a mask, by its values."""
    values = feeds[name]
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "biu":
        return False
    return bool(((values == 0) | (values == 1)).all() and (values == 0).any() and (values == 1).any())


def _ignored(bench: Bench, samples: Samples, name: str, *, only: bool) -> bool:
    """Whether no output at a position that counts depends on what stands at those that do not.

    Args:
        bench: Runs the model.
        samples: Tried.
        name: The mask.
        only: Whether what stands at a position that counts must show at others: where it does not, a model treats
            every position apart, and any input of 0 and 1 passes for a mask.
    """
    session = bench.sessions.original()
    hidden, shown = OutputsDifference(), OutputsDifference()
    changed = False
    for batch in samples.masked(name).batches(TRIED):
        if not _zeros(batch.feeds, name):
            continue
        mask = batch.feeds[name] != 0
        first = (np.cumsum(mask, axis=1) == 1) & mask
        before = real_outputs(session.run(batch.feeds), batch)
        other, one = _scrambled(batch.feeds, ~mask, mask), _scrambled(batch.feeds, first, mask & ~first)
        changed = changed or any(not np.array_equal(other[key], batch.feeds[key]) for key in other)
        hidden.update(real_outputs(session.run(other), batch), before, batch.rows)
        apart = {name: _without(value, first) for name, value in before.items()}
        after = real_outputs(session.run(one), batch)
        shown.update({name: _without(value, first) for name, value in after.items()}, apart, batch.rows)
    shows = not only or shown.largest_rel() > MOST_CHANGE
    return changed and hidden.largest_rel() <= MOST_CHANGE and shows


def _without(output: NDArray[Any], positions: NDArray[np.bool_]) -> NDArray[Any]:
    """An output with 0 at some positions `[batch, positions]`, where it has these axes."""
    if output.ndim < 2 or output.shape[:2] != positions.shape:
        return output
    return np.where(positions.reshape(*positions.shape, *[1] * (output.ndim - 2)), output.dtype.type(0), output)


def _scrambled(feeds: Feeds, at: NDArray[np.bool_], source: NDArray[np.bool_]) -> Feeds:
    """All inputs that have the positions' axes, but masks, with the values of other positions at some."""
    found = dict(feeds)
    for key, values in feeds.items():
        if values.ndim >= 2 and values.shape[:2] == at.shape and not _zeros(feeds, key) and source.any():
            found[key] = values.copy()
            found[key][at] = np.resize(values[source][::-1], values[at].shape)
    return found
