"""Class-balanced batches for stochastic optimum shifting (arXiv 2405.14111): B samples, every class among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.errors import InputError

if TYPE_CHECKING:  # which loads the runtime
    from onnx_optshift.run.outputs import Outputs


def balanced_batch(classes: NDArray[np.int64], size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draws sample numbers `[size]` class by class, round after round, of samples whose classes `[n]` are given.

    Raises:
        InputError: B is smaller than the number of classes, or larger than the number of samples.
    """
    present = np.unique(classes)
    if size < len(present):
        raise InputError(
            f"--stochastic {size}: the calibration data has {len(present)} classes, and a batch must hold every one. "
            f"Expected at least {len(present)}."
        )
    if size > len(classes):
        raise InputError(
            f"--stochastic {size}: there are only {len(classes)} samples to draw from. Expected at most that many; "
            "give more calibration data, or leave --stochastic out for the exact shift on all of it."
        )
    order = generator.permutation(len(classes))
    # Position of each sample among those of its class, in drawn order: taking the smallest positions first deals
    # the classes out like cards, and classes that run out leave their turns to the others.
    turn = np.empty(len(classes), dtype=np.int64)
    for label in present:
        members = order[classes[order] == label]
        turn[members] = np.arange(len(members))
    rank = np.lexsort((generator.permutation(len(classes)), turn))
    return np.sort(rank[:size])


def batch_sizes(classes: int, samples: int, widest: int) -> list[int]:
    """Batch sizes to try: from the number of classes up to where the widest layer, of input width d, has full rank."""
    top = max(classes, min(samples, widest - 1))
    grid = np.unique(np.geomspace(classes, top, 5).round().astype(int))
    return [int(size) for size in grid if classes <= size <= samples]


def classes_of(outputs: Outputs, samples: Samples) -> NDArray[np.int64]:
    """Class of each sample `[n]`: its label, or else the original model's own argmax.

    Raises:
        InputError: There is neither.
    """
    if samples.labels is not None and np.issubdtype(samples.labels.dtype, np.integer):
        return samples.labels.astype(np.int64)
    found: list[NDArray[np.int64]] = []
    for batch, values in outputs.reference(outputs.share(samples)):
        count = len(batch.indices)
        fitting = [v for v in values.values() if v.ndim >= 2 and v.shape[0] >= count and v[0].size >= 2]
        if not fitting:
            raise InputError(
                "--stochastic draws class by class, and neither are there integer labels nor does the model have an "
                "output [samples, classes] to take the argmax of. Give labels with the calibration data."
            )
        found.append(fitting[0].reshape(fitting[0].shape[0], -1)[:count].argmax(axis=1).astype(np.int64))
    return np.concatenate([classes for part in outputs.world.gather(found) for classes in part])
