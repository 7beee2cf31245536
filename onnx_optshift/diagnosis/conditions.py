"""Whether the method's conditions hold for a model and its data: neural collapse, ranks and the checklist."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.decide.gate import loss_of
from onnx_optshift.decide.loss import Loss
from onnx_optshift.diagnosis.collapse import answers, collapse, layer_rank
from onnx_optshift.diagnosis.verdict import JUDGED_AT, Conditions, verdict
from onnx_optshift.report.diagnosis import Diagnosis
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import LayerFacts
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.outputs import Values
from onnx_optshift.run.prepare import Data


def conditions(bench: Bench, layers: Layers, data: Data, *, exact: bool = False) -> Diagnosis:
    """Features of the last layer, ranks of all, and the verdict.

    Args:
        bench: Runs the original model.
        layers: All layers, with the statistics of all calibration samples.
        data: The samples of the run.
        exact: Whether the question is an exact shift, whose gain then counts too.
    """
    samples, outputs = data.calibration, bench.outputs
    loss, facts = loss_of(outputs, samples), layers.survey()
    ranks = [layer_rank(w, facts[w.name], layers.factored.spectrum(w)) for w in bench.weights if w.name in facts]
    batch, values = next(iter(outputs.reference(samples)))
    output = _telling(loss, samples, batch, values)
    classes, features, width = np.zeros(0, np.int64), None, None
    if output is not None and bench.weights:
        labelled = loss.is_classification and samples.labels is not None
        classes = np.asarray(samples.labels, np.int64) if labelled else answers(outputs, samples, output)
        width = values[output].size // batch.rows
        # The last weight with one column for each class; the last of all where there is none.
        last = next((weight for weight in reversed(bench.weights) if weight.m == width), bench.weights[-1])
        if last.name in facts:
            features = collapse(bench, samples, classes, last, output if last.m == width else None)
    labels, counts = np.unique(classes, return_counts=True)
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
            exact=_left(facts.values(), 0.0) if exact else None,
        )
    )
    return Diagnosis(answer, features, tuple(ranks))


def _left(facts: Iterable[LayerFacts], tolerance: float) -> float:
    """The norm², over all layers, that shifts at one residual leave of the original's."""
    pairs = [(fact.norm**2, dict(fact.frontier)[tolerance] ** 2) for fact in facts]
    whole = sum(norm for norm, _ in pairs)
    return sum(norm * ratio for norm, ratio in pairs) / whole if whole else 1.0


def _telling(loss: Loss, samples: Samples, batch: Batch, outputs: Values) -> str | None:
    """The output that tells classes of whole samples apart; None where the model is no classifier of those."""
    if not loss.is_distance:
        one_each = samples.labels is not None and samples.labels.ndim == 1
        return loss.output if loss.is_classification and one_each else None
    (name, scores), *others = outputs.items()
    classifies = not others and scores.ndim == 2 and len(scores) == batch.rows and scores.shape[1] > 1
    return name if classifies else None
