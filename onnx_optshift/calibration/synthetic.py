"""Seeded random inputs for a model that came without data.

They excite every direction that random inputs can excite, and say nothing of real data; `Samples.synthetic` carries
that into the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnx_optshift.calibration.source import Array, Feeds, InputSpec, Part, Samples, describe, fixed_batch, why_feeds
from onnx_optshift.errors import InputError, closest

# Long enough for sequence axes to be more than one step, short enough to run anywhere.
DEFAULT_DIM = 8
# Samples are made when they are needed, this many at a time, so that thousands of images never lie in memory.
_BLOCK = 32


def synthetic(
    inputs: Sequence[InputSpec], samples: int, seed: int = 0, dims: Mapping[str, int] | None = None
) -> Samples:
    """Random samples: floats are standard normal, integers 0 or 1, bools even odds.

    Integers stay at 0 and 1 because many models look rows up by them, and an index out of range stops the run.
    Axis 0 numbers the samples. Where it cannot (see `why_feeds`), each sample is a feed, with 1 for a leading symbol.

    Args:
        inputs: The model's inputs.
        samples: How many samples.
        seed: Same seed, same samples.
        dims: Sizes of symbolic dimensions; the others are `DEFAULT_DIM`. Equal symbols have equal sizes.

    Raises:
        InputError: An input's type or rank cannot be made up, or a name in `dims` is no symbol of the model.
    """
    if samples < 1:
        raise InputError(f"synthetic data: expected at least 1 sample, found {samples}.")
    if not inputs:
        raise InputError("the model has no inputs, so that no synthetic data can reach its layers.")
    for spec in inputs:
        if spec.dims is None or spec.dtype is None or not _can_make(spec.dtype):
            raise InputError(
                f"no synthetic data can be made for input {spec}: only tensors of numbers or bools with a known rank. "
                f"Give real data for {describe(inputs)} with --calib."
            )
    sizes = _sizes(inputs, dims or {})
    stacked = why_feeds(inputs) is None
    rows = _BLOCK if stacked else 1
    parts = [
        Part(count, stacked, partial(_make, tuple(inputs), sizes, (seed, start), count if stacked else None))
        for start in range(0, samples, rows)
        for count in [min(rows, samples - start)]
    ]
    batch = fixed_batch(inputs) if stacked else None
    return Samples(parts, source=f"synthetic (seed {seed})", batch=batch, synthetic=True)


def _can_make(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" or (dtype.kind == "V" and "float" in dtype.name)


def _sizes(inputs: Sequence[InputSpec], dims: Mapping[str, int]) -> dict[str, int]:
    """Size of each symbol.

    Raises:
        InputError: A name in `dims` is no symbol, or its size is not positive.
    """
    shapes = [spec.dims for spec in inputs if spec.dims is not None]
    symbols = list(dict.fromkeys(dim for shape in shapes for dim in shape if isinstance(dim, str)))
    for name, size in dims.items():
        if name not in symbols:
            raise InputError(
                f"synthetic data: {name!r} is no dimension of {describe(inputs)}.{closest(name, symbols)} Use one of "
                f"{', '.join(symbols) or 'none: all sizes are fixed'}."
            )
        if size < 1:
            raise InputError(f"synthetic data: dimension {name!r}: expected a size of at least 1, found {size}.")
    # In a feed a leading symbol is most often the batch, and may stand at other axes of other inputs too.
    leads = {shape[0] for shape in shapes if shape}
    return {symbol: 1 if symbol in leads else DEFAULT_DIM for symbol in symbols} | dict(dims)


def _make(inputs: Sequence[InputSpec], sizes: Mapping[str, int], seed: tuple[int, int], rows: int | None) -> Feeds:
    """Arrays of `rows` samples, or one feed; the same for the same seed, whenever it is called."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for spec in inputs:
        shape = [sizes[dim] if isinstance(dim, str) else DEFAULT_DIM if dim is None else dim for dim in spec.dims or ()]
        if rows is not None:
            shape[0] = rows
        elif spec.dims and spec.dims[0] is None:
            shape[0] = 1
        feeds[spec.name] = _values(rng, spec.dtype, tuple(shape))
    return feeds


def _values(rng: np.random.Generator, dtype: np.dtype[Any] | None, shape: tuple[int, ...]) -> Array:
    if dtype is not None and dtype.kind in "biu":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
