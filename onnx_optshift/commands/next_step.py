"""What to do now, in a sentence: the best next command for this model, with a figure from the statistics at hand."""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import replace

from onnx_optshift.diagnosis.verdict import JUDGED_AT
from onnx_optshift.report.diagnosis import GO, NO_GO
from onnx_optshift.report.figures import mean_change, number
from onnx_optshift.report.model import Report
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import FEWEST_TO_SPLIT
from onnx_optshift.solve.grid_choice import RESIDUAL_SHARES
from onnx_optshift.solve.grid_rounding import Start, on_grid
from onnx_optshift.solve.objective import DEFAULT_BITS, make_grids
from onnx_optshift.solve.rounding_error import output_error

PROGRAM = "python -m onnx_optshift"
QUANTIZE = f"--objective range --tolerance auto --quantization-bits {DEFAULT_BITS}"
# Norms that fall by less are little; of a rounding error likewise, as its prediction is rough.
LITTLE, ROUGH = 0.05, 0.15
# What a prediction may cost: layers, their columns and width, and seconds after which no other layer is begun.
MOST_LAYERS, COLUMNS, WIDEST, SECONDS = 4, 16, 1024, 0.3


def next_step(report: Report, layers: Layers | None) -> str:
    """The next command; empty where nothing follows."""
    if report.calibration is None or report.calibration.synthetic:
        return "Next: the same with --calib and real data." if report.layers else ""
    if report.command == "diagnose" and report.collapse is None:
        return ""
    settings, run = report.settings, f"{PROGRAM} {_model(report)} OUT.onnx{_data(report)}"
    moved = [layer for layer in report.layers if layer.status == "shifted"]
    if report.command == "shift" and moved and (settings["quantization_bits"] or _gain(report) >= LITTLE):
        return _after(report)
    exact = _gain(report)
    fit = report.collapse is None or report.collapse.verdict.answer == GO
    if report.command != "shift" and settings["objective"] == "norm" and exact >= LITTLE and fit:
        return f"Next: `{run}`: the norm falls by {100 * exact:.0f} %, at the same outputs."
    if report.collapse is not None and report.collapse.verdict.answer != NO_GO and report.calibration.classes:
        gain = 100 * _gain(report, JUDGED_AT)
        return f"Next: `{run} --tolerance auto`: the norm falls by {gain:.0f} % at a layer residual of {JUDGED_AT:g}."
    if settings["objective"] == "range" and report.command == "shift":
        return ""
    exactly = settings["tolerance"] == 0 and settings["stochastic"] is None and any(x.rank for x in report.layers)
    if exactly and layers is not None and report.calibration.samples >= FEWEST_TO_SPLIT:
        amount, command = "little" if moved or exact > 0 else "nothing", f"Next, for a quantizer: `{run} {QUANTIZE}`"
        predicted = predict(layers)
        if predicted is None:
            return f"Exact: {amount} to gain. {command}."
        before, after, count = predicted
        figure = (
            f"layer error under {DEFAULT_BITS}-bit rounding {number(before)} -> about {after:.1g} (estimated on "
            f"{count} layer{'s' * (count > 1)})"
        )
        if after < (1 - ROUGH) * before:
            return f"Exact: {amount} to gain. {command}: {figure}."
        return f"Exact: {amount} to gain, and little for a quantizer: {figure}. Next: leave the model as it is."
    return ""


def predict(layers: Layers) -> tuple[float, float, int] | None:
    """Geometric means of some layers' errors under round-to-nearest, of V and of V on the grid; and how many layers.

    On a few columns of a few layers, from the narrowest to the widest; None where none can be had cheaply.
    """
    if len(layers.store.waves) > 1 or layers.sharing.world.size > 1:
        return None  # each would be captured again, or is known to other processes
    (grid,), start = make_grids((DEFAULT_BITS,)), time.perf_counter()
    fit = [w for w in layers.weights.values() if w.d <= WIDEST and w.groups == 1 and layers.blocked(w) is None]
    fit = [weight for weight in fit if layers.factored.representative(weight)]
    fit.sort(key=lambda weight: weight.d)
    places = sorted({round(k * (len(fit) - 1) / (MOST_LAYERS - 1)) for k in range(MOST_LAYERS)}) if fit else []
    found = []
    for weight in (fit[place] for place in places):
        problem = layers.problem(weight)
        problem = replace(problem, matrix=problem.matrix[..., :: -(-weight.m // COLUMNS)].contiguous())
        before = output_error(problem.spectrum, problem.matrix, problem.matrix, grid)
        if not 0 < before < math.inf:
            continue
        # The start that is best on most layers stands for the one that a run would choose.
        after = problem.residual(on_grid(problem, grid, Start(RESIDUAL_SHARES[2] * before)))
        found.append((before, max(after, problem.rounding_unit)))  # of the grid already: exactly there
        if time.perf_counter() - start > SECONDS:
            break
    if not found:
        return None
    before, after = (math.exp(math.fsum(map(math.log, side)) / len(found)) for side in zip(*found, strict=True))
    return before, after, len(found)


def _after(report: Report) -> str:
    """What follows a shift: it is written, quantized, or looked at on new data."""
    if report.model.output is None:
        return "Next: the same with an output path and without --dry-run." if report.settings["dry_run"] else ""
    written, errors = shlex.quote(report.model.output), report.quantization or ()
    if report.settings["objective"] == "range" and errors:
        bits = min(error.bits for error in errors)
        error = mean_change((e.error_before, e.error_after) for e in errors if e.bits == bits)
        shown = f": layer error {error[0]}" if error else ""
        return f"Next: quantize {written} to {bits} bits, symmetric, rounding to nearest{shown}."
    return (
        f"Next: `{PROGRAM} verify {_model(report)} {written} --calib NEW_DATA`: whether other data is served as well."
    )


def _model(report: Report) -> str:
    """The original, as the command line takes it."""
    return "IN.onnx" if report.model.input == "ModelProto" else shlex.quote(report.model.input)


def _data(report: Report) -> str:
    """Its calibration data likewise; nothing where that has no path."""
    sources = report.calibration.source.split(", ") if report.calibration else []
    return "" if any(source.startswith("Python ") for source in sources) else f" --calib {shlex.join(sources)}"


def _gain(report: Report, residual: float = 0.0) -> float:
    """The share by which the figure of all layers falls, by geometric means; at a residual, by their frontiers."""
    if residual:
        points = [point for layer in report.layers for point in layer.frontier if point.tolerance == residual]
        ratios = [point.norm_ratio for point in points]
    else:
        pairs = [layer.headline for layer in report.layers if layer.headline]
        ratios = [pair.after / pair.before if pair.before > 0 else 1.0 for pair in pairs]
    logs = [math.log(ratio) for ratio in ratios if ratio and math.isfinite(ratio)]
    return 1 - math.exp(math.fsum(logs) / len(logs)) if logs else 0.0
