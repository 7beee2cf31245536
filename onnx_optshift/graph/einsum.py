"""Einsum of two operands that is a plain contraction, such as `bsnh,nhd->bsd`.

Every letter of the weight is one of three: in the activation and summed (a feature, d), in the output alone (a column,
m), or in both (a problem of its own, g). Letters of the activation alone are rows. Anything else (diagonals, sums over
one operand alone) is no such contraction, and the weight is left as it is.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import AxisRows, MatrixRows, Reshape, Transpose, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match

OPERANDS = tuple(range(8))  # any number is allowed; so many at least are told why they are left alone
_TERM = re.compile(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*")


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one contraction as rows @ V."""
    equation = attribute(node, "equation", "")
    what = f"the equation {equation!r}"
    terms = _terms(equation)
    if len(terms) != 1 + len(node.inputs):
        return f"{what} does not fit {len(node.inputs)} operands"
    if len(node.inputs) != 2:
        return f"{what} has {len(node.inputs)} operands, handled are two"
    weight, x, out = terms[operand], terms[1 - operand], terms[2]
    if "." in weight or len(weight) != len(form.result_shape):
        return f"{what} leaves axes of the weight under an ellipsis"
    if any(len(set(term)) != len(term) for term in terms):
        return f"{what} takes a diagonal"
    if any(letter not in out and letter not in weight for letter in x):
        return f"{what} sums over axes of the activation alone"
    if any(letter not in out and letter not in x for letter in weight):
        return f"{what} sums over axes of the weight alone"
    groups = [letter for letter in weight if letter in x and letter in out]
    features = [letter for letter in weight if letter in x and letter not in out]
    columns = [letter for letter in weight if letter not in x]
    if not features:
        return f"{what} contracts nothing"
    sizes = dict(zip(weight, form.result_shape, strict=True))
    if any(sizes[letter] == 1 for letter in (*groups, *features)):
        return f"{what} may broadcast an axis of length 1"
    order = tuple(weight.index(letter) for letter in (*groups, *features, *columns))
    matrix = tuple(math.prod(sizes[letter] for letter in letters) for letters in (groups, features, columns))
    axes = [_axis(x, letter) for letter in features]
    # As a MatMul would say it where it can be said so: layers that read alike then share one statistic.
    as_matmul = not groups and axes in ([-1], [-2])
    axis_rows = AxisRows(tuple(axes), tuple(_axis(x, letter) for letter in groups))
    rows = MatrixRows(feature_axis=axes[0]) if as_matmul else axis_rows
    return make_match(node, [node.inputs[1 - operand]], form.then(Transpose(order)).then(Reshape(matrix)), rows)


def _axis(term: str, letter: str) -> int:
    """Axis of a letter, the same for any number of axes under the ellipsis: from the left before it, else the right."""
    at = term.index(letter)
    return at if "." in term[at:] else at - len(term)


def _terms(equation: str) -> list[str]:
    """Letters of the operands and of the output, an ellipsis as one dot; none when the equation is malformed."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        # Without an output: the ellipsis first, then every letter that appears once, in the order of the alphabet.
        counts = Counter(left.replace(".", "").replace(",", ""))
        right = ("..." if "..." in left else "") + "".join(sorted(a for a, count in counts.items() if count == 1))
    terms = [*left.split(","), right]
    return [term.replace("...", ".") for term in terms] if all(map(_TERM.fullmatch, terms)) else []
