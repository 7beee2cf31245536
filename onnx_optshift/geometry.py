"""One normal form for every linear use of a constant weight: `Z = A V`, with rows A `[g, n, d]` and V `[g, d, m]`.

`g` counts independent problems (the groups of a grouped convolution, the matrices of a batched MatMul; 1 for an
ordinary layer), `n` the rows, `d` the input width, `m` the output width.

A `RowForm` says how an activation becomes rows; a `WeightForm` says how an initializer becomes V and, exactly, back.
Both are plain data without tensors: the only language that the ONNX side (`graph`) and the numerical side (`stats`,
`solve`) share. A new layer kind is one matcher in `graph` and, if needed, one form here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MatrixRows:
    """Rows read off a matrix operand X `[..., n, d]` (or `[..., d, n]`): MatMul and Gemm."""

    # -1 when the features are X's last axis (`X @ W`), -2 when they are the one before (`W @ X`, Gemm with transA). A
    # 1-D X is one row either way.
    feature_axis: int = -1
    # Leading shape of a batched weight: each of its matrices meets only its own slice of X. Empty when all leading axes
    # of X are simply more rows.
    batch: tuple[int, ...] = ()
    # Factor on the rows (Gemm's alpha). It matters only when uses with different factors are stacked.
    scale: float = 1.0


@dataclass(frozen=True)
class PatchRows:
    """Rows read off an image X `[N, C, *spatial]`: one im2col patch `[C/g * prod(kernel)]` per output position."""

    kernel: tuple[int, ...]  # its spatial shape
    strides: tuple[int, ...]  # one per spatial axis, as are the dilations
    dilations: tuple[int, ...]
    pads: tuple[int, ...]  # ONNX order, begins then ends; ignored unless `auto_pad` is NOTSET
    auto_pad: str = "NOTSET"  # or VALID, SAME_UPPER, SAME_LOWER
    group: int = 1  # channel groups, each its own problem
    scale: float = 1.0

    def pads_for(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Explicit pads (begins, then ends) for an image of this spatial shape.

        Source: the auto_pad rules of the ONNX Conv operator: `out = ceil(in / stride)` for SAME_*, the odd pixel at
        the end for SAME_UPPER and at the beginning for SAME_LOWER.
        """
        if self.auto_pad in ("NOTSET", ""):
            return self.pads
        if self.auto_pad == "VALID":
            return (0,) * (2 * len(spatial))
        begins, ends = [], []
        for size, kernel, stride, dilation in zip(spatial, self.kernel, self.strides, self.dilations, strict=True):
            out = math.ceil(size / stride)
            total = max(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            begins.append(small if self.auto_pad == "SAME_UPPER" else large)
            ends.append(large if self.auto_pad == "SAME_UPPER" else small)
        return (*begins, *ends)


@dataclass(frozen=True)
class AxisRows:
    """Rows read off any tensor X along chosen axes: an Einsum that contracts several axes, or not the last one."""

    features: tuple[int, ...]  # axes that make up a row, the slowest first; negative ones count from the end
    groups: tuple[int, ...] = ()  # axes that number the independent problems; all other axes are more rows
    scale: float = 1.0


RowForm = MatrixRows | PatchRows | AxisRows


@dataclass(frozen=True)
class Inside:
    """Where a value lies that only exists while a body of If, Loop or Scan runs."""

    value: str  # its name there
    element_type: int  # of its elements, by ONNX type number
    # Loop and Scan nodes around it. Handed out, its activation has as many axes in front, which count iterations; where
    # a branch of an If was not taken it is empty, of any shape.
    loops: int


@dataclass(frozen=True)
class Tap:
    """The identity of "an input": a graph value read in one way. Layers with equal taps share one statistic."""

    value: str  # name of the graph value; for one inside a body, the name under which it is handed out of there
    form: RowForm  # how its activation becomes rows
    groups: int  # g, the number of independent problems
    width: int  # d, the length of a row
    inside: Inside | None = None  # where the value lies when it is not in the main graph
    weighed: str = ""  # name of the rule that weighs its rows; empty counts every row alike

    @property
    def key(self) -> str:
        """One line of ASCII text: the same for equal taps in every process, another for every other tap."""
        # Equal numbers may be written in several ways (1, 1.0; 0.0, -0.0): as one.
        return ascii(replace(self, form=replace(self.form, scale=float(self.form.scale) + 0.0)))


@dataclass(frozen=True)
class Reshape:
    """A reshape step of a `WeightForm`, to this full shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Transpose:
    """A transpose step of a `WeightForm`, by this permutation."""

    perm: tuple[int, ...]


@dataclass(frozen=True)
class WeightForm:
    """How an initializer of `shape` becomes the matrix V `[g, d, m]`: reshapes and transposes, so exactly invertible.

    Two forms of one initializer are equal when their simplified steps are equal; uses of a weight whose forms
    differ (W here, its transpose there) cannot be solved as one problem.
    """

    shape: tuple[int, ...]
    steps: tuple[Reshape | Transpose, ...] = ()

    def then(self, step: Reshape | Transpose) -> WeightForm:
        """This form followed by one more step, simplified: adjacent transposes compose, identities vanish."""
        steps = [*self.steps, step]
        if self.steps:
            before = self.steps[-1]
            if isinstance(step, Transpose) and isinstance(before, Transpose):
                steps[-2:] = [Transpose(tuple(before.perm[axis] for axis in step.perm))]
            elif isinstance(step, Reshape) and isinstance(before, Reshape):
                steps[-2:] = [step]
        here = WeightForm(self.shape, tuple(steps[:-1])).result_shape
        tail = steps[-1]
        if (isinstance(tail, Transpose) and tail.perm == tuple(range(len(tail.perm)))) or (
            isinstance(tail, Reshape) and tail.shape == here
        ):
            steps.pop()
        return WeightForm(self.shape, tuple(steps))

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape after all steps: `(g, d, m)` for a finished form."""
        shape = self.shape
        for step in self.steps:
            shape = step.shape if isinstance(step, Reshape) else tuple(shape[axis] for axis in step.perm)
        return shape

    def to_matrix(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """The initializer `[*shape]` as the matrix V `[g, d, m]` (a view where possible)."""
        for step in self.steps:
            array = array.reshape(step.shape) if isinstance(step, Reshape) else array.transpose(step.perm)
        return array

    def from_matrix(self, matrix: NDArray[np.generic]) -> NDArray[np.generic]:
        """The matrix `[g, d, m]` as an initializer `[*shape]`: the exact inverse of `to_matrix`."""
        shapes = [WeightForm(self.shape, self.steps[:k]).result_shape for k in range(len(self.steps))]
        for step, before in zip(reversed(self.steps), reversed(shapes), strict=True):
            matrix = matrix.reshape(before) if isinstance(step, Reshape) else matrix.transpose(np.argsort(step.perm))
        return np.ascontiguousarray(matrix)
