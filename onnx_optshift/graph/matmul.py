"""Products of matrices: MatMul and FusedMatMul (`alpha op(A) op(B)`), Gemm and FusedGemm, Attention's projections.

The weight is on either side. One of more than two axes is a stack of matrices, each with rows of its own; leading axes
of length 1 stack nothing. The rank of the activation need not be known: rows are taken at run time.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import MatrixRows, Reshape, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match, swapped, with_leading_axis


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one product as rows @ V."""
    shape = form.result_shape
    if not shape:
        return "a scalar is no matrix"
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return "transBatchA and transBatchB are not handled"
    alpha = attribute(node, "alpha", 1.0)
    if alpha == 0:
        return "alpha is 0: the weight has no effect"
    transposed = (attribute(node, "transA", 0) != 0, attribute(node, "transB", 0) != 0)
    features_last = transposed[1] if operand == 0 else not transposed[0]
    batch = shape[:-2] if math.prod(shape[:-2]) != 1 else ()
    if len(shape) == 1:
        # A vector on either side is contracted whole: one output column.
        form = form.then(Reshape((1, shape[0], 1)))
    else:
        if not batch:
            form = form.then(Reshape(shape[-2:]))
        # V = B' when the weight is on the right; (A' B')ᵀ = B'ᵀ A'ᵀ, so V = A'ᵀ when it is on the left.
        if transposed[operand] != (operand == 0):
            form = swapped(form)
        form = form.then(Reshape((math.prod(batch), *form.result_shape[-2:]))) if batch else with_leading_axis(form)
    rows = MatrixRows(feature_axis=-1 if features_last else -2, batch=batch, scale=float(alpha))
    return make_match(node, [node.inputs[1 - operand]], form, rows)


def match_matrix(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads a product with one matrix: Gemm, whose bias and beta do not meet it, or the q, k and v of an Attention."""
    axes = len(form.result_shape)
    return match(node, operand, form) if axes == 2 else f"a weight of {node.op} has 2 axes, this one {axes}"
