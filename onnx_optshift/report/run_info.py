"""What a run was made with: tools, model, device, data, checkpoint; parts of the report's JSON schema."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolInfo:
    """Versions of what took part, None for what was not loaded."""

    version: str
    python: str | None = None
    onnx: str | None = None
    onnxruntime: str | None = None
    torch: str | None = None
    numpy: str | None = None
    command: str | None = None  # the command line; None where the tool was called from Python
    finished: str | None = None  # when it ended, in UTC; None likewise


@dataclass(frozen=True)
class ModelInfo:
    """The model before and after."""

    input: str  # path of the original, or what it was given as
    output: str | None = None  # path of the written model; None when none was written
    sha256_in: str | None = None
    sha256_out: str | None = None
    opset: int | None = None  # version of the default operator set
    ir_version: int | None = None


@dataclass(frozen=True)
class DeviceInfo:
    """What ran where."""

    requested: str
    capture: str  # ONNX Runtime execution provider that ran the model
    solve: str  # torch device of statistics and solvers
    note: str = ""  # one line that says so, and why


@dataclass(frozen=True)
class DataInfo:
    """A set of samples."""

    source: str
    samples: int
    synthetic: bool  # seeded random inputs
    classes: int | None = None  # number of distinct labels; None without labels
    fingerprint: str | None = None  # digest of the content
    notes: tuple[str, ...] = ()  # what was noticed while reading, a sentence each
    split: bool = False  # split off the calibration data


@dataclass(frozen=True)
class CheckpointInfo:
    """What a run took from the checkpoint's folder and put there; None where none was asked for."""

    folder: str
    used: int  # entries of former runs: finished statistics and solutions, and passes that were begun
    saved: int  # entries that this run has added
    rejected: tuple[str, ...] = ()  # what else lies there and was not used, each with the reason
    failed: str | None = None  # why no more was saved, where the system refused
