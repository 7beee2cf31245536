"""One model on one device, ready for experiments: capture statistics, run trial weights, compare with the original.

Trials never touch a file: one session has the weights as overridable inputs, and each trial feeds its own. A model with
gigabytes of external data has one session open at a time; its weights, old and new, stay in files that are mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.mapped import MappedStore
from onnx_optshift.capture.session import Device, Session, resolve_device
from onnx_optshift.capture.stream import stream
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.tensors import all_tensors, is_external, raw_size
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.layers import Arrays, Statistics, Waves
from onnx_optshift.memory import DEFAULT_BATCH_SIZE, KEPT_OUTPUT_BYTES, Costs, MemoryPlan, make_plan
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.settings import Settings
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import observe, to_rows
from onnx_optshift.verify.compare import OutputsDifference

if TYPE_CHECKING:
    import onnx

Outputs = dict[str, NDArray[Any]]

# External data from this size on is never copied: one session at a time maps it, without packed copies of its own.
LARGE_MODEL = 2**30
# Rows that are in float64 at the same time where two captures are multiplied.
ROWS_AT_ONCE = 8192


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
        self._max_memory = max_memory
        self._custom_op_library = custom_op_library
        self._waves: tuple[tuple[Tap, ...], ...] = ()
        self._kept: dict[str, list[tuple[Batch, Outputs]]] = {}
        self._sessions: dict[str, Session] = {}
        self._store = MappedStore()

    @cached_property
    def external(self) -> int:
        """Bytes of the model's external data."""
        return sum(raw_size(tensor) for tensor in all_tensors(self.model.proto) if is_external(tensor))

    @property
    def large(self) -> bool:
        """Whether the weights stay in their file: opening a session takes no time then, and only one is open."""
        return self.external >= LARGE_MODEL

    def session(self, model: bytes | Path | None = None, **options: Any) -> Session:
        """A session on the original, on another file, or on bytes whose external data is the original's."""
        if self.large:
            self.rest()
            options = {"prepack": False, **options}
        if model is None:
            model = self.model.path or probe_model(self.model, ())
        folder = self.model.folder if isinstance(model, bytes) else None
        return Session(model, self.device, folder=folder, custom_op_library=self._custom_op_library, **options)

    @property
    def original(self) -> Session:
        """The original model, as a user runs it."""
        if "original" not in self._sessions:
            self._sessions["original"] = self.session()
        return self._sessions["original"]

    @property
    def trial(self) -> Session:
        """The original model with the weights as overridable inputs."""
        if "trial" not in self._sessions:
            names = [weight.name for weight in self.weights]
            self._sessions["trial"] = self.session(probe_model(self.model, (), names))
        return self._sessions["trial"]

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of the size of weights or outputs, to be held for long: in a file where the model is large."""
        return self._store.keep(array) if self.large else array

    def rest(self) -> None:
        """Lets go of all that a large model holds between passes: its session, and pages of its files."""
        if self.large:
            self._sessions.clear()
            self._store.let_go()
            with suppress(OSError, AttributeError):  # glibc keeps what was freed, for the next time
                ctypes.CDLL(None).malloc_trim(0)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Distinct inputs of all weights."""
        return tuple(dict.fromkeys(use.tap for weight in self.weights for use in weight.uses))

    def plan(self, samples: Samples, *, parts: int = 1, metric: bool = False) -> MemoryPlan:
        """Predicts peak memory from one real run of the first sample, and fixes the batch size.

        Args:
            samples: Calibration data.
            parts: How many disjoint parts of the data get statistics of their own.
            metric: Whether every input is to be weighed by a d x d matrix of its own.

        Returns:
            The plan; `batch_size` of this workbench follows it.

        Raises:
            InputError: Even one sample at a time would not fit.
        """
        values, rows = self._measure(samples)
        costs = Costs(
            external=self.external,
            inline=self.model.size - self.external,
            values=values,
            outputs=self._output_bytes(samples),
            rows=rows,
            samples=len(samples),
            parts=parts,
            metric=metric,
            apart=self.large,
        )
        plan, self._waves = make_plan(costs, self.weights, self._asked_batch_size, self._max_memory)
        self.batch_size = plan.batch_size
        return plan

    def _output_bytes(self, samples: Samples) -> int:
        """Bytes of the outputs for the first sample."""
        (batch,) = samples.select(np.arange(1)).batches(1)
        outputs = self.original.run(batch.feeds)
        self.rest()
        return sum(value.nbytes for value in outputs.values()) // (len(batch.indices) + batch.padding)

    def drop_unstackable(self, samples: Samples) -> tuple[Skip, ...]:
        """Leaves out weights whose input, inside a Loop or Scan, cannot be stacked over the iterations.

        Args:
            samples: Calibration data, of which the first sample is tried.

        Returns:
            What was left out, with the reason.
        """
        looped = [w for w in self.weights if any(use.tap.inside and use.tap.inside.loops for use in w.uses)]
        if not looped:
            return ()
        (first,) = samples.select(np.arange(1)).batches(1)
        self.original.run(first.feeds)  # what the model itself cannot run is no matter of capture
        if self._captures(looped, first):
            return ()
        skips: list[Skip] = []
        for weight in looped:
            if not self._captures([weight], first):
                use = weight.uses[0]
                reason = (
                    "its input inside a Loop or Scan cannot be stacked over the iterations: "
                    "its shape changes in between, or is not known to ONNX Runtime"
                )
                skips.append(Skip(weight.name, use.node, use.op_type, reason))
        left = {skip.weight for skip in skips}
        self.weights = tuple(weight for weight in self.weights if weight.name not in left)
        return tuple(skips)

    def _captures(self, weights: Sequence[Weight], batch: Batch) -> bool:
        """Whether the inputs of these weights can be captured on a batch that the original model runs."""
        taps = tuple(dict.fromkeys(use.tap for weight in weights for use in weight.uses))
        try:
            stream(self.capture_session(taps), taps, [batch], lambda *_: None)
        except InputError:
            return False
        return True

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
        return self.in_waves(lambda taps: self._collect(taps, samples, stage))

    def in_waves(self, measure: Callable[[Sequence[Tap]], Mapping[Tap, InputMoments]]) -> Statistics:
        """What a measurement gives for every tap: at once, or for each wave of the plan when it is asked for."""
        return measure(self.taps) if len(self._waves) <= 1 else Waves(self._waves, measure)

    def _collect(self, taps: Sequence[Tap], samples: Samples, stage: str) -> dict[Tap, InputMoments]:
        statistics = {tap: InputMoments(tap.groups, tap.width, self.device.solve) for tap in taps}

        def sink(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
            observe(statistics[tap], tap, activation)

        session = self.capture_session(taps)
        with self.progress.stage(stage, len(samples)) as advance:
            stream(session, taps, samples.batches(self.batch_size), sink, done=advance)
        del session  # before what it has freed is given back
        self.rest()
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
        session = self.session(probe_model(self.model, taps, names))

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
        if kept is None and self.large and self._room_for_outputs(samples):
            # All of them first: what the caller runs on each batch needs a session of its own.
            kept = self._kept[samples.fingerprint] = list(self._reference(samples))
            self.rest()
        if kept is not None:
            yield from kept
            return
        keep: list[tuple[Batch, Outputs]] | None = []
        held = 0
        for batch, outputs in self._reference(samples):
            held += sum(value.nbytes for value in outputs.values())
            held += sum(value.nbytes for value in batch.feeds.values())
            if keep is not None:
                keep.append((batch, outputs))
                if held > KEPT_OUTPUT_BYTES:
                    keep = None
            yield batch, outputs
        if keep is not None:
            self._kept[samples.fingerprint] = keep

    def _room_for_outputs(self, samples: Samples) -> bool:
        """Whether the original's outputs on all samples leave half of the disk's free space."""
        return 2 * len(samples) * self._output_bytes(samples) < self._store.free_space()

    def _reference(self, samples: Samples) -> Iterator[tuple[Batch, Outputs]]:
        for batch in samples.batches(self.batch_size):
            outputs = self.original.run(batch.feeds)
            yield batch, {name: self.keep(value) for name, value in outputs.items()}

    def deviation(
        self,
        samples: Samples,
        arrays: Mapping[str, NDArray[np.generic]],
        other: Callable[[], Session] | None = None,
    ) -> OutputsDifference:
        """How far outputs with these weights are from the original's.

        Args:
            samples: The data.
            arrays: Trial weights by initializer name.
            other: Opens another session to run instead of trial weights: a written file, or a noise run.
        """
        difference = OutputsDifference()
        session: Session | None = None
        for batch, reference in self.reference(samples):
            if other is not None and session is None:
                session = other()  # not before the reference is there: it may need the place
            outputs = self.trial.run({**batch.feeds, **arrays}) if session is None else session.run(batch.feeds)
            difference.update(outputs, reference, len(batch.indices) + batch.padding)
        self.rest()
        return difference

    def trial_outputs(self, samples: Samples, arrays: Arrays) -> Iterator[tuple[Batch, Outputs, Outputs]]:
        """Batches with the outputs of trial weights and the original's; without weights, the original's twice."""
        for batch, reference in self.reference(samples):
            yield batch, (self.trial.run({**batch.feeds, **arrays}) if arrays else reference), reference
        self.rest()

    def capture_session(self, taps: Sequence[Tap]) -> Session:
        """The original model with these taps' values as outputs."""
        return self.session(probe_model(self.model, taps))


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
