"""The report as frozen data: `Report.to_dict()` is version 1 of the JSON schema, key for key.

Keys are added but neither renamed nor removed while `schema` is 1. A value that was not measured is null; a figure
that was measured and is not finite is one of the strings "NaN", "Infinity" and "-Infinity", since JSON has no numbers
for them and the two cases must stay apart.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from os import PathLike, fspath
from typing import Any

SCHEMA = 1
STATUSES = ("shifted", "unchanged", "rejected", "skipped")


@dataclass(frozen=True)
class ToolInfo:
    """Versions of what took part, None for what was not loaded; the command line and when it ended, in UTC.

    `command` and `finished` are None where the tool was called from Python.
    """

    version: str
    python: str | None = None
    onnx: str | None = None
    onnxruntime: str | None = None
    torch: str | None = None
    numpy: str | None = None
    command: str | None = None
    finished: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The model before and after.

    Attributes:
        input: Path of the original, or what it was given as.
        output: Path of the written model; None when none was written.
        sha256_in: Of the original file.
        sha256_out: Of the written file.
        opset: Version of the default operator set.
        ir_version: Of the ONNX format.
    """

    input: str
    output: str | None = None
    sha256_in: str | None = None
    sha256_out: str | None = None
    opset: int | None = None
    ir_version: int | None = None


@dataclass(frozen=True)
class DeviceInfo:
    """What ran where.

    Attributes:
        requested: As asked for.
        capture: ONNX Runtime execution provider that ran the model.
        solve: torch device of statistics and solvers.
        note: One line that says so, and why.
    """

    requested: str
    capture: str
    solve: str
    note: str = ""


@dataclass(frozen=True)
class DataInfo:
    """A set of samples.

    Attributes:
        source: Where it comes from.
        samples: How many.
        synthetic: Whether they are seeded random inputs.
        classes: Number of distinct labels; None without labels.
        fingerprint: Digest of the content.
        notes: What was noticed while reading, a sentence each.
        split: Whether it was split off the calibration data.
    """

    source: str
    samples: int
    synthetic: bool
    classes: int | None = None
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()
    split: bool = False


@dataclass(frozen=True)
class FrontierPoint:
    """What one layer would give at a residual tolerance: its norm and range as shares of the original's."""

    tolerance: float
    norm_ratio: float | None
    range_ratio: float | None


@dataclass(frozen=True)
class LayerReport:
    """One weight with all its uses, or one node that was skipped. Figures are None where nothing was solved.

    Attributes:
        name: The initializer, or the node of a skip that has none.
        node: The first node that uses it.
        op_type: That node's operator.
        weight: The initializer; None for a skip that has none.
        status: shifted, unchanged, rejected or skipped.
        reason: Why, in a sentence.
        d: Input width.
        m: Output width.
        groups: Independent problems in one weight: the groups of a convolution.
        rows: Calibration rows that met it.
        rank: Directions of the input that matter; `d - rank` are free. Of the group that has fewest.
        tolerance: Relative residual that the layer was allowed.
        norm_before: Frobenius norm of the original.
        norm_after: Frobenius norm of what was written.
        range_before: Largest absolute weight.
        range_after: Largest absolute weight of what was written.
        predicted_residual: ||A(W - V)||_F / ||AV||_F of the solution, from the statistics.
        measured_residual: The same of what was written, after rounding.
        curvature_ratio: tr(WᵀMW) / tr(VᵀMV) of what was written, for the objective "curvature"; None where the plain
            norm was made small.
        frontier: What other tolerances would give.
        spectrum: Singular values of the rows, as shares of the largest, from the first direction to the d-th in equal
            steps; 0 where no row points. A plateau that ends in a cliff means that rank and freedom are clear-cut.
        seconds: Time spent on this layer.
        dtype: Element type of the initializer.
        uses: All nodes that use it.
    """

    name: str
    node: str
    op_type: str
    weight: str | None
    status: str
    reason: str
    d: int | None = None
    m: int | None = None
    groups: int | None = None
    rows: int | None = None
    rank: int | None = None
    tolerance: float | None = None
    norm_before: float | None = None
    norm_after: float | None = None
    range_before: float | None = None
    range_after: float | None = None
    predicted_residual: float | None = None
    measured_residual: float | None = None
    curvature_ratio: float | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    spectrum: tuple[float, ...] = ()
    seconds: float | None = None
    dtype: str | None = None
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputComparison:
    """One model output, original against written file.

    Attributes:
        name: Of the output.
        max_abs: Largest absolute difference.
        max_rel: Largest relative difference of a sample.
        rel: Relative Frobenius difference over all samples.
        top1_agreement: Share of rows with the same argmax; None where that means nothing.
        samples: How many were compared.
        bound: What `rel` may be at most.
        passed: Whether the output kept its bounds.
    """

    name: str
    max_abs: float
    max_rel: float
    rel: float
    top1_agreement: float | None
    samples: int
    bound: float
    passed: bool


@dataclass(frozen=True)
class NoiseFloor:
    """How much runs of the original model differ that should agree.

    Attributes:
        max_rel: Largest relative difference of a sample, over outputs and runs.
        rel: Largest relative Frobenius difference, over outputs and runs.
        rounding: Largest relative difference of a sample when every weight in question moves by one unit in the
            last place; None when none was to move.
        runs: What the runs did otherwise.
        samples: How many samples were run.
        batch_size: Samples per run.
        other_batch_size: Largest relative difference of a sample when run one by one; beside the floor, not part of
            it. None where the batch size is fixed.
    """

    max_rel: float
    rel: float
    rounding: float | None
    runs: tuple[str, ...]
    samples: int
    batch_size: int
    other_batch_size: float | None


@dataclass(frozen=True)
class Verification:
    """The proof on the written file.

    Attributes:
        passed: Whether every output kept its bounds.
        outputs: One comparison for each output.
        noise_floor: What the bounds are made from; None where nothing was run.
        attempts: Candidates that were written and compared.
        reverted: Initializers that were put back on the way.
        identical_bytes: Whether the written file is a byte-for-byte copy, which proves the outputs without running
            them; `outputs` is then empty where there was no data to run.
    """

    passed: bool
    outputs: tuple[OutputComparison, ...]
    noise_floor: NoiseFloor | None
    attempts: int = 1
    reverted: tuple[str, ...] = ()
    identical_bytes: bool = False


@dataclass(frozen=True)
class Score:
    """A model on held-out data: mean loss, top-1 accuracy (0 to 1, None without labels), number of samples."""

    loss: float
    top1: float | None
    n: int


@dataclass(frozen=True)
class Trial:
    """One candidate before the gate.

    Attributes:
        what: What was tried.
        tolerance: Relative residual that each layer was allowed.
        loss: Mean loss.
        top1: Top-1 accuracy, 0 to 1.
        mean_difference: Mean over samples of the loss minus the original's.
        standard_error: Of that mean.
        accepted: Whether the gate let it through.
        reason: Why or why not.
    """

    what: str
    tolerance: float
    loss: float
    top1: float | None
    mean_difference: float
    standard_error: float
    accepted: bool
    reason: str


@dataclass(frozen=True)
class HeldoutResult:
    """Held-out data before and after, the name of the loss, and every candidate that was tried."""

    before: Score
    after: Score
    accepted: bool
    loss_name: str
    tried: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds of wall clock by stage; the total has the rest as well."""

    capture: float
    solve: float
    verify: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run found, decided and measured. Fields as in the JSON report.

    `warnings` are for the user to act on; `decisions` say which ways were tried and which was taken.
    """

    schema: int = field(default=SCHEMA, init=False)
    tool: ToolInfo
    model: ModelInfo
    settings: Mapping[str, Any]
    device: DeviceInfo
    calibration: DataInfo | None
    heldout: DataInfo | None = None
    layers: tuple[LayerReport, ...] = ()
    verification: Verification | None = None
    heldout_result: HeldoutResult | None = None
    quantization: tuple[Mapping[str, Any], ...] | None = None
    flatness: Mapping[str, Any] | None = None
    collapse: Mapping[str, Any] | None = None
    drift: Mapping[str, Any] | None = None
    timing: Timing
    peak_memory_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values only: dicts, lists, strings, finite numbers, booleans and None."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: object) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, PathLike):
        return fspath(value)
    raise TypeError(f"the report has a value that JSON cannot hold: {type(value).__name__} {value!r}")
