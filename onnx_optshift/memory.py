"""Peak memory, predicted before the run: what each stage holds, and in how many parts the layers go through.

A small model has its sessions open all along, and everything adds up. A large one has its weights in external data that
stays mapped, one session open at a time, and none while a layer is solved: the larger of the two counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight

_logger = logging.getLogger(__name__)

# Large enough to keep matrix products efficient, small enough that one batch of activations stays modest.
DEFAULT_BATCH_SIZE = 32
# Share of the memory that is free at the start which a run may take when --max-memory does not say.
FREE_MEMORY_SHARE = 0.8
# Outputs of the original model are kept up to this size, and computed again on each pass beyond it.
KEPT_OUTPUT_BYTES = 512 * 2**20

# Working sets, in multiples of what is factored and of the weight in float64.
FACTORING, SOLVING = 6, 5


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory, in bytes, and the batch size that keeps it.

    Attributes:
        batch_size: Samples per run of the model.
        model: The model as parsed and serialized, and in its sessions.
        activations: One batch of tapped activations, and as much again inside ONNX Runtime; its outputs as they are
            compared; and the original's outputs, as far as they are kept in memory.
        statistics: Moments of the taps that are held at a time, and their factorizations.
        solve: The largest layer's working set.
        budget: What the sum must not exceed.
        waves: Parts of the model's layers that are captured and solved one after the other; 1 where all fit at once.
        apart: Whether no session is open while a layer is solved.
    """

    batch_size: int
    model: int
    activations: int
    statistics: int
    solve: int
    budget: int
    waves: int
    apart: bool = False

    @property
    def predicted(self) -> int:
        """Predicted peak in bytes, on top of the interpreter and its libraries."""
        return self.statistics + together(self.model + self.activations, self.solve, self.apart)


@dataclass(frozen=True)
class Costs:
    """What a plan is made from, in bytes unless stated otherwise.

    Attributes:
        external: External data of the model.
        inline: The model file.
        values: One sample of each tapped value, by name.
        outputs: One sample of all outputs of the model.
        rows: Rows that one sample gives each tap.
        samples: Number of samples of calibration data.
        parts: How many disjoint parts of the data get statistics of their own.
        metric: Whether every input is weighed by a d x d matrix of its own.
        apart: Whether the model is large, and so has one session at a time.
    """

    external: int
    inline: int
    values: Mapping[str, int]
    outputs: int
    rows: Mapping[Tap, int]
    samples: int
    parts: int
    metric: bool
    apart: bool

    @property
    def model(self) -> int:
        """The model in all its copies."""
        weights = self.external + self.inline
        metric = 2 * weights if self.metric else 0  # all weights on two sides
        if self.apart:
            # Parsed here and in the runtime, serialized in between; the weights once, wherever they are read from.
            return weights + 3 * self.inline + metric
        # Inline weights exist as the parsed file, its serialized probe and in two sessions; external ones only there.
        return 2 * weights + 2 * self.inline + metric

    def solve(self, weights: Iterable[Weight]) -> int:
        """The largest layer's working set."""
        largest = 0
        for w in weights:
            # Rows that are fewer than d are factored themselves: no d x d matrix then.
            rank = min(w.d, self.samples * sum(self.rows[use.tap] for use in w.uses))
            # Measured: a factorization takes 5 times its result; then come V, W, W as rounded, a product, and UᵀV.
            factored, solved = FACTORING * w.d * rank, SOLVING * w.d * w.m + rank * w.m
            # What becomes of the widest metric on its way comes on top.
            widest = 5 * w.d**2 if self.metric else 0
            largest = max(largest, 8 * w.groups * (max(factored, solved) + widest))
        return largest

    def held(self, taps: Iterable[Tap]) -> int:
        """Statistics of these taps over all samples."""
        taps = tuple(taps)
        # A factorization is as large as the moments it is made from.
        moments = sum(8 * tap.groups * tap.width * min(tap.width, self.rows[tap] * self.samples) for tap in taps)
        # A metric is kept as it came, and for each part as its factor and as the rows seen through it.
        metrics = sum(8 * tap.groups * tap.width**2 for tap in taps) if self.metric else 0
        return (3 if self.metric else 2) * self.parts * moments + (1 + self.parts) * metrics

    def running(self, taps: Iterable[Tap]) -> int:
        """One sample in flight."""
        tapped = sum(self.values[value] for value in {tap.value for tap in taps})
        # Computed, and beside it what it is compared with.
        return (4 if self.metric else 2) * tapped + 2 * self.outputs

    @property
    def kept(self) -> int:
        """Outputs of the original that stay in memory; those of a large model go to a file."""
        return 0 if self.apart else min(KEPT_OUTPUT_BYTES, self.outputs * self.samples)


def make_plan(
    costs: Costs, weights: Sequence[Weight], batch_size: int | None, max_memory: int | None
) -> tuple[MemoryPlan, tuple[tuple[Tap, ...], ...]]:
    """Fixes batch size and waves so that the predicted peak stays within the budget.

    Where --max-memory does not say, the statistics of a large model take no more than the largest layer's working set:
    a run then needs little more than the model itself.

    Args:
        costs: Of the model and its data.
        weights: The weights that may move, in graph order.
        batch_size: As asked for; None chooses.
        max_memory: Bytes that the run may take; None for a share of what is free.

    Returns:
        The plan, and the taps of each wave.

    Raises:
        InputError: Even one layer and one sample at a time would not fit.
    """
    budget = max_memory if max_memory is not None else int(FREE_MEMORY_SHARE * free_memory())
    model, solve = costs.model + costs.kept, costs.solve(weights)
    most = solve if costs.apart and max_memory is None else budget

    def fits(taps: Iterable[Tap]) -> bool:
        held, running = costs.held(taps), costs.running(taps) * (batch_size or 1)
        return held <= most and held + together(model + running, solve, costs.apart) <= budget

    waves = _waves(weights, fits)
    statistics = max((costs.held(wave) for wave in waves), default=0)
    per_sample = max((costs.running(wave) for wave in waves), default=0)
    size = batch_size or DEFAULT_BATCH_SIZE
    if batch_size is None and per_sample > 0:
        room = budget - statistics - model - (0 if costs.apart else solve)
        size = max(1, min(size, room // per_sample))
    activations = per_sample * min(size, costs.samples) + costs.kept
    plan = MemoryPlan(size, costs.model, activations, statistics, solve, budget, len(waves), costs.apart)
    parts = (
        f"model {_size(plan.model)}, activations {_size(plan.activations)}, statistics {_size(plan.statistics)}, "
        f"solver {_size(plan.solve)}"
    )
    if plan.predicted > plan.budget:
        raise InputError(
            f"memory: predicted peak {_size(plan.predicted)} ({parts}) exceeds {_size(plan.budget)}, one layer at a "
            "time. Raise --max-memory, lower --batch-size, or leave the widest layers out with --nodes-to-exclude."
        )
    _logger.info("memory: predicted peak %s (%s), passes %d", _size(plan.predicted), parts, plan.waves)
    return plan, waves


def together(running: int, solving: int, apart: bool) -> int:
    """Peak of two stages: the larger one where they never overlap, else their sum."""
    return max(running, solving) if apart else running + solving


def _waves(weights: Sequence[Weight], fits: Callable[[Iterable[Tap]], bool]) -> tuple[tuple[Tap, ...], ...]:
    """Taps in graph order, cut into runs that fit; all taps of a weight stay together."""
    waves: list[dict[Tap, None]] = []
    for weight in weights:
        taps = dict.fromkeys(use.tap for use in weight.uses)
        # A tied weight's taps may lie in several waves already: those become one.
        joined = [wave for wave in waves if wave.keys() & taps.keys()]
        if joined:
            whole = {tap: None for wave in joined for tap in wave} | taps
            waves = [wave for wave in waves if wave not in joined] + [whole]
        elif waves and fits(waves[-1] | taps):
            waves[-1] |= taps
        else:
            waves.append(taps)
    return tuple(tuple(wave) for wave in waves)


def free_memory() -> int:
    """Bytes of memory that can be had now; unlimited where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**62


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
