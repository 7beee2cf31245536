"""How flat the loss is around the weights, before and after, from runs of the model alone.

- Trace: `tr H = E[zᵀHz]` for z with independent entries ±1 (Hutchinson 1990), each zᵀHz by a central difference of the
  mean loss (`landscape`). Layers are probed one at a time and their figures added: blocks between layers, which have
  mean 0 but not variance 0, stay out of it.
- Relative flatness of a layer (Petzka, Kamp, Adilova, Sminchisescu, Boley, "Relative Flatness and Generalization",
  NeurIPS 2021, definition 3): `κ = Σ_{s,t} ⟨w_s, w_t⟩ tr(H_st)` over its neurons s, t. With K = VᵀV this is
  `tr(H (K ⊗ I)) = E[uᵀHu]` for `u = z K^½`: probed like the trace, with other directions.
- Expected sharpness: `E[L(w + σz)] - L(w)`, z normal and scaled to each filter's norm (Li, Xu, Taylor, Studer and
  Goldstein, "Visualizing the Loss Landscape of Neural Nets", 2018), all layers at once; ±z in pairs, which takes the
  linear term out.
- Largest eigenvalue: see `gauss_newton`.

The same seeded directions, and the same steps, serve before and after. Trace, relative flatness and eigenvalue are of
the smooth piece that the weights lie on, as automatic differentiation has them; sharpness is of the model as it is,
and so the one that sees the edges which ReLUs make.

Cost: 2.5 runs over the samples for each probe, layer and set of weights, each of about twice the model's own time; 12
to 24 for each layer's step; 2.5 of the model itself for each probe and set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.calibration.split import thinned
from onnx_optshift.decide.loss import Loss
from onnx_optshift.diagnose.gauss_newton import top_eigenvalue
from onnx_optshift.diagnose.landscape import PILOTS, Landscape, Matrix, loss_of, rise, smooth_session
from onnx_optshift.report.diagnosis import Estimate, Flatness, FlatnessReport, LayerFlatness, Sharpness, TopEigenvalue
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.layers import Arrays
from onnx_optshift.settings import Settings

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.4)
# Relative flatness and sharpness are judged by eye, not by their third digit: they get fewer probes.
RELATIVE_SHARE, SHARPNESS_SHARE, FEWEST = 4, 4, 4
# First differences of the outputs are kept up to this size; probes beyond it do not enter the largest eigenvalue.
KEPT_COLUMN_BYTES = 256 * 2**20
FEWEST_PROBES_FOR_EIGENVALUE = 8
# Curvature is a mean over samples, and the probes' own spread is larger than that of this many samples.
MOST_FLATNESS_SAMPLES = 512
DEFAULT_PROBES = 32


@dataclass
class _Layer:
    """Findings in one layer, `[probes]` each, for the weights before and (where given) after."""

    step: float
    second: list[list[float]]
    first: list[list[float]]
    relative: list[list[float]]


def flatness(
    bench: Bench,
    samples: Samples,
    loss: Loss,
    arrays_before: Arrays,
    arrays_after: Arrays | None = None,
    *,
    probes: int = 32,
    seed: int = 0,
) -> FlatnessReport:
    """Measures flatness at one or two sets of weights.

    Args:
        bench: Runs the model; all its weights are probed.
        samples: What the mean loss is over.
        loss: `landscape.loss_of(bench, samples)`, or the gate's.
        arrays_before: Weights that differ from the original's; `{}` for the original.
        arrays_after: The same for the second set; None measures the first alone.
        probes: Random directions for each layer; the standard error falls with their root.
        seed: Of the directions.
    """
    start = time.perf_counter()
    sets = [arrays_before] if arrays_after is None else [arrays_before, arrays_after]
    session = smooth_session(bench)
    places = [Landscape(bench, session, samples, loss, arrays) for arrays in sets]
    names = [weight.name for weight in bench.weights]
    directions = Directions(names, places[0], seed)
    noise = places[0].noise({name: directions.signs(name, 0) * places[0].scale(name) for name in names})
    kept_probes = min(probes, KEPT_COLUMN_BYTES // max(1, 4 * len(names) * places[0].output_size()))
    columns: list[list[list[NDArray[np.float32]]]] = [[[] for _ in range(kept_probes)] for _ in places]
    layers: dict[str, _Layer] = {}
    fewer = max(FEWEST, probes // RELATIVE_SHARE)
    with bench.progress.stage("flatness", len(names) * len(places) * (probes + fewer)) as advance:
        for name in names:
            pilots = [directions.signs(name, k) for k in range(PILOTS)]
            layer = _Layer(places[0].step(name, pilots, noise), [], [], [])
            for place, kept in zip(places, columns, strict=True):
                second, first = _trace(place, name, layer.step, probes, directions, kept, advance)
                layer.second.append(second)
                layer.first.append(first)
                layer.relative.append(_relative(place, name, layer.step, fewer, directions, advance))
            layers[name] = layer
    draws = max(FEWEST, probes // SHARPNESS_SHARE)
    rises = [_sharpness(bench, samples, loss, place, draws, directions) for place in places]
    tops = [_top(kept, place.count) if names else None for kept, place in zip(columns, places, strict=True)]
    return FlatnessReport(
        loss=loss.name,
        samples=places[0].count,
        probes=probes,
        seed=seed,
        noise=noise,
        loss_before=places[0].value,
        loss_after=places[1].value if len(places) > 1 else None,
        trace=_summed([layer.second for layer in layers.values()]),
        gauss_newton=_summed([layer.first for layer in layers.values()]),
        layers=tuple(
            LayerFlatness(name, places[0].matrices[name].size, layer.step, _both(layer.second), _both(layer.relative))
            for name, layer in layers.items()
        ),
        sharpness=tuple(
            Sharpness(sigma, _both([rise[k] for rise in rises])) for k, sigma in enumerate(SIGMAS if names else ())
        ),
        top_before=tops[0],
        top_after=tops[1] if len(tops) > 1 else None,
        seconds=time.perf_counter() - start,
    )


def flatness_of(
    bench: Bench, samples: Samples, settings: Settings, arrays: Arrays | None, probes: int | None = None
) -> FlatnessReport:
    """Flatness of the original, and of trial weights where there are any, on some of the samples.

    Args:
        bench: Runs the model.
        samples: Thinned to `MOST_FLATNESS_SAMPLES`.
        settings: `flatness` probes, and the seed.
        arrays: Trial weights by initializer name.
        probes: Instead of the settings' number.
    """
    few = thinned(samples, MOST_FLATNESS_SAMPLES, settings.seed)
    count = settings.flatness or DEFAULT_PROBES if probes is None else probes
    return flatness(bench, few, loss_of(bench, few), {}, arrays, probes=count, seed=settings.seed)


class Directions:
    """Seeded directions: the same for the same layer and number, whatever else was drawn."""

    def __init__(self, names: Sequence[str], place: Landscape, seed: int) -> None:
        self._numbers = {name: k for k, name in enumerate(names)}
        self._shapes = {name: place.matrices[name].shape for name in names}
        self._seed = seed

    def signs(self, name: str, probe: int) -> Matrix:
        """Independent ±1 `[g, d, m]`."""
        return 2.0 * self._generator(name, probe, 0).integers(0, 2, self._shapes[name]).astype(np.float64) - 1.0

    def filters(self, name: str, probe: int, matrix: Matrix) -> Matrix:
        """Normal noise `[g, d, m]`, each column scaled to the norm of the matrix's own."""
        z = self._generator(name, probe, 1).standard_normal(self._shapes[name])
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        return np.asarray(z * np.linalg.norm(matrix, axis=1, keepdims=True) / np.maximum(norms, 1e-300))

    def _generator(self, name: str, probe: int, kind: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, kind, self._numbers[name], probe])


def _trace(
    place: Landscape,
    name: str,
    step: float,
    probes: int,
    directions: Directions,
    columns: list[list[NDArray[np.float32]]],
    advance: Callable[[int], None],
) -> tuple[list[float], list[float]]:
    """zᵀHz and zᵀGz for each probe; the first probes' columns are kept."""
    second, first = [], []
    for probe in range(probes):
        found = place.differences({name: directions.signs(name, probe)}, step, root=True)
        assert found.root is not None
        second.append(found.second)
        first.append(float(np.square(found.root, dtype=np.float64).sum()) / place.count)
        if probe < len(columns):
            columns[probe].append(found.root)
        advance(1)
    return second, first


def _relative(
    place: Landscape, name: str, step: float, probes: int, directions: Directions, advance: Callable[[int], None]
) -> list[float]:
    """uᵀHu for each probe, u = z K^½."""
    matrix = place.matrices[name]
    values, vectors = np.linalg.eigh(matrix.transpose(0, 2, 1) @ matrix)
    root = (vectors * np.sqrt(np.maximum(values, 0))[:, None]) @ vectors.transpose(0, 2, 1)
    found = []
    for probe in range(probes):
        u = directions.signs(name, probe) @ root
        # The same length as ±1 has, so that the same step is right.
        size = math.sqrt(float(np.square(u).mean()))
        found.append(place.differences({name: u / size}, step).second * size**2 if size else 0.0)
        advance(1)
    return found


def _sharpness(
    bench: Bench, samples: Samples, loss: Loss, place: Landscape, draws: int, directions: Directions
) -> list[list[float]]:
    """Rise of the loss for each σ and each pair of draws ±z."""
    rises: list[list[float]] = [[] for _ in SIGMAS]
    signed = [sign * sigma for sigma in SIGMAS for sign in (1, -1)]
    for draw in range(draws):
        z = {name: directions.filters(name, draw, matrix) for name, matrix in place.matrices.items()}
        noises = (place.moved(z, sigma) for sigma in signed)
        found = rise(bench, samples, loss, place.moved({}, 0.0), list(noises))
        for k, pairs in enumerate(rises):
            pairs.append((found[2 * k] + found[2 * k + 1]) / 2)
    return rises


def _top(columns: list[list[NDArray[np.float32]]], count: int) -> TopEigenvalue | None:
    return top_eigenvalue(columns, count) if len(columns) >= FEWEST_PROBES_FOR_EIGENVALUE else None


def _summed(layers: Sequence[Sequence[Sequence[float]]]) -> Flatness:
    """The total of all layers, probe by probe."""
    if not layers:
        return Flatness(Estimate(0.0, 0.0))
    return _both(np.sum(np.asarray(layers), axis=0).tolist())


def _both(found: Sequence[Sequence[float]]) -> Flatness:
    before = np.asarray(found[0])
    if len(found) == 1:
        return Flatness(_estimate(before))
    after = np.asarray(found[1])
    with np.errstate(invalid="ignore"):  # infinity less infinity is no number, and that is what to report
        change = after - before
    return Flatness(_estimate(before), _estimate(after), _estimate(change))


def _estimate(values: NDArray[np.float64]) -> Estimate:
    if len(values) < 2 or not np.isfinite(values).all():
        # A sample whose original output is 0 is infinitely far, relatively, once it moves.
        return Estimate(float(values.sum()) / len(values), None)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)))
