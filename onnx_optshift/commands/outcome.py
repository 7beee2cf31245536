"""How a command ended, in one sentence that follows from the facts of every layer; and whether that is a failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onnx_optshift.errors import ToleranceError
from onnx_optshift.report.diagnosis import Drift
from onnx_optshift.report.model import LayerReport, Report, Verification
from onnx_optshift.solve.shift import Outcome

# What is said of layers that kept their weight, by the start of their reason. "{}" is "1 layer" or "3 layers".
_KEPT = (
    (Outcome.FULL_RANK.value, "{} with only one exact solution"),
    (Outcome.ALREADY_MINIMAL.value, "{} that no solution makes noticeably smaller"),
    (Outcome.ROUNDED_AWAY.value, "{} whose gain rounding takes back"),
    (Outcome.ROUNDS_WORSE.value, "{} that would be farther off once quantized"),
    (Outcome.NO_ROWS.value, "{} that no calibration sample reaches"),
    (Outcome.ZERO_OUTPUT.value, "{} whose output is always zero"),
    (Outcome.NONFINITE_ROWS.value, "{} whose inputs hold NaN or infinity"),
    (Outcome.NONFINITE_WEIGHT.value, "{} whose weight holds NaN or infinity"),
    ("gate: ", "{} rejected on held-out data"),
    ("reverted: ", "{} reverted because the outputs left the tolerance"),
)


def shift_summary(layers: Sequence[LayerReport], proof: Verification | None, where: str, *, written: bool) -> str:
    """The summary of a run, from all its layers; `where` the proof holds, if that is not all of the user's data."""
    shifted = sum(layer.status == "shifted" for layer in layers)
    candidates = sum(layer.status != "skipped" for layer in layers)
    if shifted:
        rest = [layer for layer in layers if layer.status == "rejected" or _broken(layer)]
        kept = f" {_kept(rest)}." if rest else ""
        return f"{shifted} of {candidates} layers shifted; {_proved(proof)}{where}.{_blind(proof)}{kept}"
    end = "The model was written unchanged." if written else "No model was written."
    if not layers:
        return f"Nothing to do: the model has no linear layer with a constant weight. {end}"
    if not candidates:
        return f"Nothing to do: {_skips(layers)}. {end}"
    return f"Nothing to gain: {_kept(layers)}. {end}"


def pair_summary(proof: Verification, differing: int, drift: Drift | None = None) -> str:
    """The summary of a comparison of two models in which some weights differ: the answer to what was asked, first."""
    if proof.identical_bytes:
        return "The two files are the same, byte for byte."
    weights = f"{differing} weight{'' if differing == 1 else 's'} differ{'s' if differing == 1 else ''}"
    worst = max((output.rel for output in proof.outputs), default=0.0)
    if drift is not None and drift.limit is not None:
        kept = f"{'passed' if drift.passed else 'FAILED'}: {drift.figure:.3g}, allowed {drift.limit:.3g}"
        return f"The drift {kept}. The outputs deviate by {worst:.2g} (reported only); {weights}.{_blind(proof)}"
    verdict = "match within their bounds" if proof.passed else "do not match"
    return f"The outputs {verdict} (largest relative deviation {worst:.2g}); {weights}.{_blind(proof)}"


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


def _blind(proof: Verification | None) -> str:
    """What could not be compared, a sentence for each output."""
    return "".join(
        f" Output {output.name!r} is not finite on {output.nonfinite} samples, and was not compared there."
        for output in (proof.outputs if proof else ())
        if output.nonfinite
    )


def _kept(layers: Sequence[LayerReport]) -> str:
    """Layers that kept their weight, counted by cause."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for layer in layers:
        if layer.status == "skipped" and not _broken(layer):
            continue
        words = next((words for start, words in _KEPT if layer.reason.startswith(start)), "{} left alone")
        counts[words] += 1
        if words.endswith("held-out data"):
            examples.setdefault(words, layer.reason.partition(": ")[2])
    return "; ".join(
        words.format(_number(count)) + (f" ({examples[words]})" if words in examples else "")
        for words, count in counts.most_common()
    )


def _broken(layer: LayerReport) -> bool:
    """Whether a layer is skipped for what is in its weight or its inputs, not for what it is."""
    return layer.status == "skipped" and layer.rows is not None


def _skips(layers: Sequence[LayerReport]) -> str:
    reasons = Counter(layer.reason.partition(". (a)")[0] for layer in layers)
    return "; ".join(f"{_number(count)} skipped ({reason})" for reason, count in reasons.most_common(3))


def _number(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _proved(proof: Verification | None) -> str:
    if proof is None or not proof.outputs:
        return "no output was compared"
    worst = max(proof.outputs, key=lambda output: output.rel)
    floor = proof.noise_floor.rel if proof.noise_floor else 0.0
    times = f", {worst.rel / floor:.1f}x the noise floor" if floor and worst.bound_kind == "noise" else ""
    bound = "measured; no bound was set" if worst.bound_kind == "measured" else f"allowed {worst.bound:.2g}"
    return f"outputs deviate by {worst.rel:.2g} (relative{times}; {bound})"
