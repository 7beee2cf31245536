"""The diagnosis of one model: flatness, neural collapse, ranks and the checklist, in one report. Writes no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift import data as arrangement
from onnx_optshift.calibration.source import Samples
from onnx_optshift.data import Data
from onnx_optshift.decide import choose
from onnx_optshift.decide.loss import Loss
from onnx_optshift.decide.share import share_out
from onnx_optshift.diagnose.collapse import collapse, layer_rank
from onnx_optshift.diagnose.flatness import MOST_FLATNESS_SAMPLES, flatness, thinned
from onnx_optshift.diagnose.landscape import loss_of
from onnx_optshift.diagnose.verdict import JUDGED_AT, Conditions, verdict
from onnx_optshift.errors import InputError
from onnx_optshift.graph.weights import Weight
from onnx_optshift.layers import Layers
from onnx_optshift.report.model import Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.reporting import Clock, Findings, build_report
from onnx_optshift.settings import Settings
from onnx_optshift.workbench import Workbench, open_model, open_workbench

DEFAULT_PROBES = 32


def diagnose(
    model: str | Path,
    calibration: Sequence[object] | None,
    heldout: Sequence[object] | None,
    settings: Settings,
    probes: int = DEFAULT_PROBES,
    progress: Progress = SILENT,
) -> Report:
    """Measures whether the method's conditions hold, and what a shift at the given tolerance would do to flatness.

    Args:
        model: Path of an ONNX file.
        calibration: Sources of calibration data; None looks beside the model.
        heldout: Sources of held-out data, as for the pass.
        settings: `tolerance` (a number) is that of the shift whose flatness stands beside the original's.
        probes: Random directions for each layer; 0 leaves flatness out.
        progress: Where long passes report to.

    Returns:
        A report without a written model: `flatness`, and `collapse` with `verdict`, `features` and `layers`.

    Raises:
        InputError: The model, the data or a setting cannot be used.
    """
    clock = Clock()
    source, discovered, skips = open_model(model, settings)
    bench = open_workbench(source, discovered, settings, progress)
    samples = arrangement.find_calibration(source, calibration, settings)
    if samples is None:
        raise InputError("diagnose needs data to look at: give it with --calib.")
    data = arrangement.arrange(source, samples, heldout, settings)
    unreached = bench.drop_unstackable(samples)
    weights = bench.weights
    findings = Findings(source, settings, bench.device, weights, (*skips, *unreached), data)
    if not weights:
        return build_report(findings, None, clock, None)
    with clock("capture"):
        bench.plan(samples)
        layers = Layers(weights, bench.collect(samples), source.initializer, device=bench.device.solve)
    with clock("solve"):
        decision = choose.exact(layers, layers, None, samples)
        if isinstance(settings.tolerance, float) and settings.tolerance > 0:
            shared = share_out(bench, samples, layers.candidate, settings.tolerance, settings.seed)
            decision = choose.Decision(shared.candidate, settings.tolerance, samples)
    report = build_report(replace(findings, layers=layers, decision=decision), None, clock, None)
    found = None
    if probes:
        few = thinned(samples, MOST_FLATNESS_SAMPLES, settings.seed)
        arrays = decision.candidate.arrays or None
        found = flatness(bench, few, loss_of(bench, few), {}, arrays, probes=probes, seed=settings.seed)
    return replace(
        report,
        flatness=None if found is None else asdict(found),
        collapse=conditions(bench, layers, data),
        timing=clock.timing(),
    )


def conditions(bench: Workbench, layers: Layers, data: Data) -> dict[str, Any]:
    """The report's `collapse`: features of the last layer, ranks of all, and the verdict.

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
    gains = [
        (float(layers.matrix(weight).square().sum()), layers.frontier(weight, (JUDGED_AT,))[0][1] ** 2)
        for weight in bench.weights
        if weight.name in known
    ]
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
            judges=len(data.judge) if data.judge is not None else 0,
            judges_given=data.judge is not None and not data.split,
        )
    )
    return {
        "verdict": asdict(answer),
        "features": None if features is None else asdict(features),
        "layers": tuple(asdict(rank) for rank in ranks),
    }


def _classes(bench: Workbench, samples: Samples, loss: Loss) -> tuple[NDArray[np.int64] | None, str | None]:
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
    for batch, outputs in bench.reference(samples):
        count = len(batch.indices)
        fitting = [n for n, v in outputs.items() if v.ndim == 2 and v.shape[0] >= count and v.shape[1] >= 2]
        if len(outputs) != 1 or not fitting:
            return None, None
        name = fitting[0]
        found.append(outputs[name][:count].argmax(axis=1).astype(np.int64))
    return np.concatenate(found), name


def _width(bench: Workbench, samples: Samples, output: str) -> int:
    """Number of classes that an output `[n, k, 1...]` tells apart."""
    batch, outputs = next(iter(bench.reference(samples)))
    return outputs[output].size // (len(batch.indices) + batch.padding)


def _last_layer(weights: Sequence[Weight], width: int) -> Weight:
    """The last weight with one column for each class; the last of all where there is none."""
    return next((weight for weight in reversed(weights) if weight.m == width), weights[-1])
