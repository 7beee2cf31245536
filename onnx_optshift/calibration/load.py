"""The door: sources of any kind to `Samples`, and data that lies beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from onnx_optshift.calibration.collect import Collector
from onnx_optshift.calibration.files import test_sets
from onnx_optshift.calibration.readers import add_source
from onnx_optshift.calibration.source import InputSpec, Samples, describe
from onnx_optshift.errors import InputError


def load(sources: Sequence[object], inputs: Sequence[InputSpec], *, labels_name: str = "labels") -> Samples:
    """Reads and checks calibration data; several sources are chained.

    Args:
        sources: Paths, scripts (`script.py[:function]`), arrays, dicts, readers, iterables, callables, `Samples`.
            In a .npz, a .npy and a dict of arrays axis 0 numbers the samples, unless the shapes rule that out. Each
            dict of an iterable, each Polygraphy iteration and each `test_data_set_*` folder is one feed.
        inputs: The model's inputs.
        labels_name: Name of the array with labels.

    Returns:
        All samples, at least one.

    Raises:
        InputError: There is no data, or it does not fit the model.
    """
    if isinstance(sources, (str, PathLike)):  # would otherwise be read as a list of letters
        sources = [sources]
    if not inputs:
        raise InputError("the model has no inputs, so that no calibration data can reach its layers.")
    if not sources:
        raise InputError(f"no calibration data given. Expected arrays for {describe(inputs)}.")
    if len(sources) == 1 and isinstance(sources[0], Samples):
        return sources[0]
    collector = Collector(inputs, labels_name)
    names = [add_source(collector, source) for source in sources]
    return collector.samples(", ".join(names))


def beside(model_path: Path, inputs: Sequence[InputSpec]) -> list[Path]:
    """Calibration data that lies in the model's folder: the first of three kinds that is there.

    `<stem>.calibration.npz`, then `calibration.npz`, then all `test_data_set_*` folders with a file for each input.

    Args:
        model_path: The model file.
        inputs: The model's inputs.

    Returns:
        Paths for `load`; none if there is no such data.
    """
    for name in (f"{model_path.stem}.calibration.npz", "calibration.npz"):
        if (model_path.parent / name).is_file():
            return [model_path.parent / name]
    return test_sets(model_path.parent, len(inputs)) if inputs else []
