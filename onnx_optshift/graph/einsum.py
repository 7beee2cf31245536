"""Einsum of two operands that is a plain contraction, such as `bsnh,nhd->bsd`.

Every letter of the weight is one of three: in the activation and summed (a feature, d), in the output alone (a column,
m), or in both (a problem of its own, g). Letters of the activation alone are rows. Anything else (diagonals, sums over
one operand alone) is no such contraction, and the weight is left as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import AxisRows, MatrixRows, Reshape, RowForm, Transpose, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match

OPERANDS = tuple(range(8))  # any number is allowed; so many at least are told why they are left alone
_DOTS = "..."
_TERM = re.compile(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*")


@dataclass(frozen=True)
class _Term:
    """Letters of one operand; those before the ellipsis count from the left, the others from the right."""

    before: str
    after: str
    dots: bool

    @property
    def letters(self) -> str:
        return self.before + self.after

    def axis(self, letter: str) -> int:
        """Axis of a letter, the same for any number of axes under the ellipsis."""
        if letter in self.before:
            return self.before.index(letter)
        return self.after.index(letter) - len(self.after)


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one contraction as rows @ V."""
    equation = attribute(node, "equation", "")
    terms = _parsed(equation)
    if terms is None or len(terms) != 1 + len(node.inputs):
        return f"the equation {equation!r} does not fit {len(node.inputs)} operands"
    if len(node.inputs) != 2:
        return f"the equation {equation!r} has {len(node.inputs)} operands, handled are two"
    weight, x, out = terms[operand], terms[1 - operand], terms[2]
    if weight.dots or len(weight.letters) != len(form.result_shape):
        return f"the equation {equation!r} leaves axes of the weight under an ellipsis"
    if any(len(set(term.letters)) != len(term.letters) for term in terms):
        return f"the equation {equation!r} takes a diagonal"
    if (x.dots and not out.dots) or any(a not in out.letters and a not in weight.letters for a in x.letters):
        return f"the equation {equation!r} sums over axes of the activation alone"
    if any(letter not in out.letters and letter not in x.letters for letter in weight.letters):
        return f"the equation {equation!r} sums over axes of the weight alone"
    groups = [letter for letter in weight.letters if letter in x.letters and letter in out.letters]
    features = [letter for letter in weight.letters if letter in x.letters and letter not in out.letters]
    columns = [letter for letter in weight.letters if letter not in x.letters]
    if not features:
        return f"the equation {equation!r} contracts nothing"
    sizes = dict(zip(weight.letters, form.result_shape, strict=True))
    if any(sizes[letter] == 1 for letter in (*groups, *features)):
        return f"the equation {equation!r} may broadcast an axis of length 1"
    order = tuple(weight.letters.index(letter) for letter in (*groups, *features, *columns))
    matrix = tuple(math.prod(sizes[letter] for letter in letters) for letters in (groups, features, columns))
    return make_match(node, 1 - operand, form.then(Transpose(order)).then(Reshape(matrix)), _rows(x, groups, features))


def _rows(x: _Term, groups: Sequence[str], features: Sequence[str]) -> RowForm:
    axes = tuple(x.axis(letter) for letter in features)
    # As a MatMul would say it where it can be said so: layers that read alike then share one statistic.
    if not groups and axes in {(-1,), (-2,)}:
        return MatrixRows(feature_axis=axes[0])
    return AxisRows(axes, tuple(x.axis(letter) for letter in groups))


def _parsed(equation: str) -> list[_Term] | None:
    """Terms of the operands and of the output; None when the equation is malformed."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not all(map(_TERM.fullmatch, inputs)):
        return None
    if not arrow:
        # Without an output: the ellipsis first, then every letter that appears once, in the order of the alphabet.
        letters = "".join(inputs).replace(_DOTS, "")
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        right = (_DOTS if _DOTS in left else "") + "".join(once)
    if not _TERM.fullmatch(right):
        return None
    return [_term(text) for text in (*inputs, right)]


def _term(text: str) -> _Term:
    before, dots, after = text.partition(_DOTS)
    return _Term(before, after, True) if dots else _Term("", before, False)
