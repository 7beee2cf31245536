"""From prepared data to layers with statistics: of all calibration samples, and of those that settings are tried on."""

from __future__ import annotations

from collections.abc import Callable

from onnx_optshift.calibration.source import Samples
from onnx_optshift.capture.statistics import StatisticsStore
from onnx_optshift.run.feature_curvature import feature_curvature
from onnx_optshift.run.kept_layers import KeptLayers
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.ownership import Sharing
from onnx_optshift.run.prepare import Data, Prepared
from onnx_optshift.run.spanning import Spanning
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import Norm, Objective, make_grids, make_objective

# Rows that are enough to compare a few starts of one layer by, and samples that are taken for them.
JUDGING_ROWS, JUDGING_SAMPLES = 4096, (64, 256)
HELD_OUT = "capture held-out rows"


def objective_of(prepared: Prepared) -> Objective:
    """What the settings ask to make small."""
    settings = prepared.settings
    return make_objective(settings.objective, settings.quantization_bits, *_shape_of_grid(settings))


def _shape_of_grid(settings: Settings) -> tuple[str, int | None, str]:
    return settings.range_scope, settings.range_block, settings.range_levels


def layers_maker(
    prepared: Prepared, data: Data, objective: Objective | None = None, spanning: Spanning | None = None
) -> Callable[..., Layers]:
    """Makes layers of a store of statistics; whatever that covers, slopes are measured on the samples that fit."""
    settings, bench = prepared.settings, prepared.bench
    objective = objective or Norm()
    slopes = feature_curvature(bench, data.fit, seed=settings.seed) if objective.needs_slopes else None
    grids = make_grids(settings.quantization_bits, *_shape_of_grid(settings))

    def make(store: StatisticsStore, judge: StatisticsStore | None = None) -> Layers:
        return KeptLayers(
            bench.weights,
            store,
            bench.model.initializer,
            objective,
            device=bench.device.solve,
            slopes=slopes,
            judge=judge,
            grids=grids,
            sharing=Sharing(bench.world, bench.owners, bench.sessions.keep),
            spanning=spanning,
            progress=bench.progress,
            checkpoint=bench.checkpoint,
        )

    return make


def captured(
    prepared: Prepared, data: Data, objective: Objective, *, until_full_rank: bool = False
) -> tuple[Layers, Layers]:
    """Layers of all calibration data, and of the part that fits (the same where nothing was split off).

    Statistics of one wave are captured here; those of several are when they are loaded, as they never fit together.
    With `until_full_rank` rows are captured only while they leave a layer freedom, where an exact shift needs no more.
    """
    bench = prepared.bench
    spanning = None
    # Of several processes none sees all rows: they capture all that there are.
    if until_full_rank and _only_exact(prepared.settings) and not objective.grids and bench.world.size == 1:
        spanning = Spanning(bench.weights, bench.model.initializer, bench.device.solve)
    make = layers_maker(prepared, data, objective, spanning)
    # Captured when a layer first asks for it, unless its rows are part of the calibration data.
    judges = data.heldout if data.split or data.heldout is None else _enough(prepared, data.heldout)
    held = None if judges is None else bench.statistics(judges, HELD_OUT)
    judge = held if objective.grids else None  # or nobody asks, and they would only take room
    fit = bench.statistics(data.fit, spanning=spanning)
    several = len(fit.waves) > 1
    if not several:
        fit.load(0)
    settled = not several and spanning is not None and not spanning.open(bench.taps)  # more rows change nothing
    if not data.split or judges is None or held is None or settled:
        layers = make(fit, judge)
        return layers, layers
    if several:
        full = bench.statistics(data.calibration, spanning=spanning)
    elif spanning is None:
        full = fit.merged(held)
    else:
        full = fit.merged(StatisticsStore.of(bench.moments(spanning.open(bench.taps), judges, HELD_OUT)))
    layers = make(full)
    layers.part = make(fit, judge)
    return layers, layers.part


def _only_exact(settings: Settings) -> bool:
    """Whether no other shift is looked at than the exact one on all samples."""
    return settings.tolerance == 0 and settings.stochastic is None


def _enough(prepared: Prepared, heldout: Samples) -> Samples:
    """Of held-out samples as many, evenly spaced, as bring every layer rows enough to choose by."""
    fewest = min(prepared.bench.rows.values(), default=1)
    least, most = JUDGING_SAMPLES
    return heldout.spread(min(most, max(least, -(-JUDGING_ROWS // max(1, fewest)))))
