"""Calibration data for ONNX Runtime's quantizers, from every source that this package reads.

    quantize_static("in.onnx", "out.onnx", calibration_reader("in.onnx", "calibration.npz"))

The other way round nothing is needed: `onnx_optshift.shift` takes a `CalibrationDataReader` as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_optshift.calibration.load import beside, load
from onnx_optshift.calibration.source import Feeds, Samples
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.run.prepare import input_specs
from onnx_optshift.settings import Settings

if TYPE_CHECKING:
    import onnx


def calibration_reader(
    model: str | Path | onnx.ModelProto, *sources: object, batch_size: int = 1, max_samples: int | None = None
) -> CalibrationReader:
    """A reader of the samples in some sources, for `calibration_data_reader` of ONNX Runtime's quantizers.

    Args:
        model: The model that is going to be quantized; its inputs say how data is to be read.
        *sources: As for `onnx_optshift.shift`; without any, what lies beside the model. Labels are left out.
        batch_size: Samples that are given together. Histogram calibrators (Entropy, Percentile) need equal batches:
            one sample each, the default, or a divisor of the number of samples.
        max_samples: Samples to use at most, the first ones; None, the default, for all.

    Raises:
        InputError: There is no data, or it does not fit the model.
    """
    source = ModelFile.load(model)
    inputs = input_specs(source, Settings())
    samples = load(sources or (beside(source.path, inputs) if source.path else ()), inputs)
    chosen = range(len(samples))[:max_samples]
    return CalibrationReader(samples.select(chosen), batch_size)


class CalibrationReader:
    """Batches of samples, one by one: what ONNX Runtime calls a CalibrationDataReader, by its methods alone.

    Args:
        samples: What to give.
        batch_size: Samples that are given together; a feed of fixed shapes is given alone.
    """

    def __init__(self, samples: Samples, batch_size: int = 1) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self.set_range(0, None)

    def get_next(self) -> Feeds | None:
        """The next batch, array by input name; None at the end."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Starts anew, at the beginning of the range."""
        batches = self._samples.batches(self._batch_size)
        self._left = (dict(batch.feeds) for batch in islice(batches, *self._range))

    def set_range(self, start_index: int, end_index: int | None) -> None:
        """Gives these batches alone, the end not included, from the first of them on."""
        self._range = (start_index, end_index)
        self.rewind()

    def __len__(self) -> int:
        return sum(1 for _ in self._samples.batches(self._batch_size))

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self.get_next, None)

    def __deepcopy__(self, _: object) -> CalibrationReader:
        # ONNX Runtime copies readers, and generators cannot be copied.
        return CalibrationReader(self._samples, self._batch_size)
