"""Whether the method's conditions hold for a model and its data: neural collapse, ranks and the checklist."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.loss import Loss
from onnx_optshift.diagnose.collapse import collapse, layer_rank
from onnx_optshift.diagnose.landscape import loss_of
from onnx_optshift.diagnose.verdict import JUDGED_AT, Conditions, verdict
from onnx_optshift.graph.weights import Weight
from onnx_optshift.report.diagnosis import Diagnosis
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import Data


def conditions(bench: Bench, layers: Layers, data: Data) -> Diagnosis:
    """Features of the last layer, ranks of all, and the verdict.

    Args:
        bench: Runs the original model.
        layers: All layers, with the statistics of all calibration samples.
        data: The samples of the run.
    """
    samples = data.calibration
    loss = loss_of(bench, samples)
    classes, output = _classes(bench, samples, loss)
    ranks = [rank for weight in bench.weights if (rank := layer_rank(weight, layers)) is not None]
    known = {rank.name for rank in ranks}
    gains = [(layers.facts[name].norm ** 2, dict(layers.facts[name].frontier)[JUDGED_AT] ** 2) for name in known]
    features, width = None, None
    if classes is not None and output is not None and bench.weights:
        width = _width(bench, samples, output)
        last = _last_layer(bench.weights, width)
        if last.name in known:
            features = collapse(bench, samples, classes, last, output if last.m == width else None)
    labels, counts = np.unique([] if classes is None else classes, return_counts=True)
    answer = verdict(
        Conditions(
            ranks=ranks,
            gains=gains,
            samples=len(samples),
            synthetic=samples.synthetic,
            counts={str(label): int(count) for label, count in zip(labels, counts, strict=True)},
            classes=width,
            labelled=loss.is_classification,
            collapse=features,
            judges=len(data.heldout) if data.heldout is not None else 0,
            judges_given=data.heldout is not None and not data.split,
        )
    )
    return Diagnosis(answer, features, tuple(ranks))


def _classes(bench: Bench, samples: Samples, loss: Loss) -> tuple[NDArray[np.int64] | None, str | None]:
    """Class of each sample `[n]`, by label or else by the model's own answer, and the output that tells classes apart.

    Both None where the model is no classifier of whole samples.
    """
    if loss.is_classification:
        if samples.labels is None or samples.labels.ndim != 1:
            return None, None
        return samples.labels.astype(np.int64), loss.output
    if not loss.is_distance:
        return None, None
    found: list[NDArray[np.int64]] = []
    name = None
    for batch, outputs in bench.outputs.reference(samples):
        count = len(batch.indices)
        fitting = [n for n, v in outputs.items() if v.ndim == 2 and v.shape[0] >= count and v.shape[1] >= 2]
        if len(outputs) != 1 or not fitting:
            return None, None
        name = fitting[0]
        found.append(outputs[name][:count].argmax(axis=1).astype(np.int64))
    return np.concatenate(found), name


def _width(bench: Bench, samples: Samples, output: str) -> int:
    """Number of classes that an output `[n, k, 1...]` tells apart."""
    batch, outputs = next(iter(bench.outputs.reference(samples)))
    return outputs[output].size // len(batch.indices)


def _last_layer(weights: Sequence[Weight], width: int) -> Weight:
    """The last weight with one column for each class; the last of all where there is none."""
    return next((weight for weight in reversed(weights) if weight.m == width), weights[-1])
