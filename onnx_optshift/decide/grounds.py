"""What decisions of a run are made on: its layers with their statistics, and the judge."""

from __future__ import annotations

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.decision import Grounds
from onnx_optshift.decide.gate import Gate, rounded_by
from onnx_optshift.run.capture import layers_maker
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import Data, Prepared


def grounds_of(prepared: Prepared, data: Data, full: Layers, fit: Layers) -> Grounds:
    """Layers of all calibration data and of the part that fits, with a gate where data was held out.

    Raises:
        InputError: The labels fit no output of the model.
    """
    bench, settings = prepared.bench, prepared.settings
    gate = None
    if data.heldout is not None:
        granted = settings.tolerance if isinstance(settings.tolerance, float) else 0.0
        grids = full.objective.grids
        gate = Gate(bench.outputs, data.heldout, granted, rounded_by(bench, grids) if grids else None)
    return Grounds(bench, full, fit, gate, data.calibration, data.fit, settings.seed, settings.recapture)


def drawn_layers(prepared: Prepared, grounds: Grounds, batch: Samples) -> Layers:
    """Layers of one draw of the stochastic form."""
    make = layers_maker(prepared, Data(batch, grounds.tried_on), grounds.full.objective)
    return make(prepared.bench.statistics(batch, "capture a draw"))
