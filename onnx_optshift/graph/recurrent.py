"""LSTM, GRU and RNN: input weights W against the rows of X, recurrent weights R against the hidden states.

W `[dirs, k * H, d]` meets the same rows in every direction, so it is one problem: V `[1, d, dirs * k * H]`.

R `[dirs, k * H, H]` meets H(t-1), the node's own first output Y one step earlier, which makes a problem per direction.
The states of all steps are taken, one more than R sees; if there is an initial state, it is a second input. An exact
shift keeps the first product, so the first state, so the second product, and so on: capturing the original states once
is enough.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import MatrixRows, Reshape, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match, operand_of, swapped, with_leading_axis

_RECURRENT = 2
_INITIAL_STATE = 5


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads the input or the recurrent weights of one layer as rows @ V."""
    shape = form.result_shape
    if len(shape) != 3:
        return f"{node.op} weights have 3 axes, this one {len(shape)}"
    if operand == _RECURRENT:
        return _recurrent(node, form)
    rows = swapped(form.then(Reshape((shape[0] * shape[1], shape[2]))))
    return make_match(node, node.inputs[:1], with_leading_axis(rows), MatrixRows())


def _recurrent(node: gs.Node, form: WeightForm) -> Match | str:
    directions = form.result_shape[0]
    if node.op == "GRU" and attribute(node, "linear_before_reset", 0) == 0:
        return "recurrent weights of a GRU that resets the state before they meet it: that product is not captured"
    if attribute(node, "layout", 0) != 0:
        return "recurrent weights with layout 1 are not handled"
    states = [value for value in node.outputs[:1] if value.name]
    if not states:
        return "recurrent weights: the node does not output its hidden states (Y)"
    initial = operand_of(node, _INITIAL_STATE)
    if initial is not None:
        states.append(initial)
    # Y is [steps, dirs, batch, H] and the initial state [dirs, batch, H]: a direction's rows for each of its matrices.
    rows = MatrixRows(batch=(directions,)) if directions > 1 else MatrixRows()
    return make_match(node, states, swapped(form), rows)
