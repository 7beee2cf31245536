"""One memory budget that everything asks: what the process may take, on the host and on the solver's device.

The limit is the process's peak resident size, interpreter and libraries included. It is `--max-memory`, or a share of
what the system, or the container's control group, has free at the start.

A small model has its sessions open all along, and everything adds up. A large one has its weights in external data that
stays mapped, one session open at a time, and none while a layer is solved: the larger of the two counts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight

_logger = logging.getLogger(__name__)

# Large enough to keep matrix products efficient, small enough that one batch of activations stays modest.
DEFAULT_BATCH_SIZE = 32
# Share of the memory that is free at the start which a run may take when --max-memory does not say.
FREE_MEMORY_SHARE = 0.8
# Outputs of the original model are kept in memory up to this size, so that a run's peak does not grow with its samples;
# then in files up to the other one. Beyond both they are computed again on each pass.
KEPT_OUTPUT_BYTES = 16 * 2**20
KEPT_IN_FILES = 4 * 2**30
# What the process grows by whatever the model: kernels and thread pools of torch and ONNX Runtime, on first use.
LIBRARIES = 96 * 2**20
# Working sets, in multiples of what is factored and of the weight in float64.
FACTORING, SOLVING = 6, 5


@dataclass(frozen=True)
class Budget:
    """What a run may take, in bytes."""

    limit: int  # of the process's resident size at its peak
    used: int  # resident size when the run started: interpreter and libraries
    device: int | None  # memory of the GPU that solves; None where the host does
    asked: bool  # whether the user set the limit

    @classmethod
    def of(cls, max_memory: int | None, solve: str, sharing: int = 1) -> Budget:
        """The budget of this process, now; without a limit of the user's a share of what is free.

        Where several processes of a host are `sharing` its memory, each gets as much as the others.
        """
        used = psutil.Process().memory_info().rss + LIBRARIES
        limit = max_memory if max_memory is not None else used + int(FREE_MEMORY_SHARE * free_memory() / sharing)
        device = int(FREE_MEMORY_SHARE * torch.cuda.mem_get_info(solve)[0]) if solve.startswith("cuda") else None
        return cls(limit, used, device, max_memory is not None)

    @classmethod
    def least(cls, budgets: Sequence[Budget]) -> Budget:
        """What none of some processes lacks."""
        least = min(budgets, key=lambda budget: budget.limit - budget.used)
        devices = [budget.device for budget in budgets if budget.device is not None]
        return replace(least, device=min(devices, default=None))


@dataclass(frozen=True)
class Plan:
    """How a run keeps its budget, and the peak that is predicted from it, in bytes."""

    batch_size: int  # samples per run of the model
    waves: tuple[tuple[Tap, ...], ...]  # taps that are captured and solved together, one wave after the other
    kept: int  # outputs of the original that may be kept in memory
    predicted: int  # the process's resident size at its peak


@dataclass(frozen=True)
class Costs:
    """What a plan is made from, in bytes unless stated otherwise."""

    external: int  # external data of the model
    inline: int  # the model file
    values: Mapping[str, int]  # one sample of each tapped value, by name
    outputs: int  # one sample of all outputs of the model
    rows: Mapping[Tap, int]  # number that one sample gives each tap
    samples: int  # number of samples of calibration data
    parts: int  # how many disjoint parts of the data get statistics of their own
    metric: bool  # whether every input is weighed by a d x d matrix of its own
    apart: bool  # whether the model is large, and so has one session at a time

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
        """Outputs of the original that stay in memory; the others, and all of a large model, go to a file."""
        return 0 if self.apart else min(KEPT_OUTPUT_BYTES, self.outputs * self.samples)


def make_plan(
    costs: Costs, weights: Sequence[Weight], batch_size: int | None, budget: Budget, former: Plan | None = None
) -> Plan:
    """Fixes batch size and waves so that the predicted peak stays within the budget.

    Where nobody set a limit, the statistics of a large model take no more than the largest layer's working set: a run
    then needs little more than the model itself. Both stay as in a former plan where that would fit now.

    Raises:
        InputError: Even one layer and one sample at a time would not fit.
    """
    on_gpu = budget.device is not None
    solve = costs.solve(weights)
    model, kept = costs.model, costs.kept
    room = budget.limit - budget.used
    if kept > room - model:
        kept = 0  # computing outputs again costs time only
    most = solve if costs.apart and not budget.asked else room if budget.device is None else budget.device

    def peak(taps: Iterable[Tap], size: int) -> int:
        """On the host; what a GPU holds is not there."""
        held, solving = (0, 0) if on_gpu else (costs.held(taps), solve)
        running = model + kept + costs.running(taps) * size
        return held + (max(running, solving) if costs.apart else running + solving)

    def fits(taps: Iterable[Tap]) -> bool:
        held = costs.held(taps) + (solve if on_gpu else 0)
        return held <= most and peak(taps, batch_size or 1) <= room

    waves = _waves(weights, fits)
    size = batch_size or DEFAULT_BATCH_SIZE
    while batch_size is None and size > 1 and any(peak(wave, size) > room for wave in waves):
        size //= 2
    if former is not None and all(fits(wave) and peak(wave, former.batch_size) <= room for wave in former.waves):
        waves, size = former.waves, former.batch_size
    predicted = budget.used + max((peak(wave, size) for wave in waves), default=model + kept)
    activations = max((costs.running(wave) for wave in waves), default=0) * min(size, costs.samples)
    statistics = max((costs.held(wave) for wave in waves), default=0)
    where = " on the GPU" if on_gpu else ""
    parts = (
        f"process {_size(budget.used)}, model {_size(model)}, activations {_size(activations)}, kept outputs "
        f"{_size(kept)}, statistics {_size(statistics)}{where}, solver {_size(solve)}{where}"
    )
    asked = [("memory", predicted, budget.limit)]
    asked += [("memory of the GPU", statistics + solve, budget.device)] if budget.device is not None else []
    for what, needed, limit in asked:
        if needed > limit:
            raise InputError(
                f"{what}: predicted peak {_size(needed)} ({parts}) exceeds {_size(limit)}, one layer at a time. Raise "
                "--max-memory, lower --batch-size, or leave the widest layers out with --nodes-to-exclude."
            )
    _logger.info("memory: predicted peak %s (%s), passes %d", _size(predicted), parts, len(waves))
    return Plan(size, waves, kept, predicted)


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
    """Bytes of memory that this process can still get: from the system, or from its control group if that is less."""
    return min(int(psutil.virtual_memory().available), *_group_rooms(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))


def _group_rooms(root: Path, membership: Path) -> list[int]:
    """What the limits of this process's control groups (Linux, versions 2 and 1) leave; none where there are none."""
    rooms = [2**62]
    with suppress(OSError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in {"", "memory"}:
                continue
            limit, usage = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes",) * 2
            usage = usage if not controllers else "memory.usage_in_bytes"
            base = root if not controllers else root / "memory"
            folder = base / path.lstrip("/")
            # A container sees its own group at the root; outside of one, every group above limits too.
            for group in {base, folder, *(p for p in folder.parents if p.is_relative_to(base))}:
                rooms += _room(group / limit, group / usage, group / "memory.stat")
    return rooms


def _room(limit: Path, usage: Path, stat: Path) -> list[int]:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        most, now = int(limit.read_text()), int(usage.read_text())
        cached = 0  # pages of files, which the kernel gives back when asked
        with suppress(OSError, ValueError):
            lines = dict(line.split() for line in stat.read_text().splitlines())
            cached = int(lines.get("inactive_file", lines.get("total_inactive_file", 0)))
        return [max(0, most - now + cached)]
    return []


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
