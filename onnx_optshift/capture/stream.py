"""One streaming pass over the data: batches through the probe model, activations to a sink, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch
from onnx_optshift.capture.session import Session, as_tensor
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import MatrixRows, Tap

Sink = Callable[[Tap, Batch, torch.Tensor], None]

# How far copies of a sample may give other values than the sample, relative to its largest one: rounding, even in half
# precision and through many layers. Other samples are farther away.
_COPY_TOLERANCE = 1e-2


def stream(
    session: Session,
    taps: Sequence[Tap],
    batches: Iterable[Batch],
    sink: Sink,
    *,
    overrides: Mapping[str, NDArray[np.generic]] | None = None,
    done: Callable[[int], None] = lambda _: None,
    drop_masked: bool = True,
    wanted: Callable[[], Sequence[Tap]] | None = None,
) -> None:
    """Runs each batch once and hands every tap's activation to `sink`, one batch alive at a time.

    Args:
        session: The probe model: every tapped value is one of its outputs or inputs.
        taps: What to read. Taps on the same value share its activation.
        batches: Calibration data.
        sink: Called with (tap, batch, activation); it must not keep the activation, whose buffer may be reused.
        overrides: Values of overridable initializers for this pass.
        done: Called after each batch with its number of samples.
        drop_masked: Whether rows at positions that the batch masks are left out.
        wanted: Asked after each batch: of which taps more is wanted. The pass ends where it is none; all by default.

    Raises:
        InputError: ONNX Runtime cannot run the model on a batch.
    """
    for batch in batches:
        values = list(dict.fromkeys(tap.value for tap in taps))
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
            first = tap.inside.loops if tap.inside else 0
            real = without_padding(activations[tap.value], batch, first)
            sink(tap, batch, without_masked(real, tap, batch) if drop_masked else real)
        done(batch.rows)
        if wanted is not None and not (taps := wanted()):
            break


def sample_axis(shape: Sequence[int], size: int, first: int = 0) -> int | None:
    """The axis that holds a batch's samples; None where none is to be seen. Axes before `first` count iterations."""
    return next((axis for axis, _ in _sample_layouts(shape, size, first)), None)


def without_padding(value: Any, batch: Batch, first: int = 0) -> Any:
    """An activation or output without what belongs to the copies that only fill a fixed batch dimension.

    Shapes alone do not tell where they are: time may come before the batch, and be a multiple of it. But the copies are
    copies: along the right axis what they give equals what the last sample gave. A value without such an axis does not
    depend on the sample, or on all of them at once, and stays whole.

    Args:
        value: numpy array or torch tensor.
        batch: What it was computed from.
        first: Axes in front that count iterations of a Loop or Scan.
    """
    if not batch.padding:
        return value
    shape = tuple(value.shape)
    for axis, outer in _sample_layouts(shape, batch.size, first):
        before, after = (*shape[:axis], outer), (shape[axis] // (outer * batch.size), *shape[axis + 1 :])
        split = value.reshape(*before, batch.size, *after)
        at = (slice(None),) * len(before)
        if _equal(split[(*at, slice(batch.rows, None))], split[(*at, slice(batch.rows - 1, batch.rows))]):
            kept = split[(*at, slice(batch.rows))]
            return kept.reshape(*shape[:axis], shape[axis] // batch.size * batch.rows, *shape[axis + 1 :])
    return value


def real_outputs(outputs: Mapping[str, NDArray[Any]], batch: Batch) -> dict[str, NDArray[Any]]:
    """Outputs of a batch without those of the copies that only fill it, and 0 at positions that it masks."""
    real = {name: without_padding(value, batch) for name, value in outputs.items()}
    if (kept := batch.kept) is None:
        return real
    return {
        name: np.where(kept.reshape(*kept.shape, *[1] * (value.ndim - 2)), value, value.dtype.type(0))
        if value.ndim >= 2 and value.shape[:2] == kept.shape
        else value
        for name, value in real.items()
    }


def without_masked(activation: torch.Tensor, tap: Tap, batch: Batch) -> torch.Tensor:
    """An activation without the rows at positions that the batch masks; whole where its axes do not show them."""
    form = tap.form
    if (kept := batch.kept) is None or not isinstance(form, MatrixRows) or form.batch or form.feature_axis != -1:
        return activation
    mask = torch.from_numpy(kept).to(activation.device)
    if activation.ndim >= 3 and tuple(activation.shape[:2]) == kept.shape:
        return activation[mask]
    if activation.ndim == 2 and len(activation) == kept.size:
        return activation[mask.flatten()]
    return activation


def _sample_layouts(shape: Sequence[int], size: int, first: int) -> Iterator[tuple[int, int]]:
    """Ways in which an array may hold `size` samples: an axis, and how many times it counts through all of them."""
    folded = shape[first] // size if len(shape) > first and shape[first] % size == 0 else 0
    if folded:
        yield first, 1  # exporters fold further axes into the leading one, samples being the slowest
    yield from ((axis, 1) for axis in range(first + 1, len(shape)) if shape[axis] == size)
    if folded > 1:
        yield first, folded  # or the fastest, as time-major recurrent models have them


def _equal(copies: Any, original: Any) -> bool:
    """Whether values are copies of others, but for the rounding of kernels that treat the edge of a matrix apart."""
    copies, original = (v.float().cpu().numpy() if isinstance(v, torch.Tensor) else v for v in (copies, original))
    if copies.dtype.kind not in "fc":
        return bool((copies == original).all())
    with np.errstate(invalid="ignore"):
        scale = np.abs(original, where=np.isfinite(original), out=np.zeros(original.shape)).max(initial=0)
        return bool(np.isclose(copies, original, rtol=0, atol=_COPY_TOLERANCE * scale, equal_nan=True).all())
