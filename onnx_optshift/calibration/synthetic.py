"""Seeded random inputs for a model that came without data.

They excite every direction that random inputs can excite, and say nothing of real data; `Samples.synthetic` carries
that into the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnx_optshift.calibration.inputs import InputSpec, describe, fixed_batch, why_feeds
from onnx_optshift.calibration.shapes import OTHER_SIZES, with_shapes
from onnx_optshift.calibration.source import Feeds, Part, Samples
from onnx_optshift.errors import InputError

# Samples are made when they are needed, this many at a time, so that thousands of images never lie in memory.
_BLOCK = 32


def synthetic(
    inputs: Sequence[InputSpec], samples: int, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Samples:
    """Random samples: floats are standard normal, integers 0 or 1, bools even odds.

    Integers stay at 0 and 1 because many models look rows up by them, and an index out of range stops the run.
    Axis 0 numbers the samples. Where it cannot (see `why_feeds`), each sample is a feed, with 1 for a leading symbol.

    A size that the inputs leave free is the first of `OTHER_SIZES`, unless `shapes` gives it, as for `with_shapes`; a
    leading size fixes the batch.

    Raises:
        InputError: An input's type or rank cannot be made up, or a shape contradicts the model.
    """
    if samples < 1:
        raise InputError(f"synthetic data: expected at least 1 sample, found {samples}.")
    if not inputs:
        raise InputError("the model has no inputs, so that no synthetic data can reach its layers.")
    specs = with_shapes(inputs, shapes or {})
    for spec in specs:
        if spec.dims is None or spec.dtype is None or not _can_make(spec.dtype):
            raise InputError(
                f"no synthetic data can be made for input {spec}: only tensors of numbers or bools with a known rank. "
                f"Give real data for {describe(inputs)} with --calib."
            )
    stacked = why_feeds(specs) is None
    rows = _BLOCK if stacked else 1
    parts = []
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        parts.append(Part(count, stacked, partial(_make, specs, (seed, start), count if stacked else None)))
    batch = fixed_batch(specs) if stacked else None
    return Samples(parts, source=f"synthetic (seed {seed})", batch=batch, synthetic=True)


def _can_make(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" or (dtype.kind == "V" and "float" in dtype.name)


def _make(inputs: Sequence[InputSpec], seed: tuple[int, int], rows: int | None) -> Feeds:
    """Arrays of `rows` samples, or one feed; the same for the same seed, whenever it is called."""
    rng = np.random.default_rng(seed)
    # In a feed a leading symbol is most often the batch, and may stand at other axes of other inputs too.
    leads = {spec.dims[0] for spec in inputs if spec.dims} - {None}
    feeds: Feeds = {}
    for spec in inputs:
        shape = [
            dim if isinstance(dim, int) else 1 if axis == 0 or dim in leads else OTHER_SIZES[0]
            for axis, dim in enumerate(spec.dims or ())
        ]
        if rows is not None:
            shape[0] = rows
        whole = spec.dtype is not None and spec.dtype.kind in "biu"
        values = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape, dtype=np.float32)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds
