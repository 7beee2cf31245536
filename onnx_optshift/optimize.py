"""THE page: discover, capture, solve, decide, write, verify, report. The only file that knows the order."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift import data as arrangement
from onnx_optshift import journal
from onnx_optshift.calibration.source import Samples
from onnx_optshift.data import Data
from onnx_optshift.decide import choose
from onnx_optshift.decide.gate import Gate
from onnx_optshift.decide.quantized import Quantizer
from onnx_optshift.diagnose.feature_curvature import feature_curvature
from onnx_optshift.diagnose.flatness import MOST_FLATNESS_SAMPLES, flatness, thinned
from onnx_optshift.diagnose.landscape import loss_of
from onnx_optshift.errors import InputError
from onnx_optshift.graph.atomic import check_target
from onnx_optshift.graph.weights import Skip
from onnx_optshift.layers import Candidate, Layers, Statistics, merged
from onnx_optshift.publish import copy_model, write_and_prove
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.report.model import Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.reporting import Clock, Findings, Outcome, build_report
from onnx_optshift.settings import Settings
from onnx_optshift.solve.quant_range import Granularity
from onnx_optshift.workbench import Workbench, open_model, open_workbench

if TYPE_CHECKING:
    import onnx

# Random inputs must give every layer at least this many rows per input feature.
SYNTHETIC_ROWS_PER_WIDTH = 2
FEWEST_SYNTHETIC = 64
# What weights are mostly quantized to where 8 bits are not the question: the objective "range" needs one to judge by.
DEFAULT_BITS = 4


@dataclass(frozen=True)
class Result:
    """A finished, verified run.

    Attributes:
        report: Everything that was found, decided and measured.
        path: The verified model file: OUT, or a temporary file that lives as long as this object.
    """

    report: Report
    path: Path

    def save(self, path: str | Path) -> Path:
        """Copies the verified file to `path`, by an atomic rename.

        Raises:
            InputError: The file cannot be written.
        """
        return copy_model(self.path, Path(path))


def shift(
    model: str | Path | onnx.ModelProto,
    calibration: object = None,
    *,
    heldout: object = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> Result:
    """Shifts a model's weights and proves that its outputs on the calibration data stayed.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        calibration: Calibration data: path, array by input name, reader, iterable of dicts, or a callable giving one;
            or a list of paths. None looks beside the model, and makes random inputs when nothing is there.
        heldout: Data that only judges, in the same forms; `"none"` switches the gate off. None splits some off.
        progress: Where long passes report to.
        **settings: Fields of `Settings`.

    Returns:
        The result; `result.save("out.onnx")` writes the file.

    Raises:
        InputError: The model, the data or a setting cannot be used.
        DeviceError: The device cannot be had.
        ToleranceError: The outputs left the tolerance and backing off did not help.
    """
    return run(model, None, _sources(calibration), _sources(heldout), Settings(**settings), progress)


def run(
    model: str | Path | onnx.ModelProto,
    out: Path | None,
    calibration: Sequence[object] | None,
    heldout: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
) -> Result:
    """The whole pass; writes OUT unless it is None or the run is dry.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        out: Where the shifted model goes; None keeps it in a temporary file.
        calibration: Sources of calibration data, or None.
        heldout: Sources of held-out data, or None.
        settings: All choices.
        progress: Where long passes report to.

    Raises:
        InputError: The model, the data or a setting cannot be used.
        DeviceError: The device cannot be had.
        ToleranceError: The outputs left the tolerance and backing off did not help.
    """
    clock = Clock()
    if out is not None and not settings.dry_run:
        check_target(Path(out))  # before the work, not after it
    source, found, skips = open_model(model, settings)
    with ExitStack() as stack:
        target = out
        if out is None or settings.dry_run:
            folder = Path(tempfile.mkdtemp(prefix="onnx-optshift-"))
            journal.unfinished(folder)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            target = folder / (source.path.name if source.path else "model.onnx")
        assert target is not None
        bench = open_workbench(source, found, settings, progress)
        prepared, unreached = _prepare(bench, calibration, heldout, settings)
        weights = bench.weights
        findings = Findings(source, settings, bench.device, weights, (*skips, *unreached), prepared)
        if weights and prepared is not None:
            with clock("capture"):
                bench.plan(prepared.calibration, parts=1 + prepared.split, metric=settings.objective == "curvature")
                layers_of = _layers(bench, prepared.fit, settings)
                full, fit = _capture(bench, prepared, layers_of)
            with clock("solve"):
                gate = _gate(bench, prepared, settings)
                decision = _decide(bench, full, fit, layers_of, gate, prepared, settings)
            findings = replace(findings, layers=full, decision=decision, gate=gate, grids=_grids(settings))
        with clock("verify"):
            proved = write_and_prove(
                bench,
                findings.decision,
                findings.layers,
                target,
                external=settings.save_as_external_data,
                seed=settings.seed,
            )
        with proved:
            # Whatever may still fail or be interrupted comes before the rename: OUT appears last.
            outcome = Outcome(proved.sha256, proved.candidate, proved.reverted, proved.verification)
            report = build_report(findings, outcome, clock, out)
            if settings.flatness and prepared is not None and weights:
                report = replace(report, flatness=_flatness(bench, prepared, proved.candidate, settings))
            proved.written.commit()
        result = Result(report, target)
        weakref.finalize(result, stack.pop_all().close)  # a temporary file lives as long as the result
        return result


def inspect(
    model: str | Path | onnx.ModelProto,
    calibration: Sequence[object] | None,
    settings: Settings,
    progress: Progress = SILENT,
) -> Report:
    """Layers, the freedom that calibration data leaves them, and skips with reasons. Writes no model.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        calibration: Sources of calibration data; without any the layers are listed without rank.
        settings: All choices.
        progress: Where long passes report to.

    Raises:
        InputError: The model, the data or a setting cannot be used.
    """
    clock = Clock()
    source, found, skips = open_model(model, settings)
    bench = open_workbench(source, found, settings, progress)
    samples = arrangement.find_calibration(source, calibration, settings)
    unreached = () if samples is None else bench.drop_unstackable(samples)
    weights = bench.weights
    findings = Findings(source, settings, bench.device, weights, (*skips, *unreached), None)
    if samples is not None and weights:
        findings = replace(findings, data=Data(samples, samples, None, False))
        with clock("capture"):
            bench.plan(samples, metric=settings.objective == "curvature")
            full = _layers(bench, samples, settings)(bench.collect(samples))
        with clock("solve"):
            decision = choose.exact(full, full, None, samples)
        findings = replace(findings, layers=full, decision=decision)
    return build_report(findings, None, clock, None)


def _prepare(
    bench: Workbench, calibration: Sequence[object] | None, heldout: Sequence[object] | None, settings: Settings
) -> tuple[Data | None, tuple[Skip, ...]]:
    """The data of the run, None when there is no weight to need any and none was given; and what it cannot reach."""
    samples = arrangement.find_calibration(bench.model, calibration, settings)
    if samples is None:
        if not bench.weights or not bench.model.inputs:
            return None, ()
        one = arrangement.synthetic_calibration(bench.model, 1, settings)
        unreached = bench.drop_unstackable(one)
        rows = bench.rows_per_sample(one)
        needed = max(-(-SYNTHETIC_ROWS_PER_WIDTH * tap.width // rows[tap]) for tap in bench.taps)
        samples = arrangement.synthetic_calibration(bench.model, max(FEWEST_SYNTHETIC, needed), settings)
    else:
        unreached = bench.drop_unstackable(samples)
    return arrangement.arrange(bench.model, samples, heldout, settings), unreached


def _capture(bench: Workbench, prepared: Data, layers_of: Callable[[Statistics], Layers]) -> tuple[Layers, Layers]:
    """Layers of all calibration data, and of the part that settings are tried on (the same when none was split off)."""
    if not prepared.split or prepared.judge is None:
        layers = layers_of(bench.collect(prepared.calibration))
        return layers, layers
    fit = bench.collect(prepared.fit)
    if bench.waves > 1:  # each captures its own, wave by wave
        return layers_of(bench.collect(prepared.calibration)), layers_of(fit)
    return layers_of(merged(fit, bench.collect(prepared.judge))), layers_of(fit)


def _layers(bench: Workbench, samples: Samples, settings: Settings) -> Callable[[Statistics], Layers]:
    """Makes layers of statistics; whatever these cover, the norm is measured once, on the samples given here."""
    slopes = feature_curvature(bench, samples, seed=settings.seed) if settings.objective == "curvature" else None
    return lambda statistics: Layers(
        bench.weights,
        statistics,
        bench.model.initializer,
        device=bench.device.solve,
        objective=settings.objective,
        granularity=_granularity(settings),
        grids=_judging_grids(settings),
        slopes=slopes,
        keep=bench.keep,
    )


def _granularity(settings: Settings) -> Granularity:
    if settings.range_block is None:
        return Granularity(settings.range_scope)
    coarsest = min(_judging_grids(settings), key=lambda grid: grid.bits, default=None)
    return Granularity("block", settings.range_block, coarsest.reach if coarsest else 1.0)


def _grids(settings: Settings) -> tuple[Grid, ...]:
    """What the weights are going to be quantized to, as the settings say."""
    if settings.range_block is None:
        return tuple(Grid(bits, settings.range_scope) for bits in settings.quantization_bits)
    # The quantizers that scale by blocks, MatMulNBits before all, use every level: one end of the range rounds badly.
    return tuple(Grid(bits, "block", settings.range_block, "full") for bits in settings.quantization_bits)


def _judging_grids(settings: Settings) -> tuple[Grid, ...]:
    """The grids that decide what is taken: only where it is a quantizer that the shift is for."""
    if settings.objective != "range":
        return ()
    return _grids(settings) or _grids(replace(settings, quantization_bits=(DEFAULT_BITS,)))


def _gate(bench: Workbench, prepared: Data, settings: Settings) -> Gate | None:
    if prepared.judge is None:
        return None
    grids = _judging_grids(settings)
    quantizer = Quantizer(bench, grids) if grids else None
    return Gate(bench, prepared.judge, settings.tolerance if isinstance(settings.tolerance, float) else 0.0, quantizer)


def _decide(
    bench: Workbench,
    full: Layers,
    fit: Layers,
    layers_of: Callable[[Statistics], Layers],
    gate: Gate | None,
    prepared: Data,
    settings: Settings,
) -> choose.Decision:
    if settings.stochastic is not None:

        def layers_for(batch: Samples) -> Layers:
            return layers_of(bench.collect(batch, "capture a draw"))

        samples = prepared.fit
        classes = _classes(bench, samples)
        return choose.stochastic(settings.stochastic, bench, samples, classes, layers_for, gate, settings.seed)
    if settings.tolerance == "auto":
        return choose.automatic(bench, full, fit, gate, prepared.calibration)
    if settings.tolerance > 0:
        trial = prepared.fit if prepared.split else prepared.calibration
        ways = choose.strategies(bench, full, prepared.calibration, fit, trial)
        return choose.within(settings.tolerance, bench, ways, gate, prepared.calibration)
    return choose.exact(full, fit, gate, prepared.calibration)


def _flatness(bench: Workbench, prepared: Data, candidate: Candidate, settings: Settings) -> dict[str, Any]:
    """Flatness before and after, on calibration data, as the report has it."""
    few = thinned(prepared.calibration, MOST_FLATNESS_SAMPLES, settings.seed)
    arrays, probes = candidate.arrays or None, settings.flatness or 0
    return asdict(flatness(bench, few, loss_of(bench, few), {}, arrays, probes=probes, seed=settings.seed))


def _classes(bench: Workbench, samples: Samples) -> NDArray[np.int64]:
    """Class of each sample `[n]`: its label, or else the model's own argmax.

    Raises:
        InputError: There is neither.
    """
    if samples.labels is not None and np.issubdtype(samples.labels.dtype, np.integer):
        return samples.labels.astype(np.int64)
    found: list[NDArray[np.int64]] = []
    for batch, outputs in bench.reference(samples):
        count = len(batch.indices)
        fitting = [v for v in outputs.values() if v.ndim >= 2 and v.shape[0] >= count and v[0].size >= 2]
        if not fitting:
            raise InputError(
                "--stochastic draws class by class, and neither are there integer labels nor does the model have an "
                "output [samples, classes] to take the argmax of. Give labels with the calibration data."
            )
        found.append(fitting[0].reshape(fitting[0].shape[0], -1)[:count].argmax(axis=1).astype(np.int64))
    return np.concatenate(found)


def _sources(given: object) -> list[object] | None:
    """One source, or a list of paths as several; a list of dicts is one source."""
    if given is None:
        return None
    if isinstance(given, (list, tuple)) and given and all(isinstance(item, (str, Path)) for item in given):
        return list(given)
    return [given]
