"""One model on one device, ready for experiments: sessions, outputs, and captures of what flows into its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.device import Device
from onnx_optshift.capture.statistics import StatisticsStore
from onnx_optshift.capture.stream import stream
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.weights import Skip, Weight
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.run.budget import DEFAULT_BATCH_SIZE, KEPT_OUTPUT_BYTES, Plan
from onnx_optshift.run.outputs import Outputs
from onnx_optshift.run.sessions import Sessions
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import Weigh, observe


@dataclass(frozen=True)
class Measured:
    """What one run of the first sample tells."""

    values: Mapping[str, int]  # bytes of each tapped value, by name
    rows: Mapping[Tap, int]
    outputs: int  # bytes of the model's outputs


@dataclass(frozen=True)
class Bench:
    """Everything that experiments on one model need; valid as it is."""

    model: ModelFile  # the original
    weights: tuple[Weight, ...]  # those that may move, in graph order
    device: Device
    sessions: Sessions
    outputs: Outputs  # of the original and of trials
    batch_size: int  # samples per run
    waves: tuple[tuple[Tap, ...], ...]  # taps that are captured and solved together
    rows: Mapping[Tap, int]  # that one sample gives each tap, where that was measured
    progress: Progress  # where long passes report to
    rules: Mapping[str, Weigh] = field(default_factory=dict)  # how rows are weighed, by the name that taps give

    @classmethod
    def open(
        cls,
        model: ModelFile,
        weights: Sequence[Weight],
        device: Device,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        kept_bytes: int = KEPT_OUTPUT_BYTES,
        custom_op_library: str | None = None,
        progress: Progress = SILENT,
    ) -> Bench:
        """A bench whose layers are captured in one wave, and which keeps so many bytes of the original's outputs."""
        sessions = Sessions(model, device, custom_op_library)
        outputs = Outputs(sessions, [weight.name for weight in weights], batch_size, kept_bytes)
        waves = (taps_of(weights),) if weights else ()
        return cls(model, tuple(weights), device, sessions, outputs, batch_size, waves, {}, progress)

    def planned(self, plan: Plan, rows: Mapping[Tap, int]) -> Bench:
        """The same model under a plan."""
        names = [weight.name for weight in self.weights]
        outputs = Outputs(self.sessions, names, plan.batch_size, plan.kept)
        return replace(self, outputs=outputs, batch_size=plan.batch_size, waves=plan.waves, rows=rows)

    def without(self, names: set[str]) -> Bench:
        """The same model with fewer weights that may move."""
        weights = tuple(weight for weight in self.weights if weight.name not in names)
        outputs = Outputs(self.sessions, [w.name for w in weights], self.batch_size, KEPT_OUTPUT_BYTES)
        return replace(self, weights=weights, outputs=outputs, waves=(taps_of(weights),) if weights else ())

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Distinct inputs of all weights."""
        return taps_of(self.weights)

    def statistics(self, samples: Samples, stage: str = "capture") -> StatisticsStore:
        """Moments of every tap over these samples; captured when a wave is loaded."""
        rows = {tap: count * len(samples) for tap, count in self.rows.items()}
        return StatisticsStore(self.waves, lambda taps: self.capture(taps, samples, stage), rows)

    def capture(self, taps: Sequence[Tap], samples: Samples, stage: str = "capture") -> dict[Tap, InputMoments]:
        """Moments of these taps, in one streaming pass over the original model."""
        moments = {tap: InputMoments(tap.groups, tap.width, self.device.solve) for tap in taps}
        session = self.sessions.probe(taps)

        def sink(tap: Tap, _: Batch, activation: torch.Tensor) -> None:
            observe(moments[tap], tap, activation, self.rules.get(tap.weighed))

        with self.progress.stage(stage, len(samples)) as advance:
            stream(session, taps, samples.batches(self.batch_size), sink, done=advance)
        del session  # before what it has freed is given back
        self.sessions.rest()
        return moments

    def measure(self, samples: Samples) -> Measured:
        """Sizes of what one sample makes, from one run of the first sample."""
        sizes: dict[str, int] = {}
        rows: dict[Tap, int] = {}

        def sink(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
            sizes[tap.value] = activation.nbytes // len(batch.indices)
            moments = InputMoments(tap.groups, tap.width, self.device.solve)
            observe(moments, tap, activation)
            rows[tap] = max(1, moments.rows // len(batch.indices))

        (first,) = samples.select(np.arange(1)).batches(1)
        taps = self.taps
        if taps:
            stream(self.sessions.probe(taps), taps, [first], sink)
        outputs = self.sessions.original().run(first.feeds)
        self.sessions.rest()
        size = len(first.indices) + first.padding
        return Measured(sizes, rows, sum(value.nbytes for value in outputs.values()) // size)

    def unstackable(self, samples: Samples) -> tuple[Skip, ...]:
        """Weights whose input, inside a Loop or Scan, cannot be stacked over the first sample's iterations."""
        looped = [w for w in self.weights if any(use.tap.inside and use.tap.inside.loops for use in w.uses)]
        if not looped:
            return ()
        (first,) = samples.select(np.arange(1)).batches(1)
        self.sessions.original().run(first.feeds)  # what the model itself cannot run is no matter of capture
        if self._captures(looped, first):
            return ()
        reason = (
            "its input inside a Loop or Scan cannot be stacked over the iterations: "
            "its shape changes in between, or is not known to ONNX Runtime"
        )
        return tuple(
            Skip(weight.name, weight.uses[0].node, weight.uses[0].op_type, reason)
            for weight in looped
            if not self._captures([weight], first)
        )

    def _captures(self, weights: Sequence[Weight], batch: Batch) -> bool:
        """Whether the inputs of these weights can be captured on a batch that the original model runs."""
        taps = taps_of(weights)
        try:
            stream(self.sessions.probe(taps), taps, [batch], lambda *_: None)
        except InputError:
            return False
        return True


def taps_of(weights: Sequence[Weight]) -> tuple[Tap, ...]:
    """Distinct inputs of some weights."""
    return tuple(dict.fromkeys(use.tap for weight in weights for use in weight.uses))
