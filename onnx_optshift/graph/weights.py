"""What was found in a graph: weights with all their uses, and what is left alone with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import onnx_graphsurgeon as gs

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Reshape, RowForm, Tap, Transpose, WeightForm

MICROSOFT: Final = "com.microsoft"  # the domain of ONNX Runtime's own operators
_Value = TypeVar("_Value", int, float, str, "tuple[int, ...]")


@dataclass(frozen=True)
class Use:
    """One node that multiplies rows of an activation with a weight.

    Attributes:
        node: The node's name; its first output where it has none.
        op_type: Its operator.
        tap: The activation, and how it is read as rows.
        output: Name of the value that the node computes.
    """

    node: str
    op_type: str
    tap: Tap
    output: str


@dataclass(frozen=True)
class Weight:
    """One constant tensor and ALL its uses: the unit that is solved for.

    Attributes:
        name: Of the initializer, or the output of the Constant node.
        dtype: `float16`, `bfloat16`, `float32` or `float64`.
        shape: As stored.
        form: How it becomes the matrix V `[g, d, m]`; the same for all uses.
        uses: At least one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: WeightForm
    uses: tuple[Use, ...]

    @property
    def groups(self) -> int:
        """g: number of independent problems."""
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
    """A linear layer that is left as it is.

    Attributes:
        weight: Its constant tensor; None when its weight is none.
        node: The layer's node.
        op_type: Its operator.
        reason: Why, in plain words.
        unselected: Whether it could be shifted, but the user's selection leaves it out.
    """

    weight: str | None
    node: str
    op_type: str
    reason: str
    unselected: bool = False


@dataclass(frozen=True)
class Match:
    """What a matcher makes of one weight operand.

    Attributes:
        uses: One, or more where the operand meets several activations.
        form: The finished form, with the result shape `[g, d, m]`.
    """

    uses: tuple[Use, ...]
    form: WeightForm


# (node, index of the weight operand, form of the weight at that operand) -> the match, or why there is none. A new
# layer kind is one such function in a file of its own, and a row in `operators`.
Matcher = Callable[[gs.Node, int, WeightForm], "Match | str"]


def display_name(node: gs.Node) -> str:
    """The node's name; its first output where it has none, which is unique in any case."""
    if node.name:
        return str(node.name)
    return next((str(output.name) for output in node.outputs if output.name), f"unnamed {node.op}")


def domain_of(node: gs.Node | gs.Function) -> str:
    """A node's operator domain; the two spellings of the standard one are the same."""
    return "" if node.domain in (None, "ai.onnx") else str(node.domain)


def make_match(node: gs.Node, activation: int, form: WeightForm, rows: RowForm) -> Match | str:
    """The match of a finished form `[g, d, m]` with the activation at one operand, read as these rows."""
    if activation >= len(node.inputs) or not node.inputs[activation].name:
        return f"{node.op} node {display_name(node)!r} has no input {activation}"
    groups, width, _ = form.result_shape
    tap = Tap(str(node.inputs[activation].name), rows, groups, width)
    output = next((str(value.name) for value in node.outputs if value.name), "")
    return Match((Use(display_name(node), node.op, tap, output),), form)


def attribute(node: gs.Node, name: str, default: _Value) -> _Value:
    """An attribute of a node, of the type of its default value.

    Raises:
        InputError: The attribute is there but of another type.
    """
    value = node.attrs.get(name)
    # In a function's body an attribute may stand for one of its call; nothing there is solved for.
    if value is None or isinstance(value, gs.Node.AttributeRef):
        return default
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            return tuple(value)
    elif isinstance(value, type(default)):
        return value
    raise InputError(
        f"{node.op} node {display_name(node)!r}: attribute {name!r} should be like {default!r}, found {value!r}. "
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
