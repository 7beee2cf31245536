"""What every command starts with: the model opened, its data found and arranged, its device and memory settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import beside, load
from onnx_optshift.calibration.shapes import parse_shape, shape_option, usual_sizes, with_shapes
from onnx_optshift.calibration.source import Samples
from onnx_optshift.calibration.split import split
from onnx_optshift.calibration.synthetic import synthetic
from onnx_optshift.capture.session import resolve_device
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import PatchRows
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.budget import Budget, make_plan
from onnx_optshift.run.identity import check_folder, checkpoint
from onnx_optshift.run.kept_plan import kept_plan
from onnx_optshift.run.masking import find_mask
from onnx_optshift.run.weighing import output_rows, weighed
from onnx_optshift.run.world import ALONE, World, check_same
from onnx_optshift.settings import Settings

if TYPE_CHECKING:
    import onnx

# Patches for each input of a convolution whose weights are going to be rounded: more change nothing.
ENOUGH_ROWS = 64
# Products in float32 tell singular values of rows apart down to this share of the largest: a tolerance below it needs
# all of float64, and all patches.
LEAST_FOR_SINGLE = 1e-3
# Fewer samples than this cannot be split into one part that fits and one that judges.
FEWEST_TO_SPLIT = 10
# The word for `--heldout` that switches the gate off: exact on the calibration data is then all that is promised.
NO_HELDOUT = "none"
# Random inputs must give every layer at least this many rows per input feature.
SYNTHETIC_ROWS_PER_WIDTH = 2
FEWEST_SYNTHETIC = 64

NO_DATA_WARNING = (
    "no calibration data: seeded random inputs are used, so only directions that nothing excites are removed. "
    "Give real data with --calib before relying on the result."
)


@dataclass(frozen=True)
class Data:
    """The samples of one run."""

    calibration: Samples  # all that the final solve and the promise cover
    fit: Samples  # the part that settings are tried on: all of `calibration`, unless some was split off to judge
    heldout: Samples | None = None  # what shifts are judged on: given, or split off; None when there is none
    split: bool = False  # whether `heldout` was split off the calibration data and joins it for the final solve
    warnings: tuple[str, ...] = ()  # one sentence each


@dataclass(frozen=True)
class Prepared:
    """A run before anything is captured; valid as it is."""

    model: ModelFile  # the original
    bench: Bench  # runs it and its trials
    skips: tuple[Skip, ...]  # linear layers that are left alone, with reasons
    data: Data | None  # None where no layer needs any and none were given
    settings: Settings
    predicted_memory: int | None = None  # the process's peak, in bytes; None without data
    reads: tuple[object, ...] = ()  # sources of all data, which nothing may be written over
    top_shares: Mapping[str, float] = field(default_factory=dict)  # of a layer's output energy, in 1 % of its rows
    notes: tuple[str, ...] = ()  # sentences for the report

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Those that can be solved for."""
        return self.bench.weights


def prepare(
    model: str | Path | onnx.ModelProto,
    settings: Settings,
    calibration: Sequence[object] | None,
    heldout: Sequence[object] | None = (NO_HELDOUT,),
    *,
    make_up: bool = False,
    look_at_rows: bool = False,
    progress: Progress = SILENT,
    world: World = ALONE,
) -> Prepared:
    """Opens a model and its data, and plans how its memory budget is kept.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        settings: All choices.
        calibration: Sources of calibration data; None looks beside the model.
        heldout: Sources of held-out data; `["none"]` for none; None splits some off.
        make_up: Whether random inputs serve where there is no data.
        look_at_rows: Whether it is measured how unequal the layers' output rows are, also where nothing weighs them.
        progress: Where long passes report to.
        world: The processes that share the run. Each sees all data and the whole model.

    Raises:
        InputError: The model, the data or a setting cannot be used, or another process finds other ones.
    """
    check_folder(settings.checkpoint)
    source = ModelFile.load(model)
    selection = Selection(settings.nodes_to_include, settings.nodes_to_exclude, settings.op_types)
    weights, skips = discover(source, selection)
    fallback = settings.allow_cpu_fallback
    device = resolve_device(
        settings.device, settings.providers, allow_cpu_fallback=fallback, local_rank=world.local_rank
    )
    world.settle(device.solve)
    size, library = settings.batch_size or 1, settings.custom_op_library
    bench = Bench.open(source, weights, device, library, world, batch_size=size, progress=progress)
    specs = input_specs(source, settings)
    sources = calibration or (beside(source.path, specs) if source.path is not None else ())
    samples = find_calibration(source, sources, settings, heldout)
    if samples is None:
        if not (make_up and weights and source.inputs):
            return Prepared(source, bench, tuple(skips), None, settings, reads=tuple(heldout or ()))
        samples = _made_up(bench, specs, settings)
    # What is measured on a few samples is measured by one process: the others must not find it a little different.
    unreached = world.once(partial(bench.unstackable, samples))
    bench = bench.without({skip.weight for skip in unreached})
    data = arrange(source, samples, heldout, settings)
    if world.size > 1:  # digests of all samples may be no use to one process
        sets = {"calibration set": data.calibration, "held-out set": data.heldout}
        prints = {name: given.fingerprint for name, given in sets.items() if given is not None}
        check_same(world, {"model": source.sha256, **prints})
    mask = world.once(partial(find_mask, bench, samples, settings.row_mask))
    notes: tuple[str, ...] = ()
    if mask is not None:
        data, samples = _masked(data, mask), samples.masked(mask)
        notes = (
            f"positions where the input {mask!r} is 0 are no data: no other output depends on them. Their rows are "
            "left out, and outputs are compared at the others",
        )
    done = checkpoint(settings.checkpoint, source, samples, device, library, world)
    relative = settings.row_weighting == "relative" and settings.tolerance != 0
    rows = world.once(partial(output_rows, bench, samples)) if relative or look_at_rows else {}
    bench = weighed(bench, rows) if relative else bench
    rounds = settings.objective == "range" and data.heldout is not None  # judged by rows of its own
    costs = bench.costs(samples, parts=1 + data.split + rounds, metric=settings.objective == "curvature")
    budget = Budget.least(world.gather(Budget.of(settings.max_memory, device.solve, world.local_size)))
    plan = make_plan(costs, bench.weights, settings.batch_size, budget)
    asked = f"batch size {settings.batch_size}, memory {settings.max_memory}, {costs.parts} parts, {costs.metric}"
    if (former := world.once(partial(kept_plan, done, plan, bench.taps, asked))) != plan:
        plan = make_plan(costs, bench.weights, settings.batch_size, budget, former)
    size, kept, waves = plan.batch_size, plan.kept, plan.waves
    bench = replace(bench, batch_size=size, kept_bytes=kept, waves=waves, rows=costs.rows, checkpoint=done)
    coarse = settings.tolerance == "auto" or settings.tolerance >= LEAST_FOR_SINGLE
    if settings.objective == "range" and settings.quantization_bits and coarse:
        # What rounding to a few bits does to outputs is far above what float32 products leave unresolved, and what
        # more patches would tell: convolutions of large images have thousands for each input. Tokens are all taken:
        # what stands at a position is no accident.
        every = {
            tap: max(1, len(samples) * count // (ENOUGH_ROWS * tap.width))
            for tap, count in costs.rows.items()
            if isinstance(tap.form, PatchRows)
        }
        bench = replace(bench, products=torch.float32, every=every)
    if world.size > 1:
        notes += (f"{world.size} processes shared the samples and the layers",)
    note = bench.sessions.original().note
    data = _warned(data, note) if note else data
    reads = (*sources, *(heldout or ()))
    shares = {name: found.top_share for name, found in rows.items()}
    return Prepared(source, bench, (*skips, *unreached), data, settings, plan.predicted, reads, shares, notes)


def find_calibration(
    model: ModelFile,
    sources: Sequence[object] | None,
    settings: Settings,
    heldout: Sequence[object] | None = (NO_HELDOUT,),
) -> Samples | None:
    """Calibration data; None where there are no sources. Labels that the user named must be in what judges or draws."""
    if not sources:
        return None
    others_judge = bool(heldout) and not judges_nothing(heldout)
    required = _labels_named(settings) and not others_judge
    samples = load(sources, input_specs(model, settings), labels_name=settings.labels, labels_required=required)
    return samples if settings.max_samples is None else samples.select(range(min(settings.max_samples, len(samples))))


def arrange(model: ModelFile, calibration: Samples, heldout: Sequence[object] | None, settings: Settings) -> Data:
    """Decides which samples fit and which are held out: those of other sources, or else a share of the calibration's.

    Raises:
        InputError: The held-out data cannot be used.
    """
    data = Data(calibration, calibration, warnings=(NO_DATA_WARNING,) if calibration.synthetic else ())
    if judges_nothing(heldout):
        return data
    if heldout:
        if settings.heldout_fraction != Settings.heldout_fraction:
            raise InputError(
                f"heldout_fraction {settings.heldout_fraction:g}: nothing is split off where held-out data is given. "
                "Leave --heldout-fraction or --heldout out."
            )
        specs, required = input_specs(model, settings), _labels_named(settings)
        given = load(heldout, specs, labels_name=settings.labels, labels_required=required)
        data = replace(data, heldout=given)
        if given.fingerprint == calibration.fingerprint:
            data = _warned(
                data,
                "the held-out data equals the calibration data (same fingerprint), so it cannot show harm to unseen "
                "data. Give other samples with --heldout.",
            )
        return data
    if len(calibration) < FEWEST_TO_SPLIT:
        return _warned(
            data,
            f"{len(calibration)} calibration samples are too few to hold some of them out: whether unseen data is "
            "served worse was not checked. Give more samples, or --heldout.",
        )
    fit, held = split(calibration, settings.heldout_fraction, settings.seed)
    return replace(data, fit=calibration.select(fit), heldout=calibration.select(held), split=True)


def judges_nothing(heldout: Sequence[object] | None) -> bool:
    """Whether sources of held-out data are the word that switches the gate off."""
    # An array equals a word entry by entry.
    return heldout is not None and len(heldout) == 1 and isinstance(heldout[0], str) and heldout[0] == NO_HELDOUT


def input_specs(model: ModelFile, settings: Settings) -> list[InputSpec]:
    """The model's inputs as the calibration side knows them, with the sizes that the user has chosen.

    Raises:
        InputError: A size contradicts the model, or an input has two.
    """
    shapes = dict(map(parse_shape, settings.input_shapes))
    if len(shapes) < len(settings.input_shapes):
        raise InputError(f"input shapes: expected one for each input, found {', '.join(settings.input_shapes)}.")
    return with_shapes([InputSpec(spec.name, spec.dtype, spec.shape) for spec in model.inputs], shapes)


def _masked(data: Data, name: str) -> Data:
    heldout = None if data.heldout is None else data.heldout.masked(name)
    return replace(data, calibration=data.calibration.masked(name), fit=data.fit.masked(name), heldout=heldout)


def _labels_named(settings: Settings) -> bool:
    return settings.labels != Settings.labels


def _warned(data: Data, warning: str) -> Data:
    return replace(data, warnings=(*data.warnings, warning))


def _made_up(bench: Bench, inputs: Sequence[InputSpec], settings: Settings) -> Samples:
    """Seeded random inputs of the first usual sizes that the model runs on, enough for the widest layer.

    Raises:
        InputError: Labels were asked for.
    """
    if _labels_named(settings):
        raise InputError(f"labels: there is no data that could hold {settings.labels!r}. Give it with --calib.")
    specs = _runnable(bench, inputs, settings.seed)
    one = synthetic(specs, 1, settings.seed)
    rows = bench.without({skip.weight for skip in bench.unstackable(one)}).costs(one).rows
    needed = max((-(-SYNTHETIC_ROWS_PER_WIDTH * tap.width // count) for tap, count in rows.items()), default=1)
    return synthetic(specs, max(FEWEST_SYNTHETIC, needed), settings.seed)


def _runnable(bench: Bench, inputs: Sequence[InputSpec], seed: int) -> Sequence[InputSpec]:
    """The inputs with sizes that the model runs on: its own and the user's, and usual ones where those are free.

    Raises:
        InputError: It runs on none of them.
    """
    session = bench.sessions.original()
    tried: list[str] = []
    for specs in usual_sizes(inputs):
        (first,) = synthetic(specs, 1, seed).batches(1)
        try:
            session.run(first.feeds)
        except InputError as error:
            tried.append(", ".join(f"{name} {list(array.shape)}" for name, array in first.feeds.items()))
            reason = error
        else:
            return specs
    option = shape_option(inputs)
    raise InputError(
        f"{bench.model.where}: no calibration data, and the model does not run on random inputs of any of these sizes: "
        f"{'; '.join(tried)}. Give data with --calib{f', or sizes that it takes, such as {option}' if option else ''}. "
        f"The last try: {reason}"
    )
