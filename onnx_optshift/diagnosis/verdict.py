"""Whether the conditions of the method hold: a checklist of figures, and what follows from it.

Nothing here decides what is written; the held-out gate does. The checklist says beforehand whether a run is worth it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_optshift.report.diagnosis import (
    FAIL,
    GO,
    NO_GO,
    NOTE,
    PASS,
    TRY_SMALL,
    WARN,
    Check,
    Collapse,
    LayerRank,
    Verdict,
)

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
    exact: float | None = None  # ‖W‖² / ‖V‖² over all layers of the exact shift; None where a tolerance is asked for


def verdict(conditions: Conditions) -> Verdict:
    """The checklist, and its answer.

    A failed check is a no-go, a warning means to try small, so that a go stands beside neither. Two checks concern
    `--stochastic` alone: they are notes, which hold back nothing else.
    """
    if not conditions.ranks:
        check = Check("layers", FAIL, "no layer that could be shifted got finite rows", "See inspect for the reasons.")
        return Verdict(NO_GO, "There is nothing to shift.", (check,))
    general, classes = [_rows(conditions), _freedom(conditions), _heldout(conditions)], conditions.classes
    if classes:
        general.insert(1, _present(conditions, classes))
    batch = [_batch(conditions, classes)] if classes else []
    checks = (*general, *batch, *([_collapsed(conditions.collapse)] if conditions.collapse else []))
    failed = [check.name for check in checks if check.status == FAIL]
    warned = [check.name for check in general if check.status == WARN]
    if failed:
        return Verdict(NO_GO, f"Not met: {', '.join(failed)}.", checks)
    if warned:
        return Verdict(TRY_SMALL, f"Start with one layer or a small tolerance; watch: {', '.join(warned)}.", checks)
    noted = " Those of --stochastic do not." if any(check.status == NOTE for check in checks) else ""
    return Verdict(GO, f"All conditions hold; the held-out gate still decides.{noted}", checks)


def _check(name: str, figure: str, *rules: tuple[bool, str, str]) -> Check:
    """The status and the advice of the first rule that applies; passed where none does."""
    found = (Check(name, status, figure, advice) for applies, status, advice in rules if applies)
    return next(found, Check(name, PASS, figure))


def _rows(conditions: Conditions) -> Check:
    scarce = min(conditions.ranks, key=lambda rank: rank.rows / rank.d)
    ratio = scarce.rows / scarce.d
    made_up = "; made up" if conditions.synthetic else ""
    wanted = -(-conditions.samples * ENOUGH_ROWS // ratio)
    few = f"Give about {wanted:.0f} samples, or rely on held-out data: what few rows leave free, others may need."
    return _check(
        "enough samples",
        f"{conditions.samples} samples; {ratio:.2g} rows per input feature of {scarce.name} (fewest){made_up}",
        (conditions.synthetic, WARN, "Give real data with --calib: made-up inputs prove little."),
        (ratio < ENOUGH_ROWS, WARN, few),
    )


def _present(conditions: Conditions, classes: int) -> Check:
    seen, counts = len(conditions.counts), conditions.counts.values()
    origin = "labels" if conditions.labelled else "the model's own answers"
    fewest, most = min(counts, default=0), max(counts, default=0)
    advice = f"Add samples of the other {classes - seen}: a class that calibration never shows may lose its answers."
    return _check(
        "every class present",
        f"{seen} of {classes} classes by {origin}; {fewest} to {most} samples",
        (seen < (1 - MOST_MISSING) * classes, FAIL, advice),
        (seen < classes, WARN, advice),
    )


def _freedom(conditions: Conditions) -> Check:
    free = sum(rank.free for rank in conditions.ranks)
    whole = sum(norm for norm, _ in conditions.gains)
    share = sum(norm * ratio for norm, ratio in conditions.gains) / whole if whole else 1.0
    left = "" if conditions.exact is None else f"exactly, norm² falls to {conditions.exact:.3g} of itself, "
    gains_little = conditions.exact is not None and conditions.exact > WORTH_IT
    layers = sum(rank.free > 0 for rank in conditions.ranks)
    loose = "An exact shift gains little: give a --tolerance, and let held-out data decide."
    nothing = "Nothing to gain: training (weight decay) has already taken what the norm could give."
    return _check(
        "freedom exists",
        f"{free} free directions in {layers} of {len(conditions.ranks)} layers; {left}at a layer residual of "
        f"{JUDGED_AT:g} {'' if left else 'norm² falls '}to {share:.2f}{'' if left else ' of itself'}",
        (share > HARDLY, FAIL, nothing),
        (share > WORTH_IT, WARN, "Little to gain: look at the frontier before taking a tolerance."),
        (gains_little, WARN, loose),
    )


def _heldout(conditions: Conditions) -> Check:
    judges, origin = conditions.judges, "given" if conditions.judges_given else "split off the calibration data"
    few = f"Give at least {ENOUGH_JUDGES}: fewer cannot show a harm of a point or two."
    return _check(
        "held-out data",
        f"{judges} samples, {origin}" if judges else "none",
        (not judges, WARN, "Give --heldout: without it harm to unseen data goes unseen."),
        (judges < ENOUGH_JUDGES, WARN, few),
    )


def _batch(conditions: Conditions, classes: int) -> Check:
    seen = max(1, len(conditions.counts))
    widths = {rank.name: rank.d for rank in conditions.ranks}
    last = widths[conditions.collapse.layer] if conditions.collapse else max(widths.values())
    most = min(last - 1, conditions.samples)
    return _check(
        "stochastic: B >= classes",
        f"B may be {seen} to {most}: classes seen, and less than the last layer's width {last} or the samples",
        (most < seen, NOTE, "Leave --stochastic out: a batch of every class leaves no freedom."),
        (seen < classes, NOTE, "A batch can hold only classes that are there."),
    )


def _collapsed(collapse: Collapse) -> Check:
    nc4 = "" if collapse.nc4 is None else f", NC4 {100 * collapse.nc4:.1f} %"
    return _check(
        "stochastic: features collapsed",
        f"NC1 {collapse.nc1:.3g}{nc4} at the input of {collapse.layer}",
        (collapse.nc1 > LOOSE, NOTE, "Take a tolerance on all samples instead of --stochastic."),
        (collapse.nc1 > COLLAPSED, NOTE, "Take a large B, and let held-out data choose the draw."),
    )
