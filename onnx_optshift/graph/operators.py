"""Operators that multiply with a weight: which are understood, and why the others are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_graphsurgeon as gs

from onnx_optshift.geometry import WeightForm
from onnx_optshift.graph import attention, conv, conv_transpose, einsum, gemm, matmul, recurrent
from onnx_optshift.graph.weights import MICROSOFT, Match, Matcher, domain_of

QUANTIZED: Final = "already quantized"


@dataclass(frozen=True)
class Operator:
    """A linear operator.

    Attributes:
        operands: Operands that can be the weight.
        matcher: Reads a node as rows @ V; None when the operator is known but not handled.
        reason: Why it is not handled.
    """

    operands: tuple[int, ...]
    matcher: Matcher | None = None
    reason: str = "this operator is not handled"

    def match(self, node: gs.Node, operand: int, form: WeightForm) -> Match | str:
        """The match of a node whose weight of this form is at `operand`, or why there is none."""
        return self.matcher(node, operand, form) if self.matcher else self.reason

    def activations(self, operand: int) -> tuple[int, ...]:
        """Operands that can be what meets the weight at `operand`."""
        if 0 not in self.operands:
            return (0,)
        return tuple(other for other in self.operands if other != operand)


# By domain and operator.
OPERATORS: Final[dict[tuple[str, str], Operator]] = {
    ("", "Gemm"): Operator(gemm.OPERANDS, gemm.match),
    (MICROSOFT, "FusedGemm"): Operator(gemm.OPERANDS, gemm.match),
    ("", "MatMul"): Operator(matmul.OPERANDS, matmul.match),
    (MICROSOFT, "FusedMatMul"): Operator(matmul.OPERANDS, matmul.match),
    ("", "Conv"): Operator(conv.OPERANDS, conv.match),
    (MICROSOFT, "FusedConv"): Operator(conv.OPERANDS, conv.match),
    ("", "ConvTranspose"): Operator(conv_transpose.OPERANDS, conv_transpose.match),
    ("", "Einsum"): Operator(einsum.OPERANDS, einsum.match),
    ("", "LSTM"): Operator(recurrent.OPERANDS, recurrent.match),
    ("", "GRU"): Operator(recurrent.OPERANDS, recurrent.match),
    ("", "RNN"): Operator(recurrent.OPERANDS, recurrent.match),
    (MICROSOFT, "Attention"): Operator(attention.OPERANDS, attention.match),
    ("", "DeformConv"): Operator((1,), reason="the places that its kernel reads are computed"),
    ("", "MatMulInteger"): Operator((0, 1), reason=QUANTIZED),
    ("", "QLinearMatMul"): Operator((0, 3), reason=QUANTIZED),
    ("", "QLinearConv"): Operator((3,), reason=QUANTIZED),
    ("", "ConvInteger"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "QAttention"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "QGemm"): Operator((0, 3), reason=QUANTIZED),
    (MICROSOFT, "QLinearConv"): Operator((3,), reason=QUANTIZED),
    (MICROSOFT, "MatMulNBits"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "MatMulBnb4"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "MatMulFpQ4"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "MatMulIntegerToFloat"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "DynamicQuantizeMatMul"): Operator((1,), reason=QUANTIZED),
    (MICROSOFT, "DynamicQuantizeLSTM"): Operator((1, 2), reason=QUANTIZED),
    (MICROSOFT, "QMoE"): Operator((2, 5, 8), reason=QUANTIZED),
    (MICROSOFT, "MoE"): Operator((2, 4, 6), reason="which rows meet which expert is decided inside the operator"),
    (MICROSOFT, "PackedAttention"): Operator((1,)),
    (MICROSOFT, "LongformerAttention"): Operator((1,)),
    (MICROSOFT, "DecoderAttention"): Operator((2, 3)),
    (MICROSOFT, "ConvTransposeWithDynamicPads"): Operator((1,)),
    (MICROSOFT, "GemmFastGelu"): Operator((1,)),
    (MICROSOFT, "GemmFloat8"): Operator((0, 1)),
}


def operator_of(node: gs.Node) -> Operator | None:
    """The linear operator that a node is, or None."""
    return OPERATORS.get((domain_of(node), node.op))
