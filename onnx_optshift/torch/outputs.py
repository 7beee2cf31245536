"""What a model's outputs say: how far other weights move them, and which class each sample has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.decide.draws import balanced_batch
from onnx_optshift.errors import InputError
from onnx_optshift.torch import ranks
from onnx_optshift.torch.calls import Call, Calls, leaves
from onnx_optshift.torch.running import holding


def deviation(
    source: Calls,
    calls: Iterable[Call],
    parameters: Mapping[str, Tensor],
    contents: Mapping[str, Tensor],
    group: ranks.Group | None = None,
) -> float:
    """Relative Frobenius difference of the model's outputs, the largest over outputs, with other contents of weights.

    The two are compared call by call, so that data may come in another order each time. What is not finite with the
    weights as they are is not compared.
    """
    if not contents:
        return 0.0
    sums: list[tuple[float, float]] = []
    with ranks.together(group):
        for call in calls:
            before = [value.double() for value in leaves(source.run(call))]
            with holding(parameters, contents):
                after = [value.double() for value in leaves(source.run(call))]
            sums += [(0.0, 0.0)] * (len(before) - len(sums))
            for k, (old, new) in enumerate(zip(before, after, strict=True)):
                finite, (moved, total) = old.isfinite(), sums[k]
                difference = (new - old)[finite].square().sum()
                sums[k] = moved + float(difference), total + float(old[finite].square().sum())
    outputs = zip(*ranks.gathered(sums, group), strict=False)
    pairs = [tuple(map(sum, zip(*output, strict=True))) for output in outputs]
    return max((math.sqrt(m / t) if t else math.inf if m else 0.0 for m, t in pairs), default=0.0)


def drawn(source: Calls, size: int, seed: int) -> list[Call]:
    """A class-balanced batch of so many samples: by labels, or else by the model's own argmax."""
    calls = list(source)
    classes = [_classes(source, call) for call in calls]
    chosen = np.zeros(sum(map(len, classes)), bool)
    chosen[balanced_batch(np.concatenate(classes), size, np.random.default_rng(seed))] = True
    ends = np.cumsum([len(some) for some in classes])
    numbers = [torch.from_numpy(np.flatnonzero(some)) for some in np.split(chosen, ends[:-1])]
    return [call.part(some) for call, some in zip(calls, numbers, strict=True) if len(some)]


def _classes(source: Calls, call: Call) -> NDArray[np.int64]:
    """The class of each sample of one call.

    Raises:
        InputError: There are neither labels nor outputs to take the argmax of.
    """
    if isinstance(call.labels, Tensor) and not call.labels.is_floating_point() and call.labels.ndim == 1:
        return call.labels.cpu().numpy().astype(np.int64)
    outputs = [value for value in leaves(source.run(call)) if value.ndim >= 2 and value[0].numel() >= 2]
    if not outputs:
        raise InputError(
            "stochastic draws class by class, and neither are there integer labels [samples] nor does the model have "
            "an output [samples, classes] to take the argmax of. Give (inputs, labels) pairs."
        )
    return outputs[0].flatten(1).argmax(1).cpu().numpy().astype(np.int64)
