"""One model on one device, ready for experiments: sessions, outputs, and captures of what flows into its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

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
from onnx_optshift.run.budget import DEFAULT_BATCH_SIZE, KEPT_OUTPUT_BYTES, Costs
from onnx_optshift.run.checkpoint import Checkpoint, Pass, content, digest
from onnx_optshift.run.outputs import Outputs
from onnx_optshift.run.ownership import owners_of, to_owners
from onnx_optshift.run.sessions import Sessions
from onnx_optshift.run.spanning import Spanning
from onnx_optshift.run.world import ALONE, World
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.row_weights import RowRule
from onnx_optshift.stats.rows import observe

UNSTACKABLE = (
    "its input inside a Loop or Scan cannot be stacked over the iterations: "
    "its shape changes in between, or is not known to ONNX Runtime"
)


@dataclass(frozen=True)
class Bench:
    """Everything that experiments on one model need; valid as it is."""

    model: ModelFile  # the original
    weights: tuple[Weight, ...]  # those that may move, in graph order
    device: Device
    sessions: Sessions
    batch_size: int = DEFAULT_BATCH_SIZE  # samples per run
    kept_bytes: int = KEPT_OUTPUT_BYTES  # of the original's outputs, in memory
    progress: Progress = SILENT  # where long passes report to
    waves: tuple[tuple[Tap, ...], ...] = ()  # taps that are captured and solved together: all, unless stated
    rows: Mapping[Tap, int] = field(default_factory=dict)  # that one sample gives each tap, where that was measured
    rules: Mapping[str, RowRule] = field(default_factory=dict)  # how rows are weighed, by the name that taps give
    products: torch.dtype = torch.float64  # in which products of rows are taken
    every: Mapping[Tap, int] = field(default_factory=dict)  # of so many patches one is taken; all where not given
    checkpoint: Checkpoint = field(default_factory=Checkpoint)  # what former runs have finished
    world: World = ALONE  # the processes that share the samples and the layers

    def __post_init__(self) -> None:
        if self.weights and not self.waves:
            object.__setattr__(self, "waves", (self.taps,))

    @classmethod
    def open(
        cls,
        model: ModelFile,
        weights: Sequence[Weight],
        device: Device,
        custom_op_library: str | None = None,
        world: World = ALONE,
        **options: Any,
    ) -> Bench:
        """A bench with sessions of its own."""
        sessions = Sessions(model, device, custom_op_library, world.threads)
        return cls(model, tuple(weights), device, sessions, world=world, **options)

    @cached_property
    def outputs(self) -> Outputs:
        """Outputs of the original and of trials."""
        names = [weight.name for weight in self.weights]
        return Outputs(self.sessions, names, self.batch_size, self.kept_bytes, self.world)

    @cached_property
    def owners(self) -> Mapping[Tap, int]:
        """The process that solves what reads a tap."""
        return owners_of(self.weights, self.waves, self.world.size)

    def without(self, names: Collection[str | None]) -> Bench:
        """The same model with fewer weights that may move."""
        return replace(self, weights=tuple(w for w in self.weights if w.name not in names), waves=())

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Distinct inputs of all weights."""
        return taps_of(self.weights)

    def statistics(self, samples: Samples, stage: str = "capture", spanning: Spanning | None = None) -> StatisticsStore:
        """Moments of every tap over these samples, or until they span; captured when a wave is loaded."""
        rows = {tap: count * len(samples) for tap, count in self.rows.items()}
        return StatisticsStore(self.waves, lambda taps: self.moments(taps, samples, stage, spanning), rows)

    def moments(
        self, taps: Sequence[Tap], samples: Samples, stage: str = "capture", spanning: Spanning | None = None
    ) -> Mapping[Tap, InputMoments]:
        """As `capture` gives them; from the checkpoint as far as that has them.

        Every process runs its share of the samples, and what it finds goes to the owner of each tap.
        """
        if not taps:
            return {}
        mine = self.outputs.share(samples)
        found = dict(
            self.checkpoint.moments(
                lambda: digest(self.key(taps, mine), "" if spanning is None else spanning.key),
                taps,
                lambda begun: self.capture(taps, mine, stage, spanning, begun),
                self.device.solve,
                self.products,
                spanning,
            )
        )
        with self.progress.stage(stage):
            return to_owners(self.world, found, self.owners)

    def capture(
        self,
        taps: Sequence[Tap],
        samples: Samples,
        stage: str = "capture",
        spanning: Spanning | None = None,
        begun: Pass | None = None,
    ) -> dict[Tap, InputMoments]:
        """Moments of these taps, in one streaming pass over the original model; where asked, until they span.

        A pass that was begun goes on.
        """
        begun = begun or Pass()
        moments = {tap: InputMoments(tap.groups, tap.width, self.device.solve, self.products) for tap in taps}
        moments.update(begun.moments)
        wanted = None
        if spanning is not None:
            wanted = partial(spanning.wanted, moments)
            if not begun.done:
                spanning.begin()
            elif not (taps := wanted()):
                return moments
        # Of the whole wave, whatever of it is wanted: of one session, every pass gives the same bits.
        session = self.sessions.probe(next((wave for wave in self.waves if set(moments) <= set(wave)), tuple(moments)))

        def sink(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
            # Each batch takes other patches than the last one: where on an image something is seen may matter.
            phase, rule = int(batch.indices[0]) // len(batch.indices), self.rules.get(tap.weighed)
            observe(moments[tap], tap, activation, rule, every=self.every.get(tap, 1), phase=phase)

        with self.progress.stage(stage, len(samples)) as advance:

            def done(rows: int) -> None:
                begun.added(moments)
                advance(rows)

            batches = samples.batches(self.batch_size)
            for batch in islice(batches, begun.done):
                advance(batch.rows)
            stream(session, taps, batches, sink, done=done, wanted=wanted)
        del session  # before what it has freed is given back
        self.sessions.rest()
        return moments

    def key(self, taps: Sequence[Tap], samples: Samples) -> str:
        """All that moments depend on besides the model, the place and the versions."""
        how = f"{self.batch_size} samples a batch, products in {self.products}"
        each = (f"{tap.key}, one of {self.every.get(tap, 1)}" for tap in taps)
        rules = (content(self.rules[tap.weighed].root) for tap in taps if tap.weighed in self.rules)
        return digest(samples.fingerprint, samples.arrangement, how, *each, *rules)

    def costs(self, samples: Samples, *, parts: int = 1, metric: bool = False) -> Costs:
        """What a plan for these samples is made from, by one run of the first."""
        sizes: dict[str, int] = {}
        rows: dict[Tap, int] = {}

        def sink(tap: Tap, batch: Batch, activation: torch.Tensor) -> None:
            sizes[tap.value] = activation.nbytes // len(batch.indices)
            moments = InputMoments(tap.groups, tap.width, self.device.solve)
            observe(moments, tap, activation)
            rows[tap] = max(1, moments.rows // len(batch.indices))

        (first,) = samples.select(np.arange(1)).batches(1)
        outputs = self.sessions.original().run(first.feeds)
        if self.taps:
            stream(self.sessions.probe(self.taps), self.taps, [first], sink)
        self.sessions.rest()
        return Costs(
            external=self.sessions.external,
            inline=self.model.size - self.sessions.external,
            values=sizes,
            outputs=sum(value.nbytes for value in outputs.values()) // (len(first.indices) + first.padding),
            rows=rows,
            samples=len(samples),
            parts=parts,
            metric=metric,
            apart=self.sessions.large,
        )

    def unstackable(self, samples: Samples) -> tuple[Skip, ...]:
        """Weights whose input, inside a Loop or Scan, cannot be stacked over the first sample's iterations."""
        looped = [w for w in self.weights if any(use.tap.inside and use.tap.inside.loops for use in w.uses)]
        if not looped:
            return ()
        (first,) = samples.select(np.arange(1)).batches(1)
        self.sessions.original().run(first.feeds)  # what the model itself cannot run is no matter of capture
        if self._captures(looped, first):
            return ()
        return tuple(
            Skip(weight.name, weight.uses[0].node, weight.uses[0].op_type, UNSTACKABLE)
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
