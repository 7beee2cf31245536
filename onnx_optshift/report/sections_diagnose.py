"""What a diagnosis says: the checklist, the ranks of the layers' inputs, neural collapse and flatness."""

from __future__ import annotations

from onnx_optshift.report.diagnosis import Diagnosis, Flatness, FlatnessReport
from onnx_optshift.report.figures import Cell, Change, Name, Percent, Word, number
from onnx_optshift.report.section import ChartOf, Column, Fact, Facts, Note, Section, Table, figures


def conditions(diagnosis: Diagnosis | None) -> Section | None:
    """The checklist that the verdict follows from."""
    if diagnosis is None:
        return None
    checks = diagnosis.verdict.checks
    rows = tuple((check.name, Word(check.status), check.figure, check.advice) for check in checks)
    columns = tuple(map(Column, ("check", "result", "figure", "what to do")))
    return Section("verdict", "Checklist", (Table(columns, rows),))


def ranks(diagnosis: Diagnosis | None) -> Section | None:
    """How many directions each layer's input uses."""
    if diagnosis is None or not diagnosis.layers:
        return None
    columns = (Column("layer"), *figures("d", "rows", "rank", "needed", "effective", "stable"))
    rows = tuple((Name(x.name), x.d, x.rows, x.rank, x.needed, x.effective, x.stable) for x in diagnosis.layers)
    note = (
        "Directions of a layer's input. Rank: that the data uses. Needed: that matter to the output at its rounding. "
        "Effective, stable: counted by their strength."
    )
    return Section("ranks", "Input ranks", (Table(columns, rows, note=note),))


def features(diagnosis: Diagnosis | None) -> Section | None:
    """Neural collapse at the last linear layer."""
    if diagnosis is None or diagnosis.features is None:
        return None
    found = diagnosis.features
    rows = [
        Fact("NC1", found.nc1, "variability within classes, against that between them"),
        Fact("NC2 norms", found.nc2_norms, "spread of the class means' norms"),
        Fact("NC2 angles", found.nc2_angles, "distance from equal angles"),
    ]
    if found.nc2_weight_norms is not None:
        rows.append(Fact("NC2 weights", found.nc2_weight_norms, "spread of the norms of the classifier's columns"))
    if found.nc3 is not None:
        rows.append(Fact("NC3", found.nc3, "distance of the classifier from the class means"))
    if found.nc4 is not None:
        rows.append(Fact("NC4", Percent(found.nc4), "answers that are not the nearest class mean"))
    where = Note(f"Input of {found.layer}, {found.samples} samples; 0 is full collapse, every class one point.")
    counts = ", ".join(f"{label}: {count}" for label, count in found.counts.items())
    per_class = Facts((Fact("samples per class", counts),), detail=True)
    return Section("collapse", "Neural collapse", (where, Facts(tuple(rows)), per_class))


def flatness(found: FlatnessReport | None) -> Section | None:
    """How curved the loss is around the weights."""
    if found is None:
        return None
    compared = found.loss_after is not None
    sides = figures("trace", "after", "change", "relative", "after") if compared else figures("trace", "relative")
    rows = [(Name(x.name), *_sides(x.trace, error=True), *_sides(x.relative)) for x in found.layers]
    total = ("total", *_sides(found.trace, error=True), *([None] * (2 if compared else 1)))
    note = (
        "Trace of the loss's Hessian in each layer's weight; relative: the same however layers are scaled against "
        "each other. Read it beside the loss: less certain answers have a larger curvature by that alone."
    )
    loss = Change(found.loss_before, found.loss_after) if compared else found.loss_before
    facts = [Fact("mean loss", loss, f"{found.loss}, {found.samples} samples, noise {number(found.noise)}")]
    for sharp in found.sharpness:
        value = _pair(sharp.rise) if compared else sharp.rise.before
        facts.append(Fact(f"sharpness at {sharp.sigma:g}", value, "rise of the loss under this share of noise"))
    for side, top in (("", found.top_before), (" after", found.top_after)):
        if top is not None:
            bracket = f"{number(top.lower)} to {number(top.upper)}"
            facts.append(Fact(f"largest eigenvalue{side}", bracket, "of the Gauss-Newton matrix, bracketed"))
    facts.append(Fact("probes", found.probes, "random directions for each layer"))
    table = Table((Column("layer"), *sides), (*rows, total), note=note)
    return Section("flatness", "Flatness", (table, Facts(tuple(facts)), ChartOf("flatness")))


def _pair(figure: Flatness) -> Change:
    return Change(figure.before.value, figure.after.value if figure.after else None)


def _sides(figure: Flatness, *, error: bool = False) -> tuple[Cell, ...]:
    """The figure, or both sides; and, where errors tell something, their difference with its own."""
    if figure.after is None:
        return (figure.before if error else figure.before.value,)
    return (figure.before.value, figure.after.value, *((figure.change,) if error else ()))
