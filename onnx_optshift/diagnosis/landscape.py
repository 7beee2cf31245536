"""The mean loss as a function of the weights: evaluated through one session, differenced along directions.

Second difference along z: `D = (L(w + hz) - 2 L(w) + L(w - hz)) / h²  =  zᵀHz + h²/12 D⁴L[z] + ...`. A computed loss
carries an error of size ε, so that D is off by up to `4ε/h² + h²/12 |D⁴L|`. The sum is least at `h⁴ = 48 ε / |D⁴L|`.
The fourth derivative is not known; what can be measured is ε and D itself. So h is taken from them, as in Gill, Murray,
Saunders and Wright, "Computing forward-difference intervals for numerical optimization" (SIAM J. Sci. Stat. Comput. 4,
1983): the share `4ε / (h² |D|)` of D that may be rounding must lie between 0.001 and 0.1. For float32 this gives steps
of about a hundredth of a weight's root mean square, where truncation is no more than rounding (measured).

Runs go through a copy of the model whose kinks decide as at the centre (`graph.smooth_piece`): there is no Taylor
series across them. So the figures are those of automatic differentiation; noise that crosses kinks is `rises`'.

ε is measured by a table of differences (Hamming 1962; Moré and Wild, "Estimating computational noise", SIAM J. Sci.
Comput. 33, 2011): over points so close that any smooth function is a low-degree polynomial, the fourth differences
hold nothing but noise, of variance `8!/(4!)² ε² = 70 ε²`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.session import Session
from onnx_optshift.capture.stream import real_outputs
from onnx_optshift.decide.gate import judged_rows
from onnx_optshift.decide.loss import Loss
from onnx_optshift.diagnosis.gauss_newton import output_root
from onnx_optshift.graph.smooth_piece import CENTER, smooth_piece_model
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import Arrays
from onnx_optshift.run.feature_curvature import FEWEST_UNITS, FIRST_STEP
from onnx_optshift.run.outputs import Values
from onnx_optshift.solve.problem import ROUNDING_UNIT

Matrix = NDArray[np.float64]
Directions = Mapping[str, Matrix]
"""z by initializer, `[g, d, m]` each; weights that are missing stay."""

# Near the lower end of the interval that Gill et al. accept: L(w) is computed once, so that its error is the same for
# every probe and does not average out.
ROUNDING_SHARE = 0.002
# Largest step, relative to the root mean square of a weight, that may still be called local.
LARGEST_STEP = 0.1
_PILOTS = 3
_TABLE_POINTS, _TABLE_ORDER = 9, 4
_TABLE_VARIANCE = math.factorial(2 * _TABLE_ORDER) / math.factorial(_TABLE_ORDER) ** 2


class Differences(NamedTuple):
    """What two runs, at w + hz and w - hz, tell."""

    second: float  # zᵀHz, up to truncation and rounding
    root: NDArray[np.float32]  # `B Jz` over all samples `[n k]`, JᵀBᵀBJ/n the Gauss-Newton matrix; empty unless asked


def smooth_session(bench: Bench) -> Session:
    """A session whose weights can be fed and whose kinks decide as at the centre."""
    return bench.sessions.open(smooth_piece_model(bench.model, [weight.name for weight in bench.weights]))


class Landscape:
    """The mean loss around one set of weights, along seeded directions that are the same around every other set.

    The coordinates are the weights of the bench; `arrays` is the centre where it differs from the original. One
    `smooth_session` serves every centre.

    Attributes:
        value: Mean loss at the centre.
        count: Samples.
        matrices: The centre, V `[g, d, m]` by initializer.
    """

    def __init__(
        self, bench: Bench, session: Session, samples: Samples, loss: Loss, arrays: Arrays, seed: int = 0
    ) -> None:
        self._bench = bench
        self._session = session
        self._samples = samples
        self._loss = loss
        self._seed = seed
        self._weights = {weight.name: weight for weight in bench.weights}
        # All weights are fed in every run, so that the runtime folds and fuses the same way in each.
        self._center = {name: arrays.get(name, bench.model.initializer(name)) for name in self._weights}
        self._anchor = {name + CENTER: array for name, array in self._center.items()}
        self.matrices: dict[str, Matrix] = {
            name: np.ascontiguousarray(weight.form.to_matrix(self._center[name]), dtype=np.float64)
            for name, weight in self._weights.items()
        }
        self._outputs: list[Values] = []
        self.count, total = 0, 0.0
        for batch, reference, (outputs,) in self._runs(self._center):
            total += self._losses(batch, reference, outputs)
            self.count += judged_rows(batch)
            names = [loss.output] if loss.output is not None else list(outputs)
            self._outputs.append({n: outputs[n] for n in names if np.issubdtype(outputs[n].dtype, np.floating)})
        self.value = total / self.count

    def signs(self, name: str, probe: int) -> Matrix:
        """Independent ±1 `[g, d, m]`: a direction in one weight."""
        return self._generator(0, name, probe).integers(0, 2, self.matrices[name].shape) * np.float64(2) - 1

    def filters(self, probe: int) -> Directions:
        """Normal noise in all weights, each column scaled to the norm of the weight's own."""
        found = {}
        for name, matrix in self.matrices.items():
            z = self._generator(1, name, probe).standard_normal(matrix.shape)
            sizes, norms = (np.linalg.norm(array, axis=1, keepdims=True) for array in (matrix, z))
            found[name] = z * (sizes / np.maximum(norms, 1e-300))
        return found

    def moved(self, directions: Directions, step: float) -> Arrays:
        """All weights at `w + step z`, in their own dtype and shape."""
        arrays = dict(self._center)
        for name, direction in directions.items():
            moved = self._weights[name].form.from_matrix(self.matrices[name] + step * direction)
            arrays[name] = moved.astype(self._center[name].dtype)
        return arrays

    def at(self, directions: Directions, step: float) -> float:
        """Mean loss at `w + step z`."""
        runs = self._runs(self.moved(directions, step))
        return sum(self._losses(batch, reference, outputs) for batch, reference, (outputs,) in runs) / self.count

    def rises(self, probe: int, sigmas: Sequence[float]) -> list[float]:
        """Rise of the mean loss of the model itself, kinks and all, under `filters` times σ, mean over both signs."""
        z = self.filters(probe)
        trials = [self._center, *(self.moved(z, sign * sigma) for sigma in sigmas for sign in (1, -1))]
        sums = np.zeros(len(trials))
        for batch, reference in self._bench.outputs.reference(self._samples):
            sums += [self._losses(batch, reference, self._bench.outputs.run(batch, arrays)) for arrays in trials]
        return [float(pair.mean() - sums[0]) / self.count for pair in sums[1:].reshape(-1, 2)]

    def differences(self, directions: Directions, step: float, *, root: bool = False) -> Differences:
        """Central differences along z with the step h; of the outputs too where their root is asked for."""
        total, pieces = 0.0, [np.empty(0)]
        sides = self._runs(self.moved(directions, step), self.moved(directions, -step))
        for (batch, reference, (above, below)), center in zip(sides, self._outputs, strict=True):
            total += self._losses(batch, reference, above) + self._losses(batch, reference, below)
            if root:
                slopes = {name: (above[name].astype(np.float64) - below[name]) / (2 * step) for name in center}
                pieces.append(
                    output_root(self._loss, center, reference, slopes, judged_rows(batch), batch.labels).ravel()
                )
        second = (total / self.count - 2 * self.value) / step**2
        return Differences(second, np.concatenate(pieces).astype(np.float32))

    def noise(self) -> float:
        """ε: standard deviation of the computed mean loss around a smooth function of all weights."""
        unit = max(ROUNDING_UNIT[weight.dtype] for weight in self._weights.values())
        z = {name: self.signs(name, 0) * self._scale(name) for name in self.matrices}
        losses = [self.at(z, 2 * FEWEST_UNITS * unit * k) for k in range(_TABLE_POINTS)]
        measured = math.sqrt(float(np.square(np.diff(losses, _TABLE_ORDER)).mean()) / _TABLE_VARIANCE)
        # A loss of exactly 0, as the distance to itself has, shows no noise at its minimum.
        return max(measured, float(np.finfo(np.float64).eps) * abs(self.value), float(np.finfo(np.float32).tiny))

    def step(self, name: str, noise: float) -> float:
        """The step h for second differences in one weight, from ε and the curvature along a few directions of ±1."""
        scale = self._scale(name)
        least = FEWEST_UNITS * ROUNDING_UNIT[self._weights[name].dtype] * scale
        step = max(FIRST_STEP * scale, least)
        for _ in range(4):
            found = [abs(self.differences({name: self.signs(name, k)}, step).second) for k in range(_PILOTS)]
            curvature = float(np.median(found))
            wanted = math.sqrt(4 * noise / (ROUNDING_SHARE * curvature)) if curvature > 0 else math.inf
            before, step = step, min(max(wanted, least), LARGEST_STEP * scale)
            if 0.5 < step / before < 2:
                break
        return step

    def _scale(self, name: str) -> float:
        """Root mean square of a weight; 1 for one that is all zeros."""
        matrix = self.matrices[name]
        return math.sqrt(float(np.square(matrix).mean())) or 1.0 if matrix.size else 1.0

    def output_size(self) -> int:
        """Length of the `root` of one direction."""
        return sum(value.size for outputs in self._outputs for value in outputs.values())

    def _generator(self, kind: int, name: str, probe: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, kind, list(self.matrices).index(name), probe])

    def _runs(self, *sets: Arrays) -> Iterator[tuple[Batch, Values, list[Values]]]:
        """Each batch with the original's outputs, and those of every set of all weights on the smooth piece."""
        for batch, reference in self._bench.outputs.reference(self._samples):
            feeds = {**batch.feeds, **self._anchor}
            yield batch, reference, [real_outputs(self._session.run({**feeds, **s}), batch) for s in sets]

    def _losses(self, batch: Batch, reference: Values, outputs: Values) -> float:
        """Sum of the losses of a batch."""
        return float(self._loss.per_sample(outputs, reference, batch.labels, judged_rows(batch))[0].sum())
