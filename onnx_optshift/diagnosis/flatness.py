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

import itertools
import math
import time

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_optshift.calibration.source import Samples
from onnx_optshift.calibration.split import thinned
from onnx_optshift.decide.gate import loss_of
from onnx_optshift.decide.loss import Loss
from onnx_optshift.diagnosis.gauss_newton import top_eigenvalue
from onnx_optshift.diagnosis.landscape import Landscape, smooth_session
from onnx_optshift.report.diagnosis import Estimate, Flatness, FlatnessReport, LayerFlatness, Sharpness
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.candidate import Arrays
from onnx_optshift.settings import Settings

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.4)
# Relative flatness and sharpness are judged by eye, not by their third digit: they get fewer probes.
FEWER, FEWEST = 4, 4
# First differences of the outputs are kept up to this size; probes beyond it do not enter the largest eigenvalue.
KEPT_COLUMN_BYTES = 256 * 2**20
FEWEST_PROBES_FOR_EIGENVALUE = 8
# Curvature is a mean over samples, and the probes' own spread is larger than that of this many samples.
MOST_FLATNESS_SAMPLES = 512
DEFAULT_PROBES = 32


def flatness(
    bench: Bench,
    samples: Samples,
    loss: Loss,
    arrays_before: Arrays,
    arrays_after: Arrays | None = None,
    *,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
) -> FlatnessReport:
    """Measures flatness at one or two sets of weights, each given by what differs from the original.

    All weights of the bench are probed, in so many random directions each; the standard errors fall with their root.
    """
    start = time.perf_counter()
    session = smooth_session(bench)
    sets = [arrays_before] if arrays_after is None else [arrays_before, arrays_after]
    places = [Landscape(bench, session, samples, loss, arrays, seed) for arrays in sets]
    first, names = places[0], list(places[0].matrices)
    noise = first.noise()
    steps = {name: first.step(name, noise) for name in names}
    kept = min(probes, KEPT_COLUMN_BYTES // max(1, 4 * len(names) * first.output_size()))
    # First differences of the outputs: by place, probe and layer.
    columns: list[list[list[NDArray[np.float32]]]] = [[[] for _ in range(kept)] for _ in places]
    fewer = min(probes, max(FEWEST, probes // FEWER))
    # By layer, what both sets of weights show, `[places, probes]`.
    hessian, gauss_newton = ({name: np.zeros((len(places), probes)) for name in names} for _ in range(2))
    relative = {name: np.zeros((len(places), fewer)) for name in names}
    with bench.progress.stage("flatness", len(names) * len(places) * probes) as advance:
        for name, (k, place) in itertools.product(names, enumerate(places)):
            root = _root(place.matrices[name])
            for probe in range(probes):
                z = place.signs(name, probe)
                second, column = place.differences({name: z}, steps[name], root=True)
                hessian[name][k, probe] = second
                gauss_newton[name][k, probe] = np.square(column, dtype=np.float64).sum() / place.count
                if probe < kept:
                    columns[k][probe].append(column)
                if probe < fewer:
                    # The same length as ±1 has, so that the same step is right.
                    size = math.sqrt(float(np.square(z @ root).mean())) or 1.0
                    relative[name][k, probe] = place.differences({name: z @ root / size}, steps[name]).second * size**2
                advance(1)
    rises = np.array([[place.rises(probe, SIGMAS) for probe in range(fewer)] for place in places])
    tops = [
        top_eigenvalue(found, place.count) if kept >= FEWEST_PROBES_FOR_EIGENVALUE else None
        for found, place in zip(columns, places, strict=True)
    ]
    return FlatnessReport(
        loss=loss.name,
        samples=first.count,
        probes=probes,
        seed=seed,
        noise=noise,
        loss_before=first.value,
        loss_after=places[1].value if len(places) > 1 else None,
        trace=_compared(sum(hessian.values())),
        gauss_newton=_compared(sum(gauss_newton.values())),
        layers=tuple(
            LayerFlatness(
                name, first.matrices[name].size, steps[name], _compared(hessian[name]), _compared(relative[name])
            )
            for name in names
        ),
        sharpness=tuple(Sharpness(sigma, _compared(rises[..., k])) for k, sigma in enumerate(SIGMAS)),
        top_before=tops[0],
        top_after=tops[1] if len(tops) > 1 else None,
        seconds=time.perf_counter() - start,
    )


def flatness_of(
    bench: Bench, samples: Samples, settings: Settings, arrays: Arrays | None, probes: int | None = None
) -> FlatnessReport:
    """Flatness of the original, and of trial weights where there are any, on at most `MOST_FLATNESS_SAMPLES`.

    The settings give the seed, and the number of probes unless one is given.
    """
    few = thinned(samples, MOST_FLATNESS_SAMPLES, settings.seed)
    count = settings.flatness or DEFAULT_PROBES if probes is None else probes
    return flatness(bench, few, loss_of(bench.outputs, few), {}, arrays, probes=count, seed=settings.seed)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """K^½ `[g, m, m]` of K = VᵀV."""
    values, vectors = np.linalg.eigh(matrix.transpose(0, 2, 1) @ matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))[:, None]) @ vectors.transpose(0, 2, 1))


def _compared(found: ArrayLike) -> Flatness:
    """Figures `[places, probes]` before and, where there is a second place, after, with the change probe by probe."""
    before, *after = np.asarray(found, np.float64)
    if not after:
        return Flatness(_estimate(before))
    with np.errstate(invalid="ignore"):  # infinity less infinity is no number, and that is what to report
        return Flatness(_estimate(before), _estimate(after[0]), _estimate(after[0] - before))


def _estimate(values: NDArray[np.float64]) -> Estimate:
    # A sample whose original output is 0 is infinitely far, relatively, once it moves.
    certain = len(values) > 1 and bool(np.isfinite(values).all())
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)) if certain else None)
