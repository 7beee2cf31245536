"""The package's functions: model and data in, report and model out."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from onnx_optshift.commands import diagnose as diagnose_command
from onnx_optshift.commands import inspect as inspect_command
from onnx_optshift.commands import shift as shift_command
from onnx_optshift.commands import verify as verify_command
from onnx_optshift.commands.shift import Result
from onnx_optshift.diagnosis.flatness import DEFAULT_PROBES
from onnx_optshift.errors import InputError, OptShiftWarning, closest
from onnx_optshift.report.model import Report
from onnx_optshift.report.progress import SILENT, Progress
from onnx_optshift.settings import Choices, Settings

if TYPE_CHECKING:
    import onnx

NO_DATA = "no calibration data: the model was shifted on random inputs. Give real data before relying on the result."


def shift(
    model: str | Path | onnx.ModelProto,
    calibration: object = None,
    *,
    heldout: object = None,
    progress: Progress = SILENT,
    **settings: Unpack[Choices],
) -> Result:
    """Shifts a model's weights and proves that its outputs on the calibration data stayed.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        calibration: Calibration data: path, array by input name, reader, iterable of dicts, or a callable giving one;
            or a list of paths. None looks beside the model, and makes random inputs when nothing is there.
        heldout: Held-out data, in the same forms; `"none"` switches the gate off. None splits some off.
        progress: Where long passes report to.
        **settings: Fields of `Settings`.

    Returns:
        The result; `result.save("out.onnx")` writes the file. There is an `OptShiftWarning` where inputs are made up.

    Raises:
        InputError: The model, the data or a setting cannot be used.
        DeviceError: The device is not available.
        ToleranceError: The outputs left the tolerance and backing off did not help.
    """
    data, other = _sources(calibration), _sources(heldout)
    result = shift_command.run(model, None, data, other, _settings(settings), progress)
    if result.report.calibration is not None and result.report.calibration.synthetic:
        warnings.warn(NO_DATA, OptShiftWarning, stacklevel=2)
    return result


def inspect(
    model: str | Path | onnx.ModelProto,
    calibration: object = None,
    *,
    progress: Progress = SILENT,
    **settings: Unpack[Choices],
) -> Report:
    """Layers, the freedom that calibration data leaves them, and skips with reasons. Writes no model.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        calibration: As for `shift`; without any the layers are listed without rank.
        progress: Where long passes report to.
        **settings: Fields of `Settings`.

    Raises:
        InputError: The model, the data or a setting cannot be used.
    """
    return inspect_command.inspect(model, _sources(calibration), _settings(settings), progress)


def verify(
    original: str | Path,
    changed: str | Path,
    calibration: object = None,
    *,
    baseline: object = None,
    progress: Progress = SILENT,
    **settings: Unpack[Choices],
) -> Report:
    """Compares the outputs of two models on data, and of each layer whose weight differs.

    Args:
        original: Path of the model that the other is held against.
        changed: Path of the other model; same inputs and outputs.
        calibration: The data, as for `shift`.
        baseline: The data that was calibrated on, whose drift is to stand beside that of the data.
        progress: Where long passes report to.
        **settings: Fields of `Settings`.

    Returns:
        A report whose `verification.passed` says whether the outputs match.

    Raises:
        InputError: A model, the data or a setting cannot be used.
    """
    data, other = _sources(calibration), _sources(baseline)
    return verify_command.verify(original, changed, data, _settings(settings), progress, baseline=other)


def diagnose(
    model: str | Path | onnx.ModelProto,
    calibration: object = None,
    *,
    heldout: object = None,
    probes: int = DEFAULT_PROBES,
    progress: Progress = SILENT,
    **settings: Unpack[Choices],
) -> Report:
    """Whether the method's conditions hold for a model and its data, and what a shift would do to flatness.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        calibration: As for `shift`, but some is needed.
        heldout: As for `shift`.
        probes: Random directions for each layer with which curvature is measured; 0 measures none.
        progress: Where long passes report to.
        **settings: Fields of `Settings`; `tolerance` is that of the shift whose flatness is measured.

    Returns:
        A report whose `collapse.verdict` is the answer.

    Raises:
        InputError: The model, the data or a setting cannot be used.
    """
    data, other = _sources(calibration), _sources(heldout)
    return diagnose_command.diagnose(model, data, other, _settings(settings), probes, progress)


def _settings(given: Choices) -> Settings:
    """Settings of keywords.

    Raises:
        InputError: There is no such setting, or a value cannot be used.
    """
    known = [field.name for field in fields(Settings)]
    for name in given:
        if name not in known:
            raise InputError(f"{name}: there is no such setting.{closest(name, known)} See onnx_optshift.Settings.")
    return Settings(**given)  # type: ignore[arg-type]  # it takes lists for tuples, and says what else is wrong


def _sources(given: object) -> list[object] | None:
    """One source, or a list of paths as several; a list of dicts is one source."""
    if given is None:
        return None
    if isinstance(given, (list, tuple)) and given and all(isinstance(item, (str, Path)) for item in given):
        return list(given)
    return [given]
