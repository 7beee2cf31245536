"""CausalConvWithState of com.microsoft (Mamba, Gated DeltaNet): each channel's last k values against its own kernel.

The weight `[C, 1, k]` becomes `[C, k, 1]`: a problem per channel. The state that is handed on holds inputs alone.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import PatchRows, Reshape, WeightForm
from onnx_optshift.graph.weights import Match, attribute, make_match, operand_of

_PAST_STATE = 3


def match(node: gs.Node, operand: int, form: WeightForm) -> Match | str:
    """Reads one causal convolution as patches @ V."""
    shape, dilation = form.result_shape, attribute(node, "dilation", 1)
    if attribute(node, "ndim", 1) != 1 or len(shape) != 3 or attribute(node, "channels_last", 0) != 0:
        return "a causal convolution over several axes, or with its channels last, is not handled"
    if operand_of(node, _PAST_STATE) is not None:
        return "a causal convolution that goes on from a state: what that holds is not captured"
    if shape[1] != 1 or dilation < 1:
        return f"a causal convolution with the weight {list(shape)} and the dilation {dilation} is not handled"
    channels, width = shape[0], shape[2]
    rows = PatchRows((width,), (1,), (dilation,), (dilation * (width - 1), 0), group=channels)
    return make_match(node, node.inputs[:1], form.then(Reshape((channels, width, 1))), rows)
