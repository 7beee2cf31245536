"""What a report's claims rest on: the outputs, held-out data, the drift of the data, errors under quantization."""

from __future__ import annotations

from onnx_optshift.report.figures import Cell, Name, Names, Percent, Word, number, percentage_points, relative_change
from onnx_optshift.report.model import Drift, HeldoutResult, QuantizationError, Report, Trial
from onnx_optshift.report.section import Block, ChartOf, Column, Fact, Facts, Note, Section, Table, figures

_BOUNDS = {
    "noise": "a small multiple of what runs of the original model differ by",
    "tolerance": "the deviation that was asked for",
    "measured": "measured on the trial that was accepted",
}


def outputs(report: Report) -> Section | None:
    """Every output of the model, against the original's."""
    proof = report.verification
    if proof is None:
        return None
    blocks: list[Block] = []
    titles = figures("deviation", "bound", "worst sample", "largest difference", "same answer", "samples")
    rows = tuple(
        (
            Name(o.name),
            Word("passed" if o.passed else "FAILED") if report.judges_outputs else "reported only",
            *(o.rel, o.bound, o.max_rel, o.max_abs, Percent(o.top1_agreement), o.samples),
        )
        for o in proof.outputs
    )
    if rows:
        kinds = "; ".join(_BOUNDS[kind] for kind in dict.fromkeys(output.bound_kind for output in proof.outputs))
        note = f"Deviation and bound: relative, over all samples. Bound: {kinds}."
        blocks.append(Table((Column("output"), Column("result"), *titles), rows, note=note))
    facts = []
    if (noise := proof.noise_floor) is not None:
        runs = f"worst sample {number(noise.max_rel)}; {', '.join(noise.runs)}; batch size {noise.batch_size}"
        facts.append(Fact("noise floor", noise.rel, runs))
        if noise.rounding is not None:
            facts.append(Fact("weights rounded", noise.rounding, "worst sample when they move by one unit"))
        if noise.other_batch_size is not None:
            facts.append(Fact("one by one", noise.other_batch_size, "worst sample alone; no part of the floor"))
    if proof.reverted:
        facts.append(Fact("reverted", Names(proof.reverted), "the outputs left their bounds"))
    if proof.attempts > 1:
        facts.append(Fact("attempts", proof.attempts, "candidates written and compared until one passed"))
    return Section("proof", "Outputs", (*blocks, *([Facts(tuple(facts))] if facts else [])))


def heldout(report: Report) -> Section | None:
    """What unseen data says about the change, and every trial that it judged."""
    result = report.heldout_result
    if result is None:
        return None
    before, after = result.before, result.after
    rows: list[tuple[Cell, ...]] = [
        (f"output error at {q.bits} bits", q.before, q.after, relative_change(q.before, q.after))
        for q in result.quantized
    ]
    kind = " in float" if result.quantized else ""
    rows.append((f"loss{kind}", before.loss, after.loss, relative_change(before.loss, after.loss)))
    if before.top1 is not None and after.top1 is not None:
        change = percentage_points(before.top1, after.top1)
        rows.append((f"accuracy{kind}", Percent(before.top1), Percent(after.top1), change))
    note = f"{after.n} samples. Loss: {result.loss_name}."
    if report.heldout is not None and report.heldout.split:
        note += " They were split off the calibration data; the final solve covers them too."
    if len(result.tried) > 1:
        note += " Data that chooses among trials flatters the chosen one a little."
    blocks = (
        Note(_decided(result), "good" if result.accepted else "plain"),
        Table((Column("figure"), *figures("original", "shifted", "change")), tuple(rows), note=note),
        ChartOf("heldout"),
    )
    return Section("heldout", "Held-out data", (*blocks, *(_trials(result.tried) if result.tried else ())))


def _decided(result: HeldoutResult) -> str:
    """What was judged, and where that was not the float model, what the change costs there."""
    if not result.accepted:
        return "Rejected: the model keeps its weights."
    if not result.quantized:
        return f"Accepted by {result.loss_name}."
    errors = ", ".join(f"from {number(q.before)} to {number(q.after)} at {q.bits} bits" for q in result.quantized)
    loss = f"from {number(result.before.loss)} to {number(result.after.loss)}"
    return f"Accepted by the quantized model, whose output error goes {errors}; the float model's loss goes {loss}."


def _trials(tried: tuple[Trial, ...]) -> tuple[Block, ...]:
    bits = tuple(dict.fromkeys(score.bits for trial in tried for score in trial.quantized))
    has_accuracy = any(trial.top1 is not None for trial in tried)
    reasons = list(dict.fromkeys(trial.reason for trial in tried if not trial.accepted))
    accuracy = ["accuracy"] if has_accuracy else []
    titles = figures(*(f"error at {b} bits" for b in bits), "loss", *accuracy, "change of loss")
    rows = []
    for k, trial in enumerate(tried, 1):
        word = Word("chosen" if trial.chosen else "accepted" if trial.accepted else "rejected")
        if not trial.accepted:
            word = Word("rejected", f"[{reasons.index(trial.reason) + 1}]")
        by_bits = {score.bits: score.after for score in trial.quantized}
        top1 = (Percent(trial.top1),) if has_accuracy else ()
        change = f"{number(trial.mean_difference)} +- {number(trial.standard_error)}"
        rows.append((k, trial.what, word, *(by_bits.get(b) for b in bits), trial.loss, *top1, change))
    is_detail = len(tried) < 2
    columns = (*figures("no."), Column("trial"), Column("result"), *titles)
    why = tuple(Fact(f"[{k}]", reason) for k, reason in enumerate(reasons, 1))
    table = Table(columns, tuple(rows), "Trials", detail=is_detail)
    return (table, Facts(why, detail=is_detail)) if why else (table,)


def drift(found: Drift | None) -> Section | None:
    """How far the data is from what the changed layers were solved for."""
    if found is None or not found.layers:
        return None
    baseline = {layer.name: layer.quantiles.get(str(found.quantile)) for layer in found.baseline or ()}
    levels = tuple(found.layers[0].quantiles)
    titles = figures(*(f"{float(level):.0%} of samples" for level in levels), *(["baseline"] if baseline else []))
    rows = tuple(
        (
            Name(layer.name),
            *(layer.quantiles[level] for level in levels),
            *([baseline.get(layer.name)] if baseline else []),
            ", ".join(str(sample) for sample, _ in layer.worst),
        )
        for layer in found.layers
    )
    note = "Share of a sample's output in this layer that the shift changes, at most, for so many of the samples."
    return Section(
        "drift", "Drift of the data", (Table((Column("layer"), *titles, Column("worst samples")), rows, note=note),)
    )


def quantization(errors: tuple[QuantizationError, ...] | None) -> Section | None:
    """Every layer's error under round-to-nearest."""
    if not errors:
        return None
    columns = (Column("layer"), *figures("bits", "before", "after", "change"))
    rows = tuple(
        (Name(e.layer), e.bits, e.error_before, e.error_after, relative_change(e.error_before, e.error_after))
        for e in errors
    )
    note = "Relative error of each layer's output under round-to-nearest, against the original's float output."
    charts = [ChartOf(f"quantization-{bits}") for bits in dict.fromkeys(error.bits for error in errors)]
    return Section("quantization", "Quantization error", (*charts, Table(columns, rows, note=note, detail=True)))
