"""Operators that multiply with a weight: which are understood, and why the others are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_graphsurgeon as gs

from onnx_optshift.graph import attention, conv, conv_transpose, einsum, gemm, matmul, recurrent
from onnx_optshift.graph.scopes import domain_of
from onnx_optshift.graph.weights import Matcher

MICROSOFT: Final = "com.microsoft"
QUANTIZED: Final = "already quantized"
_UNHANDLED: Final = "this operator is not handled"


@dataclass(frozen=True)
class Operator:
    """A linear operator.

    Attributes:
        operands: Operands that can be the weight.
        matcher: Reads a node as rows @ V; None when the operator is known but not handled.
        reason: Why it is not handled.
    """

    operands: tuple[int, ...]
    matcher: Matcher | None
    reason: str = ""

    def activations(self, operand: int) -> tuple[int, ...]:
        """Operands that can be what meets the weight at `operand`."""
        if 0 not in self.operands:
            return (0,)
        return tuple(other for other in self.operands if other != operand)


def _handled(operands: tuple[int, ...], matcher: Matcher) -> Operator:
    return Operator(operands, matcher)


def _left_alone(*operands: int, reason: str = _UNHANDLED) -> Operator:
    return Operator(operands, None, reason)


def _quantized(*operands: int) -> Operator:
    return Operator(operands, None, QUANTIZED)


# By domain and operator.
OPERATORS: Final[dict[tuple[str, str], Operator]] = {
    ("", "Gemm"): _handled(gemm.OPERANDS, gemm.match),
    (MICROSOFT, "FusedGemm"): _handled(gemm.OPERANDS, gemm.match),
    ("", "MatMul"): _handled(matmul.OPERANDS, matmul.match),
    (MICROSOFT, "FusedMatMul"): _handled(matmul.OPERANDS, matmul.match),
    ("", "Conv"): _handled(conv.OPERANDS, conv.match),
    (MICROSOFT, "FusedConv"): _handled(conv.OPERANDS, conv.match),
    ("", "ConvTranspose"): _handled(conv_transpose.OPERANDS, conv_transpose.match),
    ("", "Einsum"): _handled(einsum.OPERANDS, einsum.match),
    ("", "LSTM"): _handled(recurrent.OPERANDS, recurrent.match),
    ("", "GRU"): _handled(recurrent.OPERANDS, recurrent.match),
    ("", "RNN"): _handled(recurrent.OPERANDS, recurrent.match),
    (MICROSOFT, "Attention"): _handled(attention.OPERANDS, attention.match),
    ("", "DeformConv"): _left_alone(1, reason="the places that its kernel reads are computed"),
    ("", "MatMulInteger"): _quantized(0, 1),
    ("", "QLinearMatMul"): _quantized(0, 3),
    ("", "QLinearConv"): _quantized(3),
    ("", "ConvInteger"): _quantized(1),
    (MICROSOFT, "QAttention"): _quantized(1),
    (MICROSOFT, "QGemm"): _quantized(0, 3),
    (MICROSOFT, "QLinearConv"): _quantized(3),
    (MICROSOFT, "MatMulNBits"): _quantized(1),
    (MICROSOFT, "MatMulBnb4"): _quantized(1),
    (MICROSOFT, "MatMulFpQ4"): _quantized(1),
    (MICROSOFT, "MatMulIntegerToFloat"): _quantized(1),
    (MICROSOFT, "DynamicQuantizeMatMul"): _quantized(1),
    (MICROSOFT, "DynamicQuantizeLSTM"): _quantized(1, 2),
    (MICROSOFT, "QMoE"): _quantized(2, 5, 8),
    (MICROSOFT, "MoE"): _left_alone(2, 4, 6, reason="which rows meet which expert is decided inside the operator"),
    (MICROSOFT, "PackedAttention"): _left_alone(1),
    (MICROSOFT, "LongformerAttention"): _left_alone(1),
    (MICROSOFT, "DecoderAttention"): _left_alone(2, 3),
    (MICROSOFT, "ConvTransposeWithDynamicPads"): _left_alone(1),
    (MICROSOFT, "GemmFastGelu"): _left_alone(1),
    (MICROSOFT, "GemmFloat8"): _left_alone(0, 1),
}


def operator_of(node: gs.Node) -> Operator | None:
    """The linear operator that a node is, or None."""
    return OPERATORS.get((domain_of(node), node.op))
