"""Whether the method's conditions hold for a model and its data: neural collapse, ranks and the checklist."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.gate import loss_of
from onnx_optshift.decide.loss import Loss
from onnx_optshift.diagnose.collapse import collapse, layer_rank
from onnx_optshift.diagnose.verdict import JUDGED_AT, Conditions, verdict
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
    loss = loss_of(bench.outputs, samples)
    facts = layers.survey()
    ranks = [layer_rank(w, facts[w.name], layers.spectrum(w)) for w in bench.weights if w.name in facts]
    classes, output = _classes(bench, samples, loss)
    features, width = None, None
    if classes is not None and output is not None and bench.weights:
        batch, outputs = next(iter(bench.outputs.reference(samples)))
        width = outputs[output].size // batch.rows
        # The last weight with one column for each class; the last of all where there is none.
        last = next((weight for weight in reversed(bench.weights) if weight.m == width), bench.weights[-1])
        if last.name in facts:
            features = collapse(bench, samples, classes, last, output if last.m == width else None)
    labels, counts = np.unique([] if classes is None else classes, return_counts=True)
    answer = verdict(
        Conditions(
            ranks=ranks,
            gains=[(fact.norm**2, dict(fact.frontier)[JUDGED_AT] ** 2) for fact in facts.values()],
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
    labels = samples.labels
    if loss.is_classification and labels is not None and labels.ndim == 1:
        return labels.astype(np.int64), loss.output
    if not loss.is_distance:
        return None, None
    found: list[NDArray[np.int64]] = []
    for batch, outputs in bench.outputs.reference(samples):
        name, scores = next(iter(outputs.items()))
        if len(outputs) != 1 or scores.ndim != 2 or scores.shape[0] != batch.rows or scores.shape[1] < 2:
            return None, None
        found.append(scores.argmax(axis=1).astype(np.int64))
    return np.concatenate(found), name
