"""What a report's claims rest on: the outputs, held-out data, the drift of the data, errors under quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_optshift.report.diagnosis import Drift
from onnx_optshift.report.figures import Cell, Name, Word, change, number, percent, with_error
from onnx_optshift.report.model import HeldoutResult, OutputComparison, QuantizationError, Report
from onnx_optshift.report.section import Fact, Facts, Note, Section, Table, explained, marks

_BOUNDS = {"noise": "allowed by noise", "tolerance": "allowed", "measured": "measured, no bound was set"}


def worst_output(outputs: Sequence[OutputComparison], *, judged: bool) -> Fact:
    """The output that deviates most."""
    worst = max(outputs, key=lambda output: (math.isnan(output.rel), output.rel))
    bound = _BOUNDS[worst.bound_kind] + ("" if worst.bound_kind == "measured" else f": {number(worst.bound)}")
    remark = bound if judged else "reported only"
    agreed = [output.top1_agreement for output in outputs if output.top1_agreement is not None]
    # Nobody must read "within its bound" as "the same" where the largest entry is another.
    remark += f"; same argmax on {100 * min(agreed):.2f} %" if agreed else ""
    return Fact("output deviation", worst.rel, remark)


def outputs(report: Report) -> Section | None:
    """Every output of the model, against the original's."""
    proof = report.verification
    if proof is None:
        return None
    judged, noise = report.judges_outputs, proof.noise_floor
    titles = ["output", "result", "deviation", "bound", "worst sample", "largest difference", "same argmax", "samples"]
    rows: list[list[Cell]] = []
    for o in proof.outputs:
        result = Word("passed" if o.passed else "FAILED") if judged else "reported only"
        rows.append([Name(o.name), result, o.rel, o.bound, o.max_rel, o.max_abs, percent(o.top1_agreement), o.samples])
    kinds = "; ".join(_BOUNDS[kind] for kind in dict.fromkeys(output.bound_kind for output in proof.outputs))
    tries = proof.attempts if proof.attempts > 1 else None
    facts = [
        Fact("reverted", proof.reverted or None, "the outputs left their bounds"),
        Fact("attempts", tries, "candidates written and compared until one passed"),
    ]
    if noise is not None:
        runs = f"worst sample {number(noise.max_rel)}; {', '.join(noise.runs)}; batch size {noise.batch_size}"
        facts += [
            Fact("noise floor", noise.rel, runs),
            Fact("weights rounded", noise.rounding, "worst sample when they move by one unit"),
            Fact("one by one", noise.other_batch_size, "worst sample alone; no part of the floor"),
        ]
    note = f"Deviation and bound: relative, over all samples. Bound: {kinds}."
    return Section("proof", "Outputs", [Table(titles, rows, note=note), Facts(facts)])


def heldout(report: Report) -> Section | None:
    """What unseen data says about the change, and every trial that it judged."""
    result = report.heldout_result
    if result is None:
        return None
    note = f"{result.after.n} samples. Loss: {result.loss_name}."
    if report.heldout is not None and report.heldout.split:
        note += " They were split off the calibration data; the final solve covers them too."
    if len(result.tried) > 1:
        note += " Data that chooses among trials flatters the chosen one a little."
    decided = Note(_decided(result), "good" if result.accepted else "plain")
    return Section("heldout", "Held-out data", [decided, Note(note), *_trials(result)])


def _decided(result: HeldoutResult) -> str:
    """What was judged, and where that was not the float model, what the change costs there."""
    if not result.accepted and not result.tried:
        return "Nothing was judged: no layer had a shift to offer."
    if not result.accepted:
        return "Rejected: the model keeps its weights."
    if not result.quantized:
        return f"Accepted by {result.loss_name}."
    errors = ", ".join(f"from {number(q.before)} to {number(q.after)} at {q.bits} bits" for q in result.quantized)
    loss = f"from {number(result.before.loss)} to {number(result.after.loss)}"
    return f"Accepted by the quantized model, whose output error goes {errors}; the float model's loss goes {loss}."


def _trials(result: HeldoutResult) -> tuple[Table, Facts]:
    """Every trial beside the original, from the smallest tolerance up."""
    tried, before = result.tried, result.before
    errors = {score.bits: score.before for score in result.quantized}
    errors |= {score.bits: score.before for trial in tried for score in trial.quantized}
    titles = ["trial", "result", *(f"error at {b} bits" for b in errors), "loss", "accuracy", "change of loss"]
    ordered = sorted(tried, key=lambda trial: trial.tolerance)
    marked = marks(trial.reason for trial in ordered if not trial.accepted)
    rows: list[list[Cell]] = [["original", "", *errors.values(), before.loss, percent(before.top1), None]]
    for trial in ordered:
        accepted = "chosen" if trial.chosen else "accepted"
        word = Word(accepted if trial.accepted else f"rejected {marked[trial.reason]}")
        scores = {score.bits: score.after for score in trial.quantized}
        moved = with_error(trial.mean_difference, trial.standard_error)
        rows.append([trial.what, word, *map(scores.get, errors), trial.loss, percent(trial.top1), moved])
    is_detail = len(tried) < 2
    table = Table(titles, rows if tried else [], "Trials", detail=is_detail, drawn=titles[2])
    return table, explained(marked, detail=is_detail)


def drift(found: Drift | None) -> Section | None:
    """How far the data is from what the changed layers were solved for."""
    if found is None or not found.layers:
        return None
    baseline = {layer.name: layer.quantiles.get(str(found.quantile)) for layer in found.baseline or ()}
    levels = list(found.layers[0].quantiles)
    shares = [f"{float(level):.0%} of samples" for level in levels]
    titles = ["layer", *shares, "baseline", "worst samples"]
    rows: list[list[Cell]] = []
    for layer in found.layers:
        worst = ", ".join(str(sample) for sample, _ in layer.worst)
        rows.append([Name(layer.name), *map(layer.quantiles.get, levels), baseline.get(layer.name), worst])
    note = "Share of a sample's output in this layer that the shift changes, at most, for so many of the samples."
    return Section("drift", "Drift of the data", [Table(titles, rows, note=note)])


def quantization(errors: Sequence[QuantizationError]) -> Section:
    """Every layer's error under round-to-nearest."""
    note = "Relative error of each layer's output under round-to-nearest, against the original's float output."
    tables = []
    for bits in dict.fromkeys(error.bits for error in errors):
        rows = [[Name(e.layer), change(e.error_before, e.error_after)] for e in errors if e.bits == bits]
        tables.append(Table(["layer", "error"], rows, f"{bits} bits", note, detail=True, drawn="error"))
    return Section("quantization", "Quantization error", tables)
