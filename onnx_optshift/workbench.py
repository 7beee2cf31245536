"""One model on one device, ready for experiments: capture statistics, run trial weights, compare with the original.

Trials never touch a file: one session has the weights as overridable inputs, and each trial feeds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.session import Device, Session, resolve_device
from onnx_optshift.capture.stream import stream
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.layers import Arrays, Statistics, Waves
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.settings import Settings
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import observe, to_rows
from onnx_optshift.verify.compare import OutputsDifference

if TYPE_CHECKING:
    import onnx

Outputs = dict[str, NDArray[Any]]

# Large enough to keep matrix products efficient, small enough that one batch of activations stays modest.
DEFAULT_BATCH_SIZE = 32
# Rows that are in float64 at the same time where two captures are multiplied.
ROWS_AT_ONCE = 8192
# Outputs of the original model are kept up to this size, and computed again on each pass beyond it.
KEPT_OUTPUT_BYTES = 512 * 2**20
# Share of the memory that is free at the start which a run may take when --max-memory does not say.
FREE_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory, in bytes, and the batch size that keeps it.

    Attributes:
        batch_size: Samples per run of the model.
        model: The model as parsed and serialized, and in two sessions (original and trial).
        activations: One batch of tapped activations, and as much again inside ONNX Runtime.
        statistics: Moments of every tap and their factorizations.
        solve: The largest layer's working set.
        budget: What the sum must not exceed.
        waves: Parts of the model's layers that are captured and solved one after the other; 1 where all fit at once.
    """

    batch_size: int
    model: int
    activations: int
    statistics: int
    solve: int
    budget: int
    waves: int

    @property
    def predicted(self) -> int:
        """Predicted peak in bytes, on top of the interpreter and its libraries."""
        return self.model + self.activations + self.statistics + self.solve


class Workbench:
    """Runs one model's experiments.

    Args:
        model: The original model.
        weights: The weights that may move.
        device: What runs where.
        batch_size: Samples per run; None chooses by memory.
        max_memory: Bytes that the run may take; None for a share of what is free.
        custom_op_library: Shared library with custom operators.
        progress: Where long passes report to.
    """

    def __init__(
        self,
        model: ModelFile,
        weights: Sequence[Weight],
        device: Device,
        *,
        batch_size: int | None = None,
        max_memory: int | None = None,
        custom_op_library: str | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.model = model
        self.weights = tuple(weights)
        self.device = device
        self.progress = progress
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self._asked_batch_size = batch_size
        self._budget = max_memory if max_memory is not None else int(FREE_MEMORY_SHARE * _free_memory())
        self._custom_op_library = custom_op_library
        self._waves: tuple[tuple[Tap, ...], ...] = ()
        self._kept: dict[str, list[tuple[Batch, Outputs]]] = {}

    def session(self, model: bytes | Path | None = None, **options: Any) -> Session:
        """A session on the original, on another file, or on bytes whose external data is the original's."""
        if model is None:
            model = self.model.path or probe_model(self.model, ())
        folder = self.model.folder if isinstance(model, bytes) else None
        return Session(model, self.device, folder=folder, custom_op_library=self._custom_op_library, **options)

    @cached_property
    def original(self) -> Session:
        """The original model, as a user runs it."""
        return self.session()

    @cached_property
    def trial(self) -> Session:
        """The original model with the weights as overridable inputs."""
        return self.session(probe_model(self.model, (), [weight.name for weight in self.weights]))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Distinct inputs of all weights."""
        return tuple(dict.fromkeys(use.tap for weight in self.weights for use in weight.uses))

    def plan(self, samples: Samples, *, parts: int = 1) -> MemoryPlan:
        """Predicts peak memory from one real run of the first sample, and fixes the batch size.

        Args:
            samples: Calibration data.
            parts: How many disjoint parts of the data get statistics of their own.

        Returns:
            The plan; `batch_size` of this workbench follows it.

        Raises:
            InputError: Even one sample at a time would not fit.
        """
        sizes, rows = self._measure(samples)
        # Inline weights exist as the parsed file, its serialized probe and in two sessions; external ones only there.
        model = 2 * self.model.size + 2 * self.model.proto.ByteSize()
        # Rows that are fewer than d are factored themselves: no d x d matrix then.
        lengths = {w.name: min(w.d, len(samples) * sum(rows[use.tap] for use in w.uses)) for w in self.weights}
        solve = max((8 * w.groups * w.d * (3 * lengths[w.name] + 4 * w.m) for w in self.weights), default=0)

        def held(taps: Iterable[Tap]) -> int:
            # A factorization is as large as the moments it is made from.
            moments = sum(8 * tap.groups * tap.width * min(tap.width, rows[tap] * len(samples)) for tap in taps)
            return 2 * parts * moments

        def running(taps: Iterable[Tap]) -> int:
            return 2 * sum(sizes[value] for value in {tap.value for tap in taps})

        asked = self._asked_batch_size
        room = self._budget - model - solve
        waves = _waves(self.weights, lambda taps: held(taps) + running(taps) * (asked or 1), room)
        statistics = max((held(wave) for wave in waves), default=0)
        per_sample = max((running(wave) for wave in waves), default=0)
        batch_size = asked or DEFAULT_BATCH_SIZE
        if asked is None and per_sample > 0:
            batch_size = max(1, min(batch_size, (room - statistics) // per_sample))
        plan = MemoryPlan(batch_size, model, per_sample * batch_size, statistics, solve, self._budget, len(waves))
        if plan.predicted > plan.budget:
            raise InputError(
                f"memory: predicted peak {_size(plan.predicted)} (model {_size(plan.model)}, activations "
                f"{_size(plan.activations)}, statistics {_size(plan.statistics)}, solver {_size(plan.solve)}) exceeds "
                f"{_size(plan.budget)}, one layer at a time. Raise --max-memory, lower --batch-size, or leave the "
                "widest layers out with --nodes-to-exclude."
            )
        self.batch_size = batch_size
        self._waves = waves
        return plan

    def rows_per_sample(self, samples: Samples) -> dict[Tap, int]:
        """Rows that one sample gives each tap, from a real run of the first sample."""
        return self._measure(samples)[1]

    def _measure(self, samples: Samples) -> tuple[dict[str, int], dict[Tap, int]]:
        """Bytes of each tapped value and rows of each tap for one sample."""
        sizes: dict[str, int] = {}
        rows: dict[Tap, int] = {}

        def measure(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
            samples_run = len(batch.indices) + batch.padding
            sizes[tap.value] = activation.nbytes // samples_run
            moments = InputMoments(tap.groups, tap.width, self.device.solve)
            observe(moments, tap, activation)
            rows[tap] = max(1, moments.rows // samples_run)

        first = samples.select(np.arange(1))
        stream(self.capture_session(self.taps), self.taps, first.batches(1), measure)
        return sizes, rows

    def collect(self, samples: Samples, stage: str = "capture") -> Statistics:
        """Moments of every tap over these samples: in one streaming pass, or a pass for each wave of the plan."""
        if len(self._waves) <= 1:
            return self._collect(self.taps, samples, stage)
        return Waves(self._waves, lambda taps: self._collect(taps, samples, stage))

    def _collect(self, taps: Sequence[Tap], samples: Samples, stage: str) -> dict[Tap, InputMoments]:
        statistics = {tap: InputMoments(tap.groups, tap.width, self.device.solve) for tap in taps}

        def sink(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
            observe(statistics[tap], tap, activation)

        session = self.capture_session(taps)
        with self.progress.stage(stage, len(samples)) as advance:
            stream(session, taps, samples.batches(self.batch_size), sink, done=advance)
        return statistics

    @property
    def waves(self) -> int:
        """How many passes over the data it takes to see every layer's input."""
        return max(1, len(self._waves))

    def collect_moved(self, weight: Weight, samples: Samples, arrays: Arrays) -> tuple[InputMoments, torch.Tensor]:
        """What flows into one weight once others have moved, beside what flowed in before.

        Args:
            weight: The weight whose input is looked at.
            samples: Calibration data.
            arrays: New contents of the weights that moved.

        Returns:
            Moments of the new rows A', and A'ᵀA `[g, d, d]` with the original rows A, float64.
        """
        taps = tuple(dict.fromkeys(use.tap for use in weight.uses))
        copies = {tap: sum(use.tap == tap for use in weight.uses) for tap in taps}
        moved = InputMoments(weight.groups, weight.d, self.device.solve)
        cross = torch.zeros(weight.groups, weight.d, weight.d, dtype=torch.float64, device=self.device.solve)
        before: dict[Tap, torch.Tensor] = {}
        names = [w.name for w in self.weights]
        session = self.session(probe_model(self.model, list(dict.fromkeys(tap.value for tap in taps)), names))

        def keep(tap: Tap, _: Batch, activation: torch.Tensor) -> None:
            before[tap] = to_rows(activation, tap).clone()

        def join(tap: Tap, _: Batch, activation: torch.Tensor) -> None:
            after, original = to_rows(activation, tap), before[tap]
            for start in range(0, after.shape[1], ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                for _copy in range(copies[tap]):
                    moved.update(after[:, part])
                    cross.baddbmm_(after[:, part].mT.to(cross), original[:, part].to(cross))

        with self.progress.stage(f"capture again for {weight.name}", len(samples)) as advance:
            for batch in samples.batches(self.batch_size):
                stream(session, taps, [batch], keep)
                stream(session, taps, [batch], join, overrides=arrays, done=advance)
        return moved, cross

    def reference(self, samples: Samples) -> Iterator[tuple[Batch, Outputs]]:
        """The original model's outputs, batch by batch; kept for the next time while they fit."""
        kept = self._kept.get(samples.fingerprint)
        if kept is not None:
            yield from kept
            return
        keep: list[tuple[Batch, Outputs]] | None = []
        held = 0
        for batch in samples.batches(self.batch_size):
            outputs = self.original.run(batch.feeds)
            held += sum(value.nbytes for value in outputs.values())
            held += sum(value.nbytes for value in batch.feeds.values())
            if keep is not None:
                keep.append((batch, outputs))
                if held > KEPT_OUTPUT_BYTES:
                    keep = None
            yield batch, outputs
        if keep is not None:
            self._kept[samples.fingerprint] = keep

    def deviation(
        self, samples: Samples, arrays: Mapping[str, NDArray[np.generic]], session: Session | None = None
    ) -> OutputsDifference:
        """How far outputs with these weights are from the original's.

        Args:
            samples: The data.
            arrays: Trial weights by initializer name.
            session: Runs another session without trial weights instead: a written file, or a noise run.
        """
        difference = OutputsDifference()
        for batch, reference in self.reference(samples):
            outputs = self.trial.run({**batch.feeds, **arrays}) if session is None else session.run(batch.feeds)
            difference.update(outputs, reference, len(batch.indices) + batch.padding)
        return difference

    def trial_outputs(self, samples: Samples, arrays: Arrays) -> Iterator[tuple[Batch, Outputs, Outputs]]:
        """Batches with the outputs of trial weights and the original's; without weights, the original's twice."""
        for batch, reference in self.reference(samples):
            yield batch, (self.trial.run({**batch.feeds, **arrays}) if arrays else reference), reference

    def capture_session(self, taps: Sequence[Tap]) -> Session:
        """The original model with these taps' values as outputs."""
        return self.session(probe_model(self.model, list(dict.fromkeys(tap.value for tap in taps))))


def _waves(weights: Sequence[Weight], cost: Callable[[Iterable[Tap]], int], room: int) -> tuple[tuple[Tap, ...], ...]:
    """Taps in graph order, cut into runs that fit; all taps of a weight stay together."""
    waves: list[dict[Tap, None]] = []
    for weight in weights:
        taps = dict.fromkeys(use.tap for use in weight.uses)
        # A tied weight's taps may lie in several waves already: those become one.
        joined = [wave for wave in waves if wave.keys() & taps.keys()]
        if joined:
            together = {tap: None for wave in joined for tap in wave} | taps
            waves = [wave for wave in waves if wave not in joined] + [together]
        elif waves and cost(waves[-1] | taps) <= room:
            waves[-1] |= taps
        else:
            waves.append(taps)
    return tuple(tuple(wave) for wave in waves)


def open_model(source: str | Path | onnx.ModelProto, settings: Settings) -> tuple[ModelFile, list[Weight], list[Skip]]:
    """Loads a model and finds its weights, and what is left alone with the reason.

    Raises:
        InputError: The model cannot be used, or a pattern matches nothing.
    """
    model = ModelFile.load(source)
    selection = Selection(settings.nodes_to_include, settings.nodes_to_exclude, settings.op_types)
    weights, skips = discover(model, selection)
    return model, weights, skips


def open_workbench(
    model: ModelFile, weights: Sequence[Weight], settings: Settings, progress: Progress = SILENT
) -> Workbench:
    """A workbench as the settings say.

    Raises:
        DeviceError: The device cannot be had.
    """
    return Workbench(
        model,
        weights,
        resolve_device(settings.device, settings.providers),
        batch_size=settings.batch_size,
        max_memory=settings.max_memory,
        custom_op_library=settings.custom_op_library,
        progress=progress,
    )


def _free_memory() -> int:
    """Bytes of memory that can be had now; unlimited where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**62


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
