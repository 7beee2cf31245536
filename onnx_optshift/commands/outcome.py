"""How a shift ended, in one sentence that follows from the facts of every layer; and what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onnx_optshift.report.model import LayerReport, Verification
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


def shift_summary(
    layers: Sequence[LayerReport], proof: Verification | None, *, written: bool, synthetic: bool, covered: str = ""
) -> str:
    """The summary of a run.

    Args:
        layers: All layers, skipped ones too.
        proof: On the written file.
        written: Whether a file was written.
        synthetic: Whether the calibration data is made up.
        covered: Which samples the promise covers, where it is not all of them.
    """
    shifted = sum(layer.status == "shifted" for layer in layers)
    candidates = sum(layer.status != "skipped" for layer in layers)
    if shifted:
        made_up = ", on random inputs only: there was no calibration data" if synthetic else ""
        rest = [layer for layer in layers if layer.status == "rejected"]
        kept = f" {_kept(rest)}." if rest else ""
        return f"{shifted} of {candidates} layers shifted; {_proved(proof)}{covered}{made_up}.{kept}"
    end = "The model was written unchanged." if written else "No model was written."
    if not layers:
        return f"Nothing to do: the model has no linear layer with a constant weight. {end}"
    if not candidates:
        return f"Nothing to do: {_skips(layers)}. {end}"
    return f"Nothing to gain: {_kept(layers)}. {end}"


def _kept(layers: Sequence[LayerReport]) -> str:
    """Layers that kept their weight, counted by cause."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for layer in layers:
        if layer.status == "skipped" and layer.rows is None:
            continue
        words = next((words for start, words in _KEPT if layer.reason.startswith(start)), "{} left alone")
        counts[words] += 1
        if words.endswith("held-out data"):
            examples.setdefault(words, layer.reason.partition(": ")[2])
    return "; ".join(
        words.format(_number(count)) + (f" ({examples[words]})" if words in examples else "")
        for words, count in counts.most_common()
    )


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
