"""What a quantizer would make of a candidate: trial weights rounded to nearest, run like any other trial.

The error is taken against the ORIGINAL model's float outputs, so that the deviation of the shift and the quantization
error both count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.outputs import Arrays


class Quantizer:
    """Round-to-nearest of every weight on a bench, at one or several bit widths.

    Args:
        bench: The original model.
        grids: What the user is going to quantize to.
    """

    def __init__(self, bench: Bench, grids: Sequence[Grid]) -> None:
        self._bench = bench
        self.grids = tuple(grids)

    def variants(self, arrays: Arrays) -> Iterator[tuple[Grid, Arrays]]:
        """For each grid, all weights rounded to it: the trial's where it has some, the original's elsewhere."""
        for grid in self.grids:
            yield (
                grid,
                {
                    weight.name: self._bench.sessions.keep(
                        round_initializer(
                            arrays.get(weight.name, self._bench.model.initializer(weight.name)), weight.form, grid
                        )
                    )
                    for weight in self._bench.weights
                },
            )
