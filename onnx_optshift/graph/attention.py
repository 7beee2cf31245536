"""com.microsoft Attention: one matrix `[d, q + k + v]` that makes queries, keys and values of the same rows."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import MatrixRows, WeightForm
from onnx_optshift.graph.weights import Match, make_match, with_leading_axis

OPERANDS = (1,)


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads the projections of one attention block as rows @ V."""
    if len(form.result_shape) != 2:
        return f"an {node.op} weight has 2 axes, this one {len(form.result_shape)}"
    return make_match(node, 0, with_leading_axis(form), MatrixRows())
