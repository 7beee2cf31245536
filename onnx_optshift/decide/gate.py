"""The gate: a shift is kept only if data that it has not seen is served no worse.

With labels the original and the shifted model are compared sample by sample: the mean of the paired differences of
the loss may exceed zero by at most one standard error, and top-1 accuracy may fall by at most two of its own. A paired
difference removes the spread between samples, so a real harm shows on few samples; one standard error keeps noise from
deciding (the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, on differences).
Below `FEW_SAMPLES` a standard error says little, and no increase beyond rounding is let through.

Where the weights are going to be quantized, what counts is the quantized model: every weight of both models is rounded
to nearest, and at no bit width may the outputs' mean distance to the original's float outputs grow; so that the
deviation of the shift and the quantization error both count. The float loss is then reported only, as nobody will run
that model.

Without labels only the distance to the original outputs is known; it may reach `UNLABELLED_DISTANCE`, or twice the
tolerance that was granted on the calibration data if that is more.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.decide.loss import DISTANCE, Loss, choose_loss
from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.report.model import QuantizedScore, Score, Trial
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import Arrays
from onnx_optshift.run.outputs import Outputs
from onnx_optshift.solve.rounding_error import allowed_error

FEW_SAMPLES = 30
# Top-1 moves in steps of whole samples: one flipped answer alone is one standard error. Two are the usual 95 per cent.
TOP1_ERRORS = 2.0
# Relative increase of the mean loss that counts as none: rounding in the outputs moves a loss by less.
NO_INCREASE = 1e-4
# One per cent: what users of converted models accept as "the same outputs" on data nobody promised anything about.
UNLABELLED_DISTANCE = 0.01


@dataclass(frozen=True)
class Judged:
    """One model on the held-out data, sample by sample `[n]`."""

    losses: NDArray[np.float64]
    right: NDArray[np.float64] | None  # share that is right; None unless classification
    # By grid, squared relative distance of the outputs to the original's once all weights are rounded to it.
    quantized: Mapping[Grid, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def errors(self) -> dict[Grid, float]:
        """Relative error of the quantized outputs over all samples, by grid."""
        return {grid: math.sqrt(float(squares.mean())) for grid, squares in self.quantized.items()}

    @property
    def score(self) -> Score:
        """Mean loss and top-1 accuracy."""
        top1 = None if self.right is None else float(self.right.mean())
        return Score(loss=float(self.losses.mean()), top1=top1, n=len(self.losses))


# Trial weights -> (grid, the weights of the whole model rounded to it).
Rounded = Callable[[Arrays], Iterator[tuple[Grid, Arrays]]]


def rounded_by(bench: Bench, grids: Sequence[Grid]) -> Rounded:
    """All weights rounded to nearest on each grid: the trial's where it has some, the original's elsewhere."""

    def variants(arrays: Arrays) -> Iterator[tuple[Grid, Arrays]]:
        for grid in grids:
            found = {}
            for weight in bench.weights:
                content = arrays.get(weight.name, bench.model.initializer(weight.name))
                found[weight.name] = bench.sessions.keep(round_initializer(content, weight.form, grid))
            yield grid, found

    return variants


class Gate:
    """Judges trial weights on held-out data.

    Args:
        outputs: Runs the models.
        samples: Held-out data.
        tolerance: Relative deviation granted on the calibration data; widens the distance allowed without labels.
        rounded: Trial weights as a quantizer would round them, by grid; None when they stay as they are.

    Attributes:
        seconds: That models ran for verdicts so far.
    """

    def __init__(self, outputs: Outputs, samples: Samples, tolerance: float, rounded: Rounded | None = None) -> None:
        self._outputs = outputs
        self._samples = samples
        self._rounded = rounded
        # By the content of the trial weights.
        self._known: dict[str, tuple[Trial, Judged]] = {}
        self.loss = loss_of(outputs, samples)
        self._granted = 2 * tolerance
        self.seconds = 0.0
        self._allowed_distance = max(UNLABELLED_DISTANCE, self._granted)
        self.before = self.run({})

    @property
    def rounds(self) -> bool:
        """Whether it is the quantized model that is judged."""
        return self._rounded is not None

    @property
    def tried(self) -> list[Trial]:
        """Everything that was judged, in order."""
        return [trial for trial, _ in self._known.values()]

    def run(self, arrays: Arrays) -> Judged:
        """Losses of the model with these weights; of the original when there are none."""
        start = time.perf_counter()
        losses, right = self._run(arrays, self.loss)
        variants = self._rounded(arrays) if self._rounded else ()
        judged = Judged(losses, right, {grid: self._run(rounded, DISTANCE)[0] for grid, rounded in variants})
        self.seconds += time.perf_counter() - start
        return judged

    def _run(self, arrays: Arrays, loss: Loss) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        mine = [
            loss.per_sample(outputs, reference, batch.labels, judged_rows(batch))
            for batch, outputs, reference in self._outputs.trial(self._outputs.share(self._samples), arrays)
        ]
        found = [one for part in self._outputs.world.gather(mine) for one in part]
        right = [part for _, part in found if part is not None]
        return np.concatenate([losses for losses, _ in found]), np.concatenate(right) if right else None

    def deciding(self, judged: Judged) -> NDArray[np.float64]:
        """What candidates are ranked by, per sample `[n]`: the loss, or the quantized error over the original's."""
        if not judged.quantized:
            return judged.losses
        shares = [errors / self.before.quantized[grid].mean() for grid, errors in judged.quantized.items()]
        return np.asarray(np.mean(shares, axis=0))

    def judge(self, arrays: Arrays, what: str, tolerance: float) -> tuple[Trial, Judged]:
        """Compares trial weights with the original; `what` and the layers' residual `tolerance` are for the report.

        A verdict belongs to the content of the weights: the same again, by whatever name, is not run a second time.
        """
        content = _digest(arrays)
        if content not in self._known:
            self._known[content] = self._outputs.world.broadcast(self._judge(arrays, what, tolerance))
        return self._known[content]

    def _judge(self, arrays: Arrays, what: str, tolerance: float) -> tuple[Trial, Judged]:
        after = self.run(arrays)
        mean, error = paired(after.losses, self.before.losses)
        reason = self._objection(after, mean, error)
        score = after.score
        trial = Trial(
            what=what,
            tolerance=tolerance,
            loss=score.loss,
            top1=score.top1,
            mean_difference=mean,
            standard_error=error,
            accepted=not reason,
            reason=reason or self._approval(),
            quantized=tuple(
                QuantizedScore(grid.bits, self.before.errors[grid], error) for grid, error in after.errors.items()
            ),
        )
        return trial, after

    def _approval(self) -> str:
        if self.rounds:
            return "the quantized outputs on held-out data are no farther from the original's"
        if self.loss.is_distance:
            return "held-out outputs stay close to the original's"
        return "held-out loss is no higher"

    def _objection(self, after: Judged, mean: float, error: float) -> str:
        """Which rule a candidate breaks, with both sides of it; empty for none."""
        fewest = min((grid.bits for grid in after.quantized), default=0)
        for grid, grown in after.errors.items():
            before = self.before.errors[grid]
            if not grown <= allowed_error(before, self._granted, grid, fewest) * (1 + NO_INCREASE):
                return f"at {grid.bits} bits the quantized outputs' error grows from {before:.3g} to {grown:.3g}"
        if after.quantized:
            return ""
        if self.loss.is_distance:
            distance = math.sqrt(max(float(after.losses.mean()), 0.0))
            if distance <= self._allowed_distance:
                return ""
            return f"held-out outputs move by {distance:.2g}; without labels {self._allowed_distance:.2g} is allowed"
        few = f"fewer than {FEW_SAMPLES} samples" if len(after.losses) < FEW_SAMPLES else ""
        slack = NO_INCREASE * abs(float(self.before.losses.mean()))
        allowed = slack if few else max(slack, error)
        if not mean <= allowed:
            rule = few or f"one standard error, {error:.3g}"
            return f"held-out loss rises by {mean:.3g}, more than the {allowed:.3g} that is allowed ({rule})"
        if after.right is not None and self.before.right is not None:
            drop, drop_error = paired(self.before.right, after.right)
            points = 0.0 if few else TOP1_ERRORS * drop_error
            if drop > points:
                rule = few or f"{TOP1_ERRORS:g} standard errors"
                return f"held-out top-1 falls by {100 * drop:.2f} points, more than {100 * points:.2f} ({rule})"
        return ""


def _digest(arrays: Arrays) -> str:
    """Of names and content."""
    found = hashlib.blake2b()
    for name, array in sorted(arrays.items()):
        found.update(f"{name!r} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def loss_of(outputs: Outputs, samples: Samples) -> Loss:
    """The loss that fits the original's outputs and the labels of these samples.

    Raises:
        InputError: The labels fit no output of the model.
    """

    def chosen() -> Loss:
        batch, values = next(iter(outputs.reference(outputs.share(samples))))
        labels = batch.labels if samples.labels is None else samples.labels
        return choose_loss(values, labels, judged_rows(batch), samples.source)

    return outputs.world.once(chosen)  # by the first process, whose share is never empty


def judged_rows(batch: Batch) -> int:
    """Rows of outputs that are judged one by one: a single feed may bring one label for each of its rows."""
    return len(batch.indices) if batch.labels is None else len(batch.labels)


def paired(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of a - b over samples and its standard error, both `[n]`; the error of one sample is infinite."""
    # A loss is infinite where the original gives zeros only and the other does not: the error is then NaN.
    with np.errstate(invalid="ignore"):
        difference = a - b
        if len(difference) < 2:
            return float(difference.mean()), math.inf
        return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))
