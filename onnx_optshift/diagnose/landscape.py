"""The mean loss as a function of the weights: evaluated through one session, differenced along directions.

Second difference along z: `D = (L(w + hz) - 2 L(w) + L(w - hz)) / h²  =  zᵀHz + h²/12 D⁴L[z] + ...`. A computed loss
carries an error of size ε, so that D is off by up to `4ε/h² + h²/12 |D⁴L|`. The sum is least at `h⁴ = 48 ε / |D⁴L|`.
The fourth derivative is not known; what can be measured is ε and D itself. So h is taken from them, as in Gill, Murray,
Saunders and Wright, "Computing forward-difference intervals for numerical optimization" (SIAM J. Sci. Stat. Comput. 4,
1983): the share `4ε / (h² |D|)` of D that may be rounding must lie between 0.001 and 0.1. For float32 this gives steps
of about a hundredth of a weight's root mean square, where truncation is no more than rounding (measured).

Runs go through a copy of the model whose kinks decide as at the centre (`graph.smooth_piece`): there is no Taylor
series across them. So the figures are those of automatic differentiation; noise that crosses kinks is `rise`'s.

ε is measured by a table of differences (Hamming 1962; Moré and Wild, "Estimating computational noise", SIAM J. Sci.
Comput. 33, 2011): over points so close that any smooth function is a low-degree polynomial, the fourth differences
hold nothing but noise, of variance `8!/(4!)² ε² = 70 ε²`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.session import Session
from onnx_optshift.capture.stream import real_outputs
from onnx_optshift.decide.loss import Loss, choose_loss
from onnx_optshift.diagnose.gauss_newton import output_root
from onnx_optshift.graph.smooth_piece import CENTER, smooth_piece_model
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.feature_curvature import FEWEST_UNITS, FIRST_STEP
from onnx_optshift.run.layers import Arrays
from onnx_optshift.run.outputs import Values
from onnx_optshift.solve.problem import ROUNDING_UNIT

Matrix = NDArray[np.float64]
Directions = Mapping[str, Matrix]

# Near the lower end of the interval that Gill et al. accept: L(w) is computed once, so that its error is the same for
# every probe and does not average out.
ROUNDING_SHARE = 0.002
# Largest step, relative to the root mean square of a weight, that may still be called local.
LARGEST_STEP = 0.1
PILOTS = 3
_TABLE_POINTS, _TABLE_ORDER = 9, 4
_TABLE_VARIANCE = math.factorial(2 * _TABLE_ORDER) / math.factorial(_TABLE_ORDER) ** 2


@dataclass(frozen=True)
class Differences:
    """What two runs, at w + hz and w - hz, tell.

    Attributes:
        second: zᵀHz, up to truncation and rounding.
        root: `B Jz` over all samples, `[n k]`, float32, where JᵀBᵀBJ/n is the Gauss-Newton matrix; None unless asked.
    """

    second: float
    root: NDArray[np.float32] | None


def loss_of(bench: Bench, samples: Samples) -> Loss:
    """The loss that fits the model's outputs and the labels of these samples.

    Raises:
        InputError: The labels fit no output of the model.
    """
    batch, outputs = next(iter(bench.outputs.reference(samples)))
    return choose_loss(outputs, batch.labels if samples.labels is None else samples.labels, _rows(batch))


def rise(bench: Bench, samples: Samples, loss: Loss, arrays: Arrays, noises: Sequence[Arrays]) -> list[float]:
    """How much the mean loss of the model itself rises when weights are replaced, for several replacements.

    Args:
        bench: Runs the model, kinks and all.
        samples: What the mean is over.
        loss: The loss.
        arrays: All weights at the centre.
        noises: All weights, with noise.
    """
    sums = np.zeros(1 + len(noises))
    count = 0
    for batch, reference in bench.outputs.reference(samples):
        for k, weights in enumerate([arrays, *noises]):
            outputs = bench.outputs.run(batch, weights)
            sums[k] += loss.per_sample(outputs, reference, batch.labels, _rows(batch))[0].sum()
        count += _rows(batch)
    return [float(total - sums[0]) / count for total in sums[1:]]


def smooth_session(bench: Bench) -> Session:
    """A session whose weights can be fed and whose kinks decide as at the centre."""
    return bench.sessions.open(smooth_piece_model(bench.model, [weight.name for weight in bench.weights]))


class Landscape:
    """The mean loss around one set of weights.

    Args:
        bench: Runs the model; its weights are the coordinates.
        session: The model that stays on one smooth piece; one session serves every centre.
        samples: What the mean is over.
        loss: The loss.
        arrays: The centre where it differs from the original weights.

    Attributes:
        value: Mean loss at the centre.
        count: Samples.
        matrices: The centre, V `[g, d, m]` by initializer.
    """

    def __init__(self, bench: Bench, session: Session, samples: Samples, loss: Loss, arrays: Arrays) -> None:
        self._bench = bench
        self._session = session
        self._samples = samples
        self._loss = loss
        # All weights are fed in every run, so that the runtime folds and fuses the same way in each.
        self._center = {w.name: arrays.get(w.name, bench.model.initializer(w.name)) for w in bench.weights}
        self._anchor = {name + CENTER: array for name, array in self._center.items()}
        self._weights = {w.name: w for w in bench.weights}
        self.matrices: dict[str, Matrix] = {
            w.name: np.ascontiguousarray(w.form.to_matrix(self._center[w.name]), dtype=np.float64)
            for w in bench.weights
        }
        self._outputs: list[Values] = []
        self.count = 0
        self.value = self._start()

    def at(self, directions: Directions, step: float) -> float:
        """Mean loss at `w + step z`, z given for the weights that move, `[g, d, m]` each."""
        moved = self.moved(directions, step)
        total = 0.0
        for batch, reference in self._bench.outputs.reference(self._samples):
            total += float(self._losses(batch, self._run(batch, moved), reference).sum())
        return total / self.count

    def differences(self, directions: Directions, step: float, *, root: bool = False) -> Differences:
        """Central differences along z.

        Args:
            directions: z by initializer, `[g, d, m]`; weights that are missing stay.
            step: h.
            root: Whether to keep the first difference of the outputs too.
        """
        up, down = self.moved(directions, step), self.moved(directions, -step)
        total, pieces = 0.0, []
        for (batch, reference), center in zip(self._bench.outputs.reference(self._samples), self._outputs, strict=True):
            above, below = self._run(batch, up), self._run(batch, down)
            losses = self._losses(batch, above, reference) + self._losses(batch, below, reference)
            total += float(losses.sum())
            if root:
                slopes = {name: (above[name].astype(np.float64) - below[name]) / (2 * step) for name in center}
                pieces.append(output_root(self._loss, center, reference, slopes, _rows(batch), batch.labels))
        kept = np.concatenate([piece.ravel() for piece in pieces]).astype(np.float32) if root else None
        return Differences((total / self.count - 2 * self.value) / step**2, kept)

    def noise(self, directions: Directions) -> float:
        """ε: standard deviation of the computed mean loss around a smooth function.

        Args:
            directions: z by initializer, each of about the size of its weight.
        """
        unit = max(ROUNDING_UNIT[weight.dtype] for weight in self._weights.values())
        spacing = 2 * FEWEST_UNITS * unit
        values = [self.at(directions, k * spacing) for k in range(_TABLE_POINTS)]
        table = np.diff(values, _TABLE_ORDER)
        measured = math.sqrt(float(np.square(table).mean()) / _TABLE_VARIANCE)
        # A loss of exactly 0, as the distance to itself has, shows no noise at its minimum.
        return max(measured, float(np.finfo(np.float64).eps) * abs(self.value), float(np.finfo(np.float32).tiny))

    def step(self, name: str, directions: Sequence[Matrix], noise: float) -> float:
        """The step h for second differences in one weight, from noise and curvature along a few directions of ±1.

        Args:
            name: The initializer.
            directions: z `[g, d, m]` each.
            noise: ε.
        """
        scale = self.scale(name)
        least = FEWEST_UNITS * ROUNDING_UNIT[self._weights[name].dtype] * scale
        step = max(FIRST_STEP * scale, least)
        for _ in range(4):
            found = [abs(self.differences({name: z}, step).second) for z in directions[:PILOTS]]
            curvature = float(np.median(found))
            wanted = math.sqrt(4 * noise / (ROUNDING_SHARE * curvature)) if curvature > 0 else math.inf
            wanted = min(max(wanted, least), LARGEST_STEP * scale)
            settled = 0.5 < wanted / step < 2
            step = wanted
            if settled:
                break
        return step

    def scale(self, name: str) -> float:
        """Root mean square of a weight; 1 for one that is all zeros."""
        matrix = self.matrices[name]
        return math.sqrt(float(np.square(matrix).mean())) or 1.0 if matrix.size else 1.0

    def output_size(self) -> int:
        """Length of the `root` of one direction."""
        return sum(value.size for outputs in self._outputs for value in outputs.values())

    def _start(self) -> float:
        total = 0.0
        for batch, reference in self._bench.outputs.reference(self._samples):
            outputs = self._run(batch, self._center)
            losses = self._losses(batch, outputs, reference)
            total += float(losses.sum())
            self.count += len(losses)
            names = [self._loss.output] if self._loss.output is not None else list(outputs)
            self._outputs.append({n: outputs[n] for n in names if np.issubdtype(outputs[n].dtype, np.floating)})
        return total / self.count

    def moved(self, directions: Directions, step: float) -> Arrays:
        """All weights at `w + step z`, in their own dtype and shape."""
        arrays = dict(self._center)
        for name, direction in directions.items():
            form, before = self._weights[name].form, self._center[name]
            arrays[name] = form.from_matrix(self.matrices[name] + step * direction).astype(before.dtype)
        return arrays

    def _run(self, batch: Batch, arrays: Arrays) -> Values:
        return real_outputs(self._session.run({**batch.feeds, **self._anchor, **arrays}), batch)

    def _losses(self, batch: Batch, outputs: Values, reference: Values) -> NDArray[np.float64]:
        return self._loss.per_sample(outputs, reference, batch.labels, _rows(batch))[0]


def _rows(batch: Batch) -> int:
    """Rows of outputs that have a loss of their own: a single feed may bring one label for each of its rows."""
    return len(batch.indices) if batch.labels is None else len(batch.labels)
