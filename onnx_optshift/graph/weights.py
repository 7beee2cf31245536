"""What was found in a graph: weights with all their uses, and what is left alone with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import onnx_graphsurgeon as gs

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Reshape, RowForm, Tap, Transpose, WeightForm

MICROSOFT: Final = "com.microsoft"  # the domain of ONNX Runtime's own operators
_Value = TypeVar("_Value", int, float, str, "tuple[int, ...]")


@dataclass(frozen=True)
class Use:
    """One node that multiplies rows of an activation with a weight."""

    node: str  # its name; its first output where it has none
    op_type: str
    tap: Tap  # the activation, and how it is read as rows
    output: str  # the value that the node computes


@dataclass(frozen=True)
class Weight:
    """One constant tensor and ALL its uses: the unit that is solved for, as the matrix V `[groups, d, m]`."""

    name: str  # of the initializer, or the output of the Constant node
    dtype: str  # float16, bfloat16, float32 or float64
    shape: tuple[int, ...]  # as stored
    form: WeightForm  # how it becomes V, the same for all uses
    uses: tuple[Use, ...]  # at least one

    @property
    def groups(self) -> int:
        """Number of independent problems."""
        return self.form.result_shape[0]

    @property
    def d(self) -> int:
        """Input width: length of a row."""
        return self.form.result_shape[1]

    @property
    def m(self) -> int:
        """Output width."""
        return self.form.result_shape[2]


@dataclass(frozen=True)
class Skip:
    """A linear layer that is left as it is."""

    weight: str | None  # its constant tensor; None when its weight is none
    node: str
    op_type: str
    reason: str
    unselected: bool = False  # whether it could be shifted, but the user's selection leaves it out


@dataclass(frozen=True)
class Match:
    """What a matcher makes of one weight operand: several uses where it meets several activations."""

    uses: tuple[Use, ...]
    form: WeightForm  # finished, with the result shape `[g, d, m]`


# (node, index of the weight operand, form of the weight at that operand) -> the match, or why there is none. A new
# layer kind is one such function, and a row in `operators`.
Matcher = Callable[[gs.Node, int, WeightForm], "Match | str"]


def make_match(node: gs.Node, activations: Sequence[gs.Tensor], form: WeightForm, rows: RowForm) -> Match:
    """The match of a finished form `[g, d, m]` with these activations, read as `rows`."""
    groups, width, _ = form.result_shape
    output = next((str(value.name) for value in node.outputs if value.name), "")
    taps = [Tap(str(value.name), rows, groups, width) for value in activations]
    return Match(tuple(Use(str(node.name), node.op, tap, output) for tap in taps), form)


def operand_of(node: gs.Node, index: int) -> gs.Tensor | None:
    """An input of a node; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def attribute(node: gs.Node, name: str, default: _Value) -> _Value:
    """An attribute of a node, of the type of its default value.

    Raises:
        InputError: The attribute is there but of another type.
    """
    value = node.attrs.get(name)
    # In a function's body an attribute may stand for one of its call; nothing there is solved for.
    if value is None or isinstance(value, gs.Node.AttributeRef):
        return default
    if isinstance(value, list) and isinstance(default, tuple) and all(isinstance(item, int) for item in value):
        return tuple(value)
    if isinstance(value, type(default)):
        return value
    raise InputError(
        f"{node.op} node {node.name!r}: attribute {name!r} should be like {default!r}, found {value!r}. "
        "Export the model again."
    )


def swapped(form: WeightForm) -> WeightForm:
    """The form with the last two axes exchanged: the transpose of a matrix, or of each matrix of a stack."""
    axes = tuple(range(len(form.result_shape)))
    return form.then(Transpose((*axes[:-2], axes[-1], axes[-2])))


def with_leading_axis(form: WeightForm) -> WeightForm:
    """The form `[d, m]` as `[1, d, m]`.

    The axis is put in before a transpose that ends the form, not after it, so that a matrix reached on different
    ways (transB, a Transpose node, a 1x1 convolution) comes out with equal steps.
    """
    last = form.steps[-1] if form.steps else None
    if not isinstance(last, Transpose):
        return form.then(Reshape((1, *form.result_shape)))
    before = WeightForm(form.shape, form.steps[:-1])
    perm = (0, *(axis + 1 for axis in last.perm))
    return before.then(Reshape((1, *before.result_shape))).then(Transpose(perm))
