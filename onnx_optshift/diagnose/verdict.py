"""Whether the conditions of the method hold: a checklist of figures, and what follows from it.

Nothing here decides what is written; the held-out gate does. The checklist says beforehand whether a run is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx_optshift.report.diagnosis import FAIL, GO, NO_GO, PASS, TRY_SMALL, WARN, Check, Collapse, LayerRank, Verdict

# Rows per input feature. Below 1 some freedom is but a lack of data; twice that is what synthetic inputs get.
ENOUGH_ROWS = 2.0
# With fewer held-out samples, one standard error of top-1 at 90 % is more than 2 points.
ENOUGH_JUDGES = 200
# Share of classes without a sample beyond which held-out data of the same origin says nothing about the model.
MOST_MISSING = 0.9
# Within-class variance, in units of the spread between classes, up to which a class's mean speaks for its samples.
COLLAPSED, LOOSE = 0.1, 1.0
# Residual at which freedom is judged, and the norm² (as a share of the original's) that makes a run worth it.
JUDGED_AT = 0.1
WORTH_IT, HARDLY = 0.9, 0.98


@dataclass(frozen=True)
class Conditions:
    """What is known about a model and its data before anything is shifted."""

    ranks: Sequence[LayerRank]  # of every layer with finite rows
    gains: Sequence[tuple[float, float]]  # layer by layer (‖V‖², ‖W‖² / ‖V‖² at a residual of `JUDGED_AT`)
    samples: int  # of calibration data
    synthetic: bool  # whether they are made up
    counts: Mapping[str, int]  # samples of each class present; empty where there are no classes
    classes: int | None  # that the model tells apart; None where it is no classifier
    labelled: bool  # whether the classes are labels; else the model's own answers
    collapse: Collapse | None  # at the last linear layer; None where it could not be measured
    judges: int  # held-out samples; 0 without any
    judges_given: bool  # whether they were given, not split off


def verdict(conditions: Conditions) -> Verdict:
    """The checklist, and its answer.

    A failed check is a no-go, a warning means to try small. Two checks concern `--stochastic` alone: they warn, but do
    not hold back the rest.
    """
    if not conditions.ranks:
        check = Check("layers", FAIL, "no layer that could be shifted got finite rows", "See inspect for the reasons.")
        return Verdict(NO_GO, "There is nothing to shift.", (check,))
    general = [_rows(conditions), *_present(conditions), _freedom(conditions), _heldout(conditions)]
    checks = (*general, *_batch(conditions), *_collapsed(conditions.collapse))
    failed = [check.name for check in checks if check.status == FAIL]
    warned = [check.name for check in general if check.status == WARN]
    if failed:
        return Verdict(NO_GO, f"Not met: {', '.join(failed)}.", checks)
    if warned:
        return Verdict(TRY_SMALL, f"Start with one layer or a small tolerance; watch: {', '.join(warned)}.", checks)
    return Verdict(GO, "All conditions hold; the held-out gate still decides.", checks)


def _rows(conditions: Conditions) -> Check:
    name = "enough samples"
    scarce = min(conditions.ranks, key=lambda rank: rank.rows / rank.d)
    ratio = scarce.rows / scarce.d
    figure = f"{conditions.samples} samples; {ratio:.2g} rows per input feature of {scarce.name} (fewest)"
    if conditions.synthetic:
        return Check(name, WARN, f"{figure}; made up", "Give real data with --calib: made-up inputs prove little.")
    if ratio >= ENOUGH_ROWS:
        return Check(name, PASS, figure)
    wanted = -(-conditions.samples * ENOUGH_ROWS // ratio)
    advice = f"Give about {wanted:.0f} samples, or rely on held-out data: what few rows leave free, others may need."
    return Check(name, WARN, figure, advice)


def _present(conditions: Conditions) -> Iterator[Check]:
    name, classes, counts = "every class present", conditions.classes, conditions.counts.values()
    if not classes:
        return
    seen = len(counts)
    origin = "labels" if conditions.labelled else "the model's own answers"
    few, many = min(counts, default=0), max(counts, default=0)
    figure = f"{seen} of {classes} classes by {origin}; {few} to {many} samples"
    advice = f"Add samples of the other {classes - seen}: a class that calibration never shows may lose its answers."
    if seen == classes:
        yield Check(name, PASS, figure)
    else:
        yield Check(name, FAIL if seen < (1 - MOST_MISSING) * classes else WARN, figure, advice)


def _freedom(conditions: Conditions) -> Check:
    name = "freedom exists"
    free = sum(rank.d - rank.needed for rank in conditions.ranks)
    whole = sum(norm for norm, _ in conditions.gains)
    share = sum(norm * ratio for norm, ratio in conditions.gains) / whole if whole else 1.0
    layers = sum(rank.needed < rank.d for rank in conditions.ranks)
    figure = (
        f"{free} free directions in {layers} of {len(conditions.ranks)} layers; at a layer residual of {JUDGED_AT:g} "
        f"norm² falls to {share:.2f} of itself"
    )
    if share > HARDLY and not free:
        advice = "Nothing to gain: training (weight decay) has already taken what the norm could give."
        return Check(name, FAIL, figure, advice)
    if free or share <= WORTH_IT:
        return Check(name, PASS, figure)
    return Check(name, WARN, figure, "Little to gain: look at the frontier before taking a tolerance.")


def _heldout(conditions: Conditions) -> Check:
    name = "held-out data"
    origin = "given" if conditions.judges_given else "split off the calibration data"
    figure = f"{conditions.judges} samples, {origin}" if conditions.judges else "none"
    if not conditions.judges:
        return Check(name, WARN, figure, "Give --heldout: without it harm to unseen data goes unseen.")
    if conditions.judges >= ENOUGH_JUDGES:
        return Check(name, PASS, figure)
    return Check(name, WARN, figure, f"Give at least {ENOUGH_JUDGES}: fewer cannot show a harm of a point or two.")


def _batch(conditions: Conditions) -> Iterator[Check]:
    name = "stochastic: B >= classes"
    if not conditions.classes:
        return
    seen = max(1, len(conditions.counts))
    widths = {rank.name: rank.d for rank in conditions.ranks}
    last = widths[conditions.collapse.layer] if conditions.collapse else max(widths.values())
    most = min(last - 1, conditions.samples)
    figure = f"B may be {seen} to {most}: classes seen, and less than the last layer's width {last} or the samples"
    if most < seen:
        yield Check(name, WARN, figure, "Leave --stochastic out: a batch of every class leaves no freedom.")
    elif seen < conditions.classes:
        yield Check(name, WARN, figure, "A batch can hold only classes that are there.")
    else:
        yield Check(name, PASS, figure)


def _collapsed(collapse: Collapse | None) -> Iterator[Check]:
    name = "stochastic: features collapsed"
    if collapse is None:
        return
    nc4 = "" if collapse.nc4 is None else f", NC4 {100 * collapse.nc4:.1f} %"
    figure = f"NC1 {collapse.nc1:.3g}{nc4} at the input of {collapse.layer}"
    if collapse.nc1 <= COLLAPSED:
        yield Check(name, PASS, figure)
    elif collapse.nc1 <= LOOSE:
        yield Check(name, WARN, figure, "Take a large B, and let held-out data choose the draw.")
    else:
        yield Check(name, WARN, figure, "Take a tolerance on all samples instead of --stochastic.")
