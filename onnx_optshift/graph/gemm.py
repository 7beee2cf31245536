"""Gemm and FusedGemm: `Y = alpha op(A) op(B) + beta C`, either A or B being the weight.

Bias and beta do not meet the weight, so they play no part; alpha scales the rows.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import MatrixRows, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match, swapped, with_leading_axis

OPERANDS = (0, 1)


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one Gemm as rows @ V."""
    if len(form.result_shape) != 2:
        return f"a Gemm weight has 2 axes, this one {len(form.result_shape)}"
    alpha = attribute(node, "alpha", 1.0)
    if alpha == 0:
        return "alpha is 0: the weight has no effect"
    transposed = (attribute(node, "transA", 0) != 0, attribute(node, "transB", 0) != 0)
    # V = B' when the weight is on the right; (A' B')ᵀ = B'ᵀ A'ᵀ, so V = A'ᵀ when it is on the left.
    if transposed[operand] != (operand == 0):
        form = swapped(form)
    features_last = transposed[1] if operand == 0 else not transposed[0]
    rows = MatrixRows(feature_axis=-1 if features_last else -2, scale=float(alpha))
    return make_match(node, 1 - operand, with_leading_axis(form), rows)
