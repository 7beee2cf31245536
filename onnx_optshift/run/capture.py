"""From prepared data to layers with statistics: of all calibration samples, and of those that settings are tried on."""

from __future__ import annotations

from collections.abc import Callable

from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.statistics import StatisticsStore
from onnx_optshift.run.feature_curvature import feature_curvature
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import Data, Prepared
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import Norm, Objective, make_grids, make_objective

# Rows that are enough to compare a few starts of one layer by, and samples that are taken for them.
JUDGING_ROWS, JUDGING_SAMPLES = 4096, (64, 256)


def objective_of(prepared: Prepared) -> Objective:
    """What the settings ask to make small."""
    settings = prepared.settings
    return make_objective(settings.objective, settings.quantization_bits, *_shape_of_grid(settings))


def _shape_of_grid(settings: Settings) -> tuple[str, int | None, str]:
    return settings.range_scope, settings.range_block, settings.range_levels


def layers_maker(prepared: Prepared, data: Data, objective: Objective | None = None) -> Callable[..., Layers]:
    """Makes layers of a store of statistics; whatever that covers, slopes are measured on the samples that fit."""
    settings, bench = prepared.settings, prepared.bench
    objective = objective or Norm()
    slopes = feature_curvature(bench, data.fit, seed=settings.seed) if objective.needs_slopes else None
    grids = make_grids(settings.quantization_bits, *_shape_of_grid(settings))

    def make(store: StatisticsStore, judge: StatisticsStore | None = None) -> Layers:
        return Layers(
            bench.weights,
            store,
            bench.model.initializer,
            objective,
            device=bench.device.solve,
            slopes=slopes,
            judge=judge,
            grids=grids,
            keep=bench.sessions.keep,
            progress=bench.progress,
        )

    return make


def captured(prepared: Prepared, data: Data, objective: Objective) -> tuple[Layers, Layers]:
    """Layers of all calibration data, and of the part that fits (the same where nothing was split off).

    Statistics of one wave are captured here; those of several are when they are loaded, as they never fit together.
    """
    bench, make = prepared.bench, layers_maker(prepared, data, objective)
    # Captured when a layer first asks for it, unless its rows are part of the calibration data.
    judges = data.heldout if data.split or data.heldout is None else _enough(prepared, data.heldout)
    held = None if judges is None else bench.statistics(judges, "capture held-out rows")
    judge = held if objective.grids else None  # or nobody asks, and they would only take room
    if not data.split or held is None:
        store = bench.statistics(data.calibration)
        if len(store.waves) == 1:
            store.load(0)
        layers = make(store, judge)
        return layers, layers
    fit = bench.statistics(data.fit)
    layers = make(bench.statistics(data.calibration) if len(fit.waves) > 1 else fit.merged(held))
    layers.part = make(fit, judge)
    return layers, layers.part


def _enough(prepared: Prepared, heldout: Samples) -> Samples:
    """Of held-out samples as many, evenly spaced, as bring every layer rows enough to choose by."""
    fewest = min(prepared.bench.rows.values(), default=1)
    least, most = JUDGING_SAMPLES
    return heldout.spread(min(most, max(least, -(-JUDGING_ROWS // max(1, fewest)))))
