"""All choices of a user, frozen and checked: what each means, its unit, its default and why. No I/O."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict, TypeGuard

from onnx_optshift.errors import InputError, closest

OBJECTIVES = ("norm", "range", "curvature")
ROW_WEIGHTINGS = ("relative", "none")
RANGE_SCOPES = ("channel", "tensor")
RANGE_LEVELS = ("auto", "symmetric", "full")
RECAPTURES = ("auto", "always", "none")
MOST_BITS = 8
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
# The smallest whole number that a field takes, where that is not 1.
_LEAST = {"stochastic": 0, "seed": 0}


@dataclass(frozen=True)
class Settings:
    """Choices of one run. Lists are taken for tuples and a single string for a tuple of one.

    Attributes:
        tolerance: Relative deviation (Frobenius, no unit, 0 to 1) that the model's outputs may show on calibration
            data. 0, the default, is exact: equal up to the runtime's own noise, because a pass that changes outputs
            must be asked for. `"auto"` takes what serves held-out data best.
        objective: What is made small: `"norm"`, the default, the Frobenius norm; `"range"` the largest absolute
            weight of each output channel, which is what a quantizer scales by; `"curvature"` the Frobenius norm
            weighed by how far earlier weights move the layer's input.
        stochastic: None, the default, solves on all calibration rows. A number B solves exactly on a class-balanced
            batch of B samples instead; 0 lets held-out data choose B.
        nodes_to_include: Names, globs or `re:` patterns of nodes or initializers; empty, the default, takes all.
        nodes_to_exclude: The same for what to leave alone; wins over inclusion.
        op_types: Operators to take; empty, the default, takes all that are supported.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`. `"auto"`, the default, says what it took and why; CUDA that
            was asked for and cannot be had is an error.
        providers: ONNX Runtime execution providers in order of preference; empty, the default, follows `device`.
        allow_cpu_fallback: Whether single nodes may run on the CPU although a CUDA device was asked for by name; False,
            the default, makes them an error, since captures would be slower than they look.
        batch_size: Samples per run of the model; None, the default, chooses by memory.
        max_samples: Calibration samples to use at most; None, the default, takes all, as the promise covers them all.
        max_memory: Bytes that the process may take at its peak, interpreter and libraries included; None, the default,
            is a share of what is free at the start.
        seed: Of the held-out split, of draws and of random inputs. Fixed, 0, so that two runs give the same file.
        labels: Name of the labels' array in calibration and held-out data.
        input_shapes: Sizes of all axes of inputs that the model leaves free, `"images:1,3,320,320"` each, or a dict of
            them; they hold for random inputs and for data alike, and a leading size fixes the batch. Empty, the
            default, takes data as it comes, and tries usual sizes for random inputs.
        save_as_external_data: Whether weights go to a data file beside the model; False keeps the original's way,
            so that nothing changes but the shifted weights.
        dry_run: Whether everything runs except that no model is written.
        force: Whether to go on where a refusal that names this can be overridden, as fewer than 16 distinct samples;
            False, the default.
        heldout_fraction: Share of the calibration samples (0 to 1, exclusive) that judges where no held-out data is
            given. A fifth, the usual share of a five-fold split, leaves most rows to find the freedom with.
        custom_op_library: Shared library with the model's custom operators; None when it has none.
        quantization_bits: Bit widths (2 to 8) that the weights are going to be quantized to. The report gives each
            layer's output error under round-to-nearest at these; with the objective `"range"` none of them may come
            out worse on held-out data. Empty, the default, reports none, and takes 4 where the objective needs one.
        range_scope: What shares a scale of the quantizer, for the objective `"range"`: `"channel"`, the default, an
            output channel; `"tensor"` the whole weight.
        range_block: Consecutive inputs of a channel that share a scale, as 4-bit weight-only quantizers have it (32,
            64, 128); None, the default, for `range_scope`.
        range_levels: Levels that the largest weight of what shares a scale is given: `"symmetric"`, the same on both
            sides of 0 (-7 to 7 at 4 bits); `"full"`, one more on its own side (-8 to 7); `"auto"`, the default, as most
            quantizers have it: full in blocks, symmetric elsewhere.
        snap: Whether weights are put on the grid of the quantizer, so that round-to-nearest reproduces them, where the
            objective is `"range"`, one bit width is given and the tolerance leaves room; True, the default. Otherwise
            they are only made narrow for it.
        recapture: Whether layers are also solved one after the other, each for the inputs that it gets once those
            before it have moved, so that it makes up for them, where a tolerance leaves room; held-out data chooses.
            `"always"`, `"none"`, or `"auto"`, the default: where the model has few layers and the data is small, as
            it costs two runs of the data for each distinct input.
        row_weighting: `"relative"`, the default, counts every row's error relative to the row's own output, so that
            few rows of large outputs do not own the tolerance; `"none"` counts all rows alike. Exact shifts are the
            same either way.
        row_mask: Input `[batch, sequence]` of 0 and 1 whose zeros mark rows that the model ignores, such as padding:
            they are left out, and outputs are compared elsewhere. `"auto"`, the default, finds one by trying;
            `"none"` uses all rows.
        flatness: Random directions for each layer with which the loss's curvature is measured before and after; None,
            the default, measures none, as it takes three runs of the data for each.
        checkpoint: Folder that finished statistics and solutions are kept in, so that a run that was killed goes on
            where it was and gives the same bytes; made where it is missing. None, the default, keeps nothing.
        max_drift: For a comparison of two models: the largest share of a layer's output that the shift may change for
            nine in ten samples; None, the default, reports it only.

    Raises:
        InputError: A value cannot be used.
    """

    tolerance: float | Literal["auto"] = 0.0
    objective: str = "norm"
    stochastic: int | None = None
    nodes_to_include: tuple[str, ...] = ()
    nodes_to_exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()
    device: str = "auto"
    providers: tuple[str, ...] = ()
    allow_cpu_fallback: bool = False
    batch_size: int | None = None
    max_samples: int | None = None
    max_memory: int | None = None
    seed: int = 0
    labels: str = "labels"
    input_shapes: tuple[str, ...] = ()
    save_as_external_data: bool = False
    dry_run: bool = False
    force: bool = False
    heldout_fraction: float = 0.2
    custom_op_library: str | None = None
    quantization_bits: tuple[int, ...] = ()
    range_scope: str = "channel"
    range_block: int | None = None
    range_levels: str = "auto"
    snap: bool = True
    recapture: str = "auto"
    row_weighting: str = "relative"
    row_mask: str = "auto"
    flatness: int | None = None
    checkpoint: str | None = None
    max_drift: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.input_shapes, Mapping):
            shapes = self.input_shapes.items()
            texts = [f"{n}:{','.join(map(str, s)) if isinstance(s, (tuple, list)) else s}" for n, s in shapes]
            object.__setattr__(self, "input_shapes", texts)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise InputError(f"{field.name}: expected True or False, found {value!r}.")
            if field.type == "int" or (field.type == "int | None" and value is not None):
                value = _integer(field.name, value, _LEAST.get(field.name, 1))
            elif field.type == "tuple[str, ...]":
                value = _texts(field.name, value)
            # The one way to normalise a field of a frozen dataclass while it is being made.
            object.__setattr__(self, field.name, value)
        object.__setattr__(self, "tolerance", _tolerance(self.tolerance))
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", _path("checkpoint", self.checkpoint))
        if self.stochastic is not None and self.tolerance != 0:
            raise InputError(
                f"stochastic and tolerance {self.tolerance} contradict each other: the stochastic form is exact on its "
                "batch. Give one of them."
            )
        _check_known("objective", self.objective, OBJECTIVES)
        _check_known("row_weighting", self.row_weighting, ROW_WEIGHTINGS)
        _check_known("range_scope", self.range_scope, RANGE_SCOPES, "; for blocks give range_block")
        _check_known("recapture", self.recapture, RECAPTURES)
        if self.recapture == "always" and self.tolerance == 0:
            raise InputError(
                "recapture 'always' has nothing to make up for where layers keep their outputs. Give a tolerance too."
            )
        _check_known("range_levels", self.range_levels, RANGE_LEVELS)
        if self.range_scope == "tensor" and self.range_block is not None:
            raise InputError(
                f"range_scope 'tensor' and range_block {self.range_block} contradict each other: a scale is shared by "
                "the whole weight or by a block of it. Give one of them."
            )
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise InputError(
                f"device: expected auto, cpu, cuda or cuda:N with a device number N, found {self.device!r}."
                f"{_close_device(self.device)}"
            )
        if not isinstance(self.labels, str) or not self.labels:
            raise InputError(f"labels: expected the name of an array, found {self.labels!r}.")
        bits = (self.quantization_bits,) if isinstance(self.quantization_bits, int) else tuple(self.quantization_bits)
        object.__setattr__(self, "quantization_bits", tuple(_integer("quantization_bits", b, 2) for b in bits))
        if any(value > MOST_BITS for value in self.quantization_bits):
            raise InputError(f"quantization_bits: expected numbers from 2 to {MOST_BITS}, found {bits!r}.")
        if self.objective != "range":
            self._refuse_ignored()
        if self.max_drift is not None and not _in_range(self.max_drift, 0, math.inf):
            raise InputError(f"max_drift: expected a number of at least 0, found {self.max_drift!r}. Try 0.3.")
        if self.max_drift is not None and self.tolerance != 0:
            raise InputError(
                f"max_drift and tolerance {self.tolerance} are two questions: with a limit of drift the outputs' "
                "deviation is reported only. Give one of them, and compare again for the other."
            )
        if not _in_range(self.heldout_fraction, 0, 1) or self.heldout_fraction in {0, 1}:
            raise InputError(
                f"heldout_fraction: expected a number between 0 and 1, both excluded, found {self.heldout_fraction!r}. "
                "To judge on no held-out data, give 'none' as the held-out data."
            )

    def _refuse_ignored(self) -> None:
        # What nothing would ask for must not be dropped without a word.
        grid = [] if self.quantization_bits else ["range_scope", "range_block", "range_levels"]
        for name in (*grid, "snap"):
            if getattr(self, name) != getattr(Settings, name):
                needed = "the objective 'range'" + " or quantization_bits" * (name != "snap")
                shown = name if name != "snap" else "snap=False (--no-snap)"
                raise InputError(f"{shown} only has a meaning with {needed}. Give that too, or leave this out.")


class Choices(TypedDict, total=False):
    """The fields of `Settings` as keywords, for editors and type checkers."""

    tolerance: float | Literal["auto"]
    objective: Literal["norm", "range", "curvature"]
    stochastic: int | None
    nodes_to_include: str | Sequence[str]
    nodes_to_exclude: str | Sequence[str]
    op_types: str | Sequence[str]
    device: str
    providers: str | Sequence[str]
    allow_cpu_fallback: bool
    batch_size: int | None
    max_samples: int | None
    max_memory: int | None
    seed: int
    labels: str
    input_shapes: str | Sequence[str] | Mapping[str, Sequence[int]]
    save_as_external_data: bool
    dry_run: bool
    force: bool
    heldout_fraction: float
    custom_op_library: str | None
    quantization_bits: int | Sequence[int]
    range_scope: Literal["channel", "tensor"]
    range_block: int | None
    range_levels: Literal["auto", "symmetric", "full"]
    snap: bool
    recapture: Literal["auto", "always", "none"]
    row_weighting: Literal["relative", "none"]
    row_mask: str
    flatness: int | None
    checkpoint: str | os.PathLike[str] | None
    max_drift: float | None


def _in_range(value: object, least: float, most: float) -> TypeGuard[float]:
    """Whether something is a number in this range, which NaN is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and least <= float(value) <= most


def _path(name: str, value: object) -> str:
    if isinstance(value, (str, os.PathLike)) and isinstance(path := os.fspath(value), str) and path:
        return path
    raise InputError(f"{name}: expected a path, found {value!r}.")


def _tolerance(value: object) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if _in_range(value, 0, 1):
        return float(value)
    raise InputError(
        f"tolerance: expected 'auto' or a relative deviation from 0 (exact) to 1, found {value!r}. "
        "Try 0.01 for one per cent."
    )


def _check_known(name: str, value: object, known: tuple[str, ...], hint: str = "") -> None:
    if value not in known:
        listed = ", ".join(map(repr, known))
        close = closest(str(value), list(known))
        raise InputError(f"{name}: {value!r} is not known. Take one of {listed}{hint}.{close}")


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    hint = " Give 0 to have the batch size chosen." if name == "stochastic" else ""
    raise InputError(f"{name}: expected a whole number of at least {least}, found {value!r}.{hint}")


def _close_device(device: object) -> str:
    name = str(device).casefold()
    if "gpu" in name or "nvidia" in name:
        return " For a GPU take 'cuda'."
    return closest(name, ["auto", "cpu", "cuda", "cuda:0"])


def _texts(name: str, value: object) -> tuple[str, ...]:
    # A bare string is a sequence of letters to Python; nobody means that.
    items = (value,) if isinstance(value, str) else value
    if isinstance(items, (tuple, list)) and all(isinstance(item, str) and item for item in items):
        return tuple(items)
    raise InputError(f"{name}: expected names, found {value!r}.")
