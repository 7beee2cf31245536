"""What a diagnosis says: the checklist, the ranks of the layers' inputs, neural collapse and flatness."""

from __future__ import annotations

from onnx_optshift.report.diagnosis import Diagnosis, Flatness, FlatnessReport
from onnx_optshift.report.figures import Cell, Figure, Name, Word, change, number, percent
from onnx_optshift.report.section import Fact, Facts, Note, Section, Table


def conditions(diagnosis: Diagnosis | None) -> Section | None:
    """The checklist that the verdict follows from."""
    if diagnosis is None:
        return None
    rows = [[check.name, Word(check.status), check.figure, check.advice] for check in diagnosis.verdict.checks]
    return Section("verdict", "Checklist", [Table(["check", "result", "figure", "what to do"], rows)])


def ranks(diagnosis: Diagnosis | None) -> Section | None:
    """How many directions each layer's input uses."""
    if diagnosis is None or not diagnosis.layers:
        return None
    titles = ["layer", "d", "rows", "rank", "needed", "effective", "stable"]
    rows: list[list[Cell]] = [
        [Name(x.name), x.d, x.rows, x.rank, x.needed, x.effective, x.stable] for x in diagnosis.layers
    ]
    note = (
        "Directions of a layer's input. Rank: that the data uses. Needed: that matter to the output at its rounding. "
        "Effective, stable: counted by their strength."
    )
    return Section("ranks", "Input ranks", [Table(titles, rows, note=note)])


def features(diagnosis: Diagnosis | None) -> Section | None:
    """Neural collapse at the last linear layer."""
    if diagnosis is None or diagnosis.features is None:
        return None
    found = diagnosis.features
    rows = [
        Fact("NC1", found.nc1, "variability within classes, against that between them"),
        Fact("NC2 norms", found.nc2_norms, "spread of the class means' norms"),
        Fact("NC2 angles", found.nc2_angles, "distance from equal angles"),
        Fact("NC2 weights", found.nc2_weight_norms, "spread of the norms of the classifier's columns"),
        Fact("NC3", found.nc3, "distance of the classifier from the class means"),
        Fact("NC4", percent(found.nc4), "answers that are not the nearest class mean"),
    ]
    where = Note(f"Input of {found.layer}, {found.samples} samples; 0 is full collapse, every class one point.")
    counts = ", ".join(f"{label}: {count}" for label, count in found.counts.items())
    per_class = Facts([Fact("samples per class", counts)], detail=True)
    return Section("collapse", "Neural collapse", [where, Facts(rows), per_class])


def flatness(found: FlatnessReport | None) -> Section | None:
    """How curved the loss is around the weights."""
    if found is None:
        return None
    rows: list[list[Cell]] = [[Name(x.name), *_with_error(x.trace), _sides(x.relative)] for x in found.layers]
    rows.append(["total", *_with_error(found.trace), None])
    note = (
        "Trace of the loss's Hessian in each layer's weight, and the standard error of the trace, or of its change "
        "where there is one. Relative: the same however layers are scaled against each other. Read it beside the "
        "loss: less certain answers have a larger curvature by that alone."
    )
    loss = change(found.loss_before, found.loss_after)
    facts = [Fact("mean loss", loss, f"{found.loss}, {found.samples} samples, noise {number(found.noise)}")]
    for side, top in (("", found.top_before), (" after", found.top_after)):
        bracket = f"{number(top.lower)} to {number(top.upper)}" if top else None
        facts.append(Fact(f"largest eigenvalue{side}", bracket, "of the Gauss-Newton matrix, bracketed"))
    facts.append(Fact("probes", found.probes, "random directions for each layer"))
    table = Table(["layer", "trace", "standard error", "relative"], rows, note=note)
    rises: list[list[Cell]] = [[Figure(f"{s.sigma:g}"), *_with_error(s.rise)] for s in found.sharpness]
    noisy = "Rise of the mean loss under noise of this size, as a share of each filter of weights."
    sharpness = Table(["noise", "rise", "standard error"], rises, "Sharpness", noisy)
    return Section("flatness", "Flatness", [table, sharpness, Facts(facts)])


def _sides(figure: Flatness) -> Cell:
    return change(figure.before.value, figure.after.value if figure.after else None)


def _with_error(figure: Flatness) -> list[Cell]:
    return [_sides(figure), (figure.change or figure.before).error]
