"""Operators that multiply with a weight: which are understood, and why the others are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_graphsurgeon as gs

from onnx_optshift.graph import causal_conv, conv, einsum, matmul, recurrent
from onnx_optshift.graph.weights import MICROSOFT, Matcher

QUANTIZED: Final = "already quantized"


@dataclass(frozen=True)
class Operator:
    """A linear operator."""

    operands: tuple[int, ...]  # those that can be the weight
    matcher: Matcher | None = None  # reads a node as rows @ V; None when the operator is known but not handled
    reason: str = "this operator is not handled"  # why not

    def activations(self, operand: int) -> tuple[int, ...]:
        """Operands that can be what meets the weight at `operand`."""
        if 0 not in self.operands:
            return (0,)
        return tuple(other for other in self.operands if other != operand)


_QUANTIZED_OPERANDS: Final[dict[tuple[str, str], tuple[int, ...]]] = {
    ("", "MatMulInteger"): (0, 1),
    ("", "QLinearMatMul"): (0, 3),
    ("", "QLinearConv"): (3,),
    ("", "ConvInteger"): (1,),
    (MICROSOFT, "QAttention"): (1,),
    (MICROSOFT, "QGemm"): (0, 3),
    (MICROSOFT, "QLinearConv"): (3,),
    (MICROSOFT, "MatMulNBits"): (1,),
    (MICROSOFT, "MatMulBnb4"): (1,),
    (MICROSOFT, "MatMulFpQ4"): (1,),
    (MICROSOFT, "MatMulIntegerToFloat"): (1,),
    (MICROSOFT, "DynamicQuantizeMatMul"): (1,),
    (MICROSOFT, "DynamicQuantizeLSTM"): (1, 2),
    (MICROSOFT, "QMoE"): (2, 5, 8),
}
# By domain and operator.
OPERATORS: Final[dict[tuple[str, str], Operator]] = {
    ("", "Gemm"): Operator((0, 1), matmul.match_matrix),
    (MICROSOFT, "FusedGemm"): Operator((0, 1), matmul.match_matrix),
    ("", "MatMul"): Operator((0, 1), matmul.match),
    (MICROSOFT, "FusedMatMul"): Operator((0, 1), matmul.match),
    (MICROSOFT, "TransposeMatMul"): Operator((0, 1), matmul.match),
    (MICROSOFT, "Attention"): Operator((1,), matmul.match_matrix),
    ("", "Conv"): Operator((1,), conv.match),
    (MICROSOFT, "FusedConv"): Operator((1,), conv.match),
    ("", "ConvTranspose"): Operator((1,), conv.match_transposed),
    (MICROSOFT, "ConvTransposeWithDynamicPads"): Operator((1,), conv.match_transposed),
    (MICROSOFT, "CausalConvWithState"): Operator((1,), causal_conv.match),
    ("", "Einsum"): Operator(einsum.OPERANDS, einsum.match),
    **{("", op): Operator((1, 2), recurrent.match) for op in ("LSTM", "GRU", "RNN")},
    **{name: Operator(operands, reason=QUANTIZED) for name, operands in _QUANTIZED_OPERANDS.items()},
    ("", "DeformConv"): Operator((1,), reason="the places that its kernel reads are computed"),
    (MICROSOFT, "MoE"): Operator((2, 4, 6), reason="which rows meet which expert is decided inside the operator"),
    (MICROSOFT, "PackedAttention"): Operator((1,)),
    (MICROSOFT, "LongformerAttention"): Operator((1,)),
    (MICROSOFT, "DecoderAttention"): Operator((2, 3)),
    (MICROSOFT, "GemmFastGelu"): Operator((1,)),
    (MICROSOFT, "GemmFloat8"): Operator((0, 1)),
}


def operator_of(node: gs.Node) -> Operator | None:
    """The linear operator that a node is, or None."""
    return OPERATORS.get((node.domain, node.op))
