"""Two models on the same data: do the outputs match, which layers changed by how much, and does the data still fit?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnx_optshift.decide.decision import Decision, Grounds
from onnx_optshift.errors import InputError, ToleranceError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.prove.floor import Promise
from onnx_optshift.prove.pair import changed_layer, differs, matching
from onnx_optshift.report.build import Clock, Findings, build_report
from onnx_optshift.report.model import Drift, Report, Verification
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.capture import captured
from onnx_optshift.run.drift import drift, layer_drifts
from onnx_optshift.run.layers import Candidate
from onnx_optshift.run.prepare import find_calibration, prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.solve.objective import Norm


def verify(
    original: str | Path,
    changed: str | Path,
    calibration: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
    *,
    baseline: Sequence[object] | None = None,
) -> Report:
    """Compares the outputs of two models, and the outputs of each layer whose weight differs.

    Args:
        original: The model that the other is held against.
        changed: The other model; same inputs and outputs.
        calibration: The data; None looks beside the original.
        settings: `tolerance` is what the outputs may deviate by; 0 asks for equality within the noise floor.
        progress: Where long passes report to.
        baseline: Sources of the calibration data, whose drift is to stand beside that of the data.

    Returns:
        A report whose verification says whether the outputs match, and whose drift what the changes mean for the data.

    Raises:
        InputError: A model or the data cannot be used.
    """
    clock = Clock(progress)
    with progress.stage("preparation"):
        prepared = prepare(original, settings, calibration, progress=progress)
    a, b, data = prepared.model, ModelFile.load(changed), prepared.data
    if b.path is None or a.path is None:
        raise InputError("verify compares two files: give the paths of both models.")
    if data is None:
        raise InputError("verify needs data to run both models on: give it with --calib.")
    bench, samples = prepared.bench, data.calibration
    differing = [weight for weight in prepared.weights if differs(a, b, weight)]
    promise = Promise(settings.tolerance if isinstance(settings.tolerance, float) else 0.0, "tolerance", samples)
    found = Findings("verify", prepared, sha256=b.sha256, output=b.path)
    drifted: Drift | None = None
    if prepared.weights:
        with clock("capture"):
            layers, _ = captured(prepared, data, Norm())
        with clock("solve"):
            layers.survey()
            solved = {w.name: changed_layer(layers, w, b) for w in differing if w.name in layers.facts}
        way = Grounds(bench, layers, layers, None, samples, samples, settings.seed).parallel
        found = replace(found, layers=layers, decision=Decision(Candidate(solved, 0.0, layers.facts), promise, way))
        other = find_calibration(a, baseline, settings) if baseline else None
        pairs = {
            w.name: (layers.matrix(w), as_matrix(b.initializer(w.name), w.form, bench.device.solve)) for w in differing
        }
        calm = None if other is None else layer_drifts(bench, pairs, other)
        drifted = drift(layer_drifts(bench, pairs, samples), calm, settings.max_drift)
    with clock("verify"):
        proof = matching(bench, b, frozenset(w.name for w in differing), promise, settings.seed)
    report = build_report(replace(found, verification=proof), clock, summary="", drift=drifted)
    return replace(report, summary=_summary(a, b, len(differing), proof))


def judge(report: Report) -> None:
    """One verdict for each question that was asked: whether outputs match, and whether drift keeps its limit.

    Where a limit of drift was given that is the question, and outputs are reported only.

    Raises:
        ToleranceError: The answer is no.
    """
    if report.drift is not None and report.drift.limit is not None:
        if not report.drift.passed:
            raise ToleranceError(
                f"verify: the drift is {report.drift.figure:.3g}, allowed is {report.drift.limit:.3g}: the model meets "
                "data unlike its calibration data. Look at the worst samples in the report; if they are genuine, shift "
                "the original again with data like them."
            )
        return
    proof = report.verification
    if proof is None or not proof.passed:
        failed = [output for output in proof.outputs if not output.passed] if proof else []
        names = ", ".join(f"{o.name!r} by {o.rel:.3g} (allowed {o.bound:.3g})" for o in failed)
        raise ToleranceError(f"verify: outputs of the two models differ: {names or 'nothing was compared'}.")


def _summary(a: ModelFile, b: ModelFile, differing: int, proof: Verification) -> str:
    weights = f"{differing} weight{'' if differing == 1 else 's'} differ{'s' if differing == 1 else ''}"
    if a.sha256 == b.sha256:
        return "The two files are the same, byte for byte."
    worst = max((output.rel for output in proof.outputs), default=0.0)
    verdict = "match within their bounds" if proof.passed else "do not match"
    return f"The outputs {verdict} (largest relative deviation {worst:.2g}); {weights}."
