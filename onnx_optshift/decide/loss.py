"""The loss that held-out data is judged by, one figure per sample.

With labels: cross-entropy for classifiers (on probabilities or on logits, detected from the original model's outputs),
squared error for regression. Without labels: the squared relative distance to the original model's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.errors import InputError

Outputs = Mapping[str, NDArray[Any]]

# A softmax computed in float16 sums to 1 within about this.
_SUM_SLACK = 5e-3
# Probabilities are clipped here before the logarithm: the smallest normal float32.
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Loss:
    """A loss with one figure per sample."""

    name: str  # for the report
    output: str | None  # the model output it reads; None for the distance, which reads all
    kind: str  # "probabilities", "logits", "squared" or "distance"

    @property
    def is_distance(self) -> bool:
        """Whether the loss measures distance to the original, so that the original itself has loss 0."""
        return self.kind == "distance"

    @property
    def is_classification(self) -> bool:
        """Whether there is a top-1 accuracy."""
        return self.kind in ("probabilities", "logits")

    def per_sample(
        self, outputs: Outputs, reference: Outputs, labels: NDArray[Any] | None, samples: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Losses `[samples]` of one batch, and the share that is right (`[samples]`, None unless classification).

        Args:
            outputs: The judged model's outputs; rows beyond the samples are padding.
            reference: The original model's outputs on the same batch.
            labels: Class indices or targets, `[samples, ...]`; None for the distance.
            samples: Samples in the batch.
        """
        if self.output is None or labels is None:
            return _distance(outputs, reference, samples), None
        values = outputs[self.output].astype(np.float64)[:samples]
        if self.kind == "squared":
            residual = values.reshape(samples, -1) - labels.reshape(samples, -1)
            return np.square(residual).mean(axis=1), None
        # One position per label: a sample of a sequence model has many, a plain classifier's has one.
        positions = labels.size // samples
        values = values.reshape(samples * positions, -1)
        wanted = labels.reshape(-1)
        picked = values[np.arange(len(values)), wanted]
        if self.kind == "probabilities":
            losses = -np.log(np.maximum(picked, _TINY))
        else:
            largest = values.max(axis=1, keepdims=True)
            losses = np.log(np.exp(values - largest).sum(axis=1)) + largest[:, 0] - picked
        # A NaN output must never look like an improvement.
        losses = np.where(np.isnan(losses), np.inf, losses).reshape(samples, positions).mean(axis=1)
        right = (values.argmax(axis=1) == wanted).reshape(samples, positions).mean(axis=1)
        return losses, right


DISTANCE = Loss("relative distance to the original outputs", None, "distance")


def choose_loss(outputs: Outputs, labels: NDArray[Any] | None, samples: int, source: str = "data") -> Loss:
    """The loss that fits the original model's outputs on one batch of some samples, and all labels of the source.

    Raises:
        InputError: The labels fit no output, or a class label is out of range.
    """
    if labels is None:
        return DISTANCE
    shapes = {name: value.shape for name, value in outputs.items()}
    if np.issubdtype(labels.dtype, np.integer):
        for name, value in outputs.items():
            classes = _classes(value, labels, samples)
            if classes < 2:
                continue
            if labels.min() < 0 or labels.max() >= classes:
                raise InputError(
                    f"{source}: the labels are {int(labels.min())} to {int(labels.max())}; expected class "
                    f"indices 0 to {classes - 1} for output {name!r} {list(value.shape)}. Correct the labels, or leave "
                    "them out to judge by the distance to the original outputs."
                )
            kind = "probabilities" if _are_probabilities(value, classes) else "logits"
            return Loss(f"cross-entropy on {kind} of {name!r}", name, kind)
    wanted = labels[:samples].size
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.floating) and value.size == wanted:
            return Loss(f"squared error of {name!r}", name, "squared")
    whole = labels.dtype.kind == "f" and bool((labels == np.round(labels)).all())
    hint = " Save class indices as integers, not as floats." if whole else ""
    raise InputError(
        f"{source}: labels: shape {list(labels.shape)} ({labels.dtype}) fits no output of the model: {shapes} for "
        f"{samples} samples.{hint} Expected one class index per sample, or targets of an output's shape; or leave the "
        "labels out."
    )


def _classes(value: NDArray[Any], labels: NDArray[Any], samples: int) -> int:
    """Number of classes k where an output `[samples, *positions, k]` fits labels `[samples, *positions]`; else 0."""
    if not np.issubdtype(value.dtype, np.floating) or value.ndim < 2 or value.shape[0] < samples:
        return 0
    positions = labels.shape[1:]
    if value.shape[1 : 1 + len(positions)] != positions:
        return 0
    rest = value.shape[1 + len(positions) :]
    # Trailing axes of one, as a fully convolutional classifier [n, k, 1, 1] has them, hold no further positions.
    return max(rest, default=0) if rest and int(np.prod(rest)) == max(rest) else 0


def _are_probabilities(value: NDArray[Any], classes: int) -> bool:
    rows = value.reshape(-1, classes).astype(np.float64)
    return bool(rows.min() >= -_SUM_SLACK and np.abs(rows.sum(axis=1) - 1).max() <= _SUM_SLACK)


def _distance(outputs: Outputs, reference: Outputs, samples: int) -> NDArray[np.float64]:
    """Mean over outputs of ||y - r||^2 / ||r||^2 per sample; its mean's root is a relative deviation."""
    total = np.zeros(samples)
    counted = 0
    for name, r in reference.items():
        y = outputs[name]
        if not np.issubdtype(r.dtype, np.floating) or y.shape != r.shape:
            continue
        rows = samples if r.ndim > 0 and r.shape[0] >= samples else 1
        reference_rows = np.nan_to_num(r.astype(np.float64)[: samples if rows > 1 else None].reshape(rows, -1))
        value_rows = np.nan_to_num(y.astype(np.float64)[: samples if rows > 1 else None].reshape(rows, -1))
        squared = np.square(value_rows - reference_rows).sum(axis=1)
        scale = np.square(reference_rows).sum(axis=1)
        total += np.divide(squared, scale, out=np.where(squared > 0, np.inf, 0.0), where=scale > 0)
        counted += 1
    return total / max(counted, 1)
