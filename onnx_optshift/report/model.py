"""The report as frozen data: `Report.to_dict()` is version 1 of the JSON schema, key for key.

Keys are added but neither renamed nor removed while `schema` is 1. A value that was not measured is null; a figure
that was measured and is not finite is one of the strings "NaN", "Infinity" and "-Infinity", since JSON has no numbers
for them and the two cases must stay apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import fspath
from pathlib import Path
from typing import Any

from onnx_optshift.report.diagnosis import Diagnosis, Drift, FlatnessReport
from onnx_optshift.report.run_info import CheckpointInfo, DataInfo, DeviceInfo, ModelInfo, ToolInfo


@dataclass(frozen=True)
class FrontierPoint:
    """What one layer would give at a residual tolerance: its norm and range as shares of the original's."""

    tolerance: float
    norm_ratio: float | None
    range_ratio: float | None


@dataclass(frozen=True)
class Headline:
    """The figure that the objective makes small, before and after: the norm, the range, the weighted norm."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class LayerReport:
    """One weight with all its uses, or one node that was skipped. Figures are None where nothing was solved.

    Norms are Frobenius norms, ranges the largest absolute weight, residuals `||A(W - V)||_F / ||AV||_F`.
    """

    name: str  # the initializer, or the node of a skip that has none
    node: str  # the first node that uses it
    op_type: str
    weight: str | None  # the initializer; None for a skip that has none
    status: str  # shifted, unchanged, rejected or skipped
    reason: str  # why, in a sentence
    d: int | None = None  # input width
    m: int | None = None  # output width
    groups: int | None = None  # independent problems in one weight: the groups of a convolution
    rows: int | None = None  # calibration rows that met it
    rank: int | None = None  # input directions that matter; with groups their mean, rounded down, and 1 at least
    free: int | None = None  # input directions that do not, over all groups
    growing: bool | None = None  # whether more data would still raise the rank; None where that was not looked at
    tolerance: float | None = None  # residual that the layer was allowed
    norm_before: float | None = None
    norm_after: float | None = None
    range_before: float | None = None
    range_after: float | None = None
    predicted_residual: float | None = None  # of the solution, from the statistics
    measured_residual: float | None = None  # of what was written, after rounding
    curvature_ratio: float | None = None  # tr(WᵀMW) / tr(VᵀMV) of what was written; None for other objectives
    frontier: tuple[FrontierPoint, ...] = ()  # what other tolerances would give, on the objective's own path
    # Singular values of the rows, as shares of the largest, from the first direction to the d-th in equal steps; 0
    # where no row points. A plateau that ends in a cliff means that rank and freedom are clear-cut.
    spectrum: tuple[float, ...] = ()
    top_row_share: float | None = None  # of the output's energy, in 1 % of the rows; None where it was not looked at
    seconds: float | None = None
    dtype: str | None = None  # element type of the initializer
    uses: tuple[str, ...] = ()  # all nodes that use it
    headline: Headline | None = None


@dataclass(frozen=True)
class OutputComparison:
    """One model output, original against written file."""

    name: str
    max_abs: float  # largest absolute difference
    max_rel: float  # largest relative difference of a sample
    rel: float  # relative Frobenius difference over all samples
    top1_agreement: float | None  # share of rows with the same argmax, 0 to 1; None where that means nothing
    samples: int
    bound: float  # what `rel` may be at most; where no bound was set, `rel` itself
    passed: bool
    bound_kind: str = "noise"  # where the bound comes from: "noise", "tolerance", or "measured": none was set
    nonfinite: int = 0  # samples with NaN in both, or nothing but infinity: not compared there


@dataclass(frozen=True)
class NoiseFloor:
    """How much runs of the original model differ that should agree."""

    max_rel: float  # largest relative difference of a sample, over outputs and runs
    rel: float  # largest relative Frobenius difference, over outputs and runs
    rounding: float | None  # of a sample when every weight in question moves by one unit in the last place
    runs: tuple[str, ...]  # what the runs did otherwise
    samples: int
    batch_size: int
    other_batch_size: float | None  # of a sample when run one by one: no part of the floor; None if size is fixed


@dataclass(frozen=True)
class Verification:
    """The proof on the written file."""

    passed: bool  # every output kept its bound
    outputs: tuple[OutputComparison, ...]
    noise_floor: NoiseFloor | None  # None where nothing was run
    attempts: int = 1  # candidates that were written and compared
    reverted: tuple[str, ...] = ()  # initializers whose change was taken back on the way
    identical_bytes: bool = False  # the file is a byte-for-byte copy, which proves the outputs without running them


@dataclass(frozen=True)
class Score:
    """A model on held-out data: mean loss, top-1 accuracy (0 to 1, None without labels), number of samples."""

    loss: float
    top1: float | None
    n: int


@dataclass(frozen=True)
class QuantizedScore:
    """Relative error of the quantized model's outputs against the original's float outputs, on held-out data."""

    bits: int
    before: float  # of the original, quantized
    after: float  # of the candidate, quantized


@dataclass(frozen=True)
class Trial:
    """One candidate before the gate."""

    what: str
    tolerance: float  # residual that each layer was allowed
    loss: float  # mean over samples, of the float model
    top1: float | None  # 0 to 1
    mean_difference: float  # mean over samples of the loss minus the original's
    standard_error: float  # of that mean
    accepted: bool
    reason: str  # why or why not
    quantized: tuple[QuantizedScore, ...] = ()  # what was judged instead of the loss, where there is any
    chosen: bool = False  # the one that was taken


@dataclass(frozen=True)
class HeldoutResult:
    """Held-out data before and after, the name of the loss, and every candidate that was tried."""

    before: Score
    after: Score
    accepted: bool
    loss_name: str
    tried: tuple[Trial, ...] = ()
    quantized: tuple[QuantizedScore, ...] = ()  # as of a trial


@dataclass(frozen=True)
class QuantizationError:
    """Relative error of a layer's output under round-to-nearest, of the original weight and of the written one."""

    layer: str
    bits: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Timing:
    """Seconds of wall clock by stage; the total has the rest as well."""

    capture: float
    solve: float
    verify: float
    total: float
    judge: float = 0.0  # part of `solve`: runs of the model for verdicts of held-out data


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """Everything that a run found, decided and measured. Fields as in the JSON report."""

    schema: int = field(default=1, init=False)
    command: str = "shift"  # or "inspect", "verify", "diagnose"
    tool: ToolInfo
    model: ModelInfo
    settings: Mapping[str, Any]
    device: DeviceInfo
    calibration: DataInfo | None
    heldout: DataInfo | None = None
    layers: tuple[LayerReport, ...] = ()
    verification: Verification | None = None
    heldout_result: HeldoutResult | None = None
    quantization: tuple[QuantizationError, ...] | None = None
    flatness: FlatnessReport | None = None
    collapse: Diagnosis | None = None
    drift: Drift | None = None
    checkpoint: CheckpointInfo | None = None
    timing: Timing
    peak_memory_bytes: int | None = None
    predicted_memory_bytes: int | None = None  # the peak, as planned before the run
    warnings: tuple[str, ...] = ()  # for the user to act on
    decisions: tuple[str, ...] = ()  # which ways were tried and which was taken
    summary: str  # how it went, in a sentence
    next_step: str = ""  # what to do now, with a figure where one is known

    @property
    def judges_outputs(self) -> bool:
        """Whether the outputs decide: where a limit of the drift was asked for, they are reported only."""
        return self.drift is None or self.drift.limit is None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values only: dicts, lists, strings, finite numbers, booleans and None."""
        # Python's JSON writes NaN and infinities as bare words, which are read back as strings.
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=_plain), parse_constant=str)
        return values

    def save(self, path: str | Path) -> Path:
        """Writes the report, whole or not at all: as JSON or as a page, by the suffix `.json` or `.html`.

        Raises:
            InputError: The suffix is another one, or the file cannot be written.
        """
        from onnx_optshift.report import files

        files.check_path(Path(path))
        files.write(self, Path(path))
        return Path(path)

    def __repr__(self) -> str:
        return f"Report({self.command!r}, {self.model.input!r}: {self.summary})"


def _plain(value: Any) -> Any:
    """Numbers of numpy, and paths; `fspath` refuses everything else."""
    # numpy itself is slow to load, and whoever only imports a report needs none.
    return value.item() if getattr(value, "shape", None) == () else fspath(value)
