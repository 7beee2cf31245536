"""One streaming pass over the data: batches through the probe model, activations to a sink, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch
from onnx_optshift.capture.session import Session, as_tensor
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap

Sink = Callable[[Tap, Batch, torch.Tensor], None]


def stream(
    session: Session,
    taps: Sequence[Tap],
    batches: Iterable[Batch],
    sink: Sink,
    *,
    overrides: Mapping[str, NDArray[np.generic]] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Runs each batch once and hands every tap's activation to `sink`, one batch alive at a time.

    Args:
        session: The probe model: every tapped value is one of its outputs or inputs.
        taps: What to read. Taps on the same value share its activation.
        batches: Calibration data.
        sink: Called with (tap, batch, activation); it must not keep the activation, whose buffer may be reused.
        overrides: Values of overridable initializers for this pass.
        done: Called after each batch with its number of samples.

    Raises:
        InputError: ONNX Runtime cannot run the model on a batch.
    """
    values = list(dict.fromkeys(tap.value for tap in taps))
    for batch in batches:
        # A graph input that is read by a layer comes from the feeds: as an output it would alias the input, and
        # ONNX Runtime overwrites such an output on the next run (onnxruntime issue 21922).
        computed = [value for value in values if value not in batch.feeds]
        try:
            activations = session.run_tensors({**batch.feeds, **(overrides or {})}, computed)
        except InputError as error:
            if not any(tap.inside and tap.inside.loops for tap in taps):
                raise
            raise InputError(
                f"{error} Inputs of layers inside a Loop or Scan are stacked over its iterations: where one changes "
                "its shape in between, leave its layer out with --nodes-to-exclude."
            ) from error
        for value in values:
            if value in batch.feeds:
                activations[value] = as_tensor(batch.feeds[value]).to(session.device.solve)
        for tap in taps:
            sink(tap, batch, _real(activations[tap.value], tap, batch))
        done(len(batch.indices))


def sample_axis(shape: Sequence[int], size: int, first: int = 0) -> int | None:
    """The axis along which an activation or output holds its batch's samples; None where there is none to be seen.

    Args:
        shape: Of the array.
        size: Samples in the batch, padding included.
        first: Axes in front that count iterations of a Loop or Scan.
    """
    axes = range(first, len(shape))
    # Exporters also fold further axes into the leading one, samples being the slowest.
    if len(shape) > first and shape[first] and shape[first] % size == 0:
        return first
    return next((axis for axis in axes if shape[axis] == size), None)


def _real(activation: torch.Tensor, tap: Tap, batch: Batch) -> torch.Tensor:
    """The activation without the copies that only fill a fixed batch dimension: they are no data."""
    count, size = len(batch.indices), len(batch.indices) + batch.padding
    axis = sample_axis(activation.shape, size, tap.inside.loops if tap.inside else 0)
    if not batch.padding or axis is None:
        return activation
    return activation.narrow(axis, 0, activation.shape[axis] // size * count)


def real_outputs(outputs: dict[str, NDArray[Any]], batch: Batch) -> dict[str, NDArray[Any]]:
    """Outputs of a batch without those of the copies that only fill a fixed batch dimension."""
    count, size = len(batch.indices), len(batch.indices) + batch.padding
    if not batch.padding:
        return outputs
    real = {}
    for name, value in outputs.items():
        axis = sample_axis(value.shape, size)
        kept = slice(None) if axis is None else slice(value.shape[axis] // size * count)
        real[name] = value[(slice(None),) * (axis or 0) + (kept,)] if value.ndim else value
    return real
