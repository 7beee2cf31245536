"""Which constants are weights: a reader that is not understood stops the weight, and the reason names it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tiny_models as tiny
from discovery import find, only, skipped
from onnx import TensorProto, helper, numpy_helper

from onnx_optshift.graph.modelfile import ModelFile


def test_reshape_to_a_computed_shape_is_left_alone() -> None:
    text = """g (float[5,4] x, int64[2] s) => (float y) { w = Reshape(W, s)  y = MatMul(x, w) }"""
    weights, skips = find(tiny.model(text, {"W": tiny.weight(4, 3)}))
    assert not weights
    assert not skips  # two computed values multiply: there is no constant weight


@pytest.mark.parametrize("axes", ["{0}", "{5}", "{-4}"])
def test_axes_that_cannot_be_squeezed_stop_the_weight(axes: str) -> None:
    text = f"""g (float[5,4] x) => (float y) {{ z = FancyOp(x)  a = Constant<value=int64[1] {axes}>()
        w = Squeeze(W, a)  v = MatMul(x, W)  y = Relu(w) }}"""
    assert skipped(tiny.model(text, {"W": tiny.weight(4, 3)})).reason == "also read by Squeeze node 'w'"


def test_computed_weight_is_named() -> None:
    text = "g (float[5,4] x) => (float y) { w = Mul(W, s)  y = MatMul(x, w) }"
    skip = skipped(tiny.model(text, {"W": tiny.weight(4, 3), "s": tiny.weight(3)}))
    assert skip.weight is None
    assert skip.node == "y"
    assert "computed from constants by Mul" in skip.reason


@pytest.mark.parametrize("named", [True, False])
def test_constant_node(named: bool) -> None:
    node = "[layer] y" if named else "y"
    text = f"g (float[5,2] x) => (float y) {{ k = Constant<value=float[2,2] {{1,2,3,4}}>()  {node} = MatMul(x, k) }}"
    found = only(tiny.model(text))
    assert found.name == "k"
    assert found.uses[0].node == ("layer" if named else "y")


def test_ir_3_initializers_are_inputs_too() -> None:
    text = "g (float[5,4] x) => (float y) { y = Gemm(x, W, b) }"
    proto = tiny.model(text, {"W": tiny.weight(4, 3), "b": tiny.weight(3)}, opset=7, ir_version=3, inputs_too=True)
    found = only(proto)
    assert found.name == "W"
    assert [spec.name for spec in ModelFile.load(proto).inputs] == ["x"]


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (TensorProto.FLOAT, np.float32),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_dtypes_and_storage(number: int, dtype: type, raw: bool) -> None:
    array = tiny.weight(4, 3).astype(dtype)
    tensor = helper.make_tensor("W", number, (4, 3), array.tobytes(), raw=True) if raw else None
    proto = tiny.model("g (float x) => (float y) { y = MatMul(x, W) }", {"W": tensor or tiny.typed("W", array, number)})
    proto.graph.input[0].type.tensor_type.elem_type = proto.graph.output[0].type.tensor_type.elem_type = number
    found = only(proto)
    assert found.dtype == np.dtype(dtype).name
    content = ModelFile.load(proto).initializer("W")
    assert content.dtype == np.dtype(dtype)
    assert np.array_equal(content, array)


def test_tied_weight_is_one_weight_with_all_uses() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { [a] h = MatMul(x, W)  [b] i = MatMul(h, W)  [c] y = MatMul(x, W) }"
    found = only(tiny.model(text, {"W": tiny.weight(4, 4)}))
    assert [use.node for use in found.uses] == ["a", "b", "c"]
    assert [use.tap.value for use in found.uses] == ["x", "h", "x"]
    assert found.uses[0].tap == found.uses[2].tap


def test_equal_matrices_on_different_ways_are_one_form() -> None:
    text = """g (float[N,4] x) => (float y) {
        h = Gemm<transB=1>(x, W)  t = Transpose(W)  i = MatMul(x, t)
        k = Constant<value=int64[4] {3, 4, 1, 1}>()  w = Reshape(W, k)
        s = Constant<value=int64[4] {-1, 4, 1, 1}>()  p = Reshape(x, s)  c = Conv(p, w)
        f = Flatten(c)  j = Add(h, i)  y = Add(j, f) }"""
    found = only(tiny.model(text, {"W": tiny.weight(3, 4)}))
    assert {use.op_type for use in found.uses} == {"Gemm", "MatMul", "Conv"}


READERS = {
    "its transpose": ("a = MatMul(x, W)  y = Gemm<transB=1>(a, W)", "different matrices"),
    "gather": ("[emb] e = Gather(W, i)  a = MatMul(x, W)  y = Add(a, e)", "also read by Gather node 'emb'"),
    "add": ("a = MatMul(x, W)  y = Add(a, W)", "also read by Add node 'y'"),
    "graph output": ("y = MatMul(x, W)  z = Identity(W)", "also read by the graph output 'z'"),
    "as bias": ("a = MatMul(x, W)  y = Gemm(a, q, W)", "also read by Gemm node 'y'"),
    "body": (
        "a = MatMul(x, W)  [map] m = SequenceMap(s)"
        " <body = b (float[4,4] i) => (float o) { [in] o = MatMul(i, W) }>  y = Identity(a)",
        "inside the body of SequenceMap node 'map': SequenceMap does not hand out",
    ),
    "behind identity in a body": (
        "a = MatMul(x, W)  w = Identity(W) [if] y = If(c) <then_branch = t () => (float o) { [in] o = Add(a, w) },"
        " else_branch = e () => (float p) { p = Identity(a) }>",
        "also read by Add node 'in' inside the body of If node 'if'",
    ),
    "handed out by a body": (  # the checker refuses that, but stops at the first operator that it does not know
        "a = MatMul(x, W)  u = FancyNormalization(x)  [if] y = If(c) <then_branch = t () => (float W) { },"
        " else_branch = e () => (float p) { p = Identity(a) }>",
        "also read by the body of If node 'if'",
    ),
    "loop state": (
        "a = MatMul(x, W)  [loop] y = Loop(n, c, W) <body = b (int64 k, bool u, float s) => (bool u2, float s2)"
        " { u2 = Identity(u)  s2 = Add(s, a) }>",
        "also read by Loop node 'loop'",
    ),
}


@pytest.mark.parametrize("case", list(READERS))
def test_one_reader_too_many(case: str) -> None:
    body, reason = READERS[case]
    output = ", float[4,4] z" if "z =" in body else ""
    inputs = "float[4,4] x, int64[4] i, bool c, int64 n, seq(float[4,4]) s"
    text = f"g ({inputs}) => (float[4,4] y{output}) {{ {body} }}"
    tensors = {"W": tiny.weight(4, 4)} | ({"q": tiny.weight(4, 4)} if "q" in body.split() or "q," in body else {})
    _, skips = find(tiny.model(text, tensors))
    skip = next(skip for skip in skips if skip.weight == "W")
    assert reason in skip.reason
    assert skip.op_type == "MatMul"
    # Without the other reader it is a weight.
    alone = tiny.model("g (float[4,4] x) => (float[4,4] y) { y = MatMul(x, W) }", {"W": tiny.weight(4, 4)})
    assert only(alone).name == "W"


@pytest.mark.parametrize("op", ["Shape", "Size"])
def test_reader_of_the_shape_alone_is_no_reader(op: str) -> None:
    text = f"g (float[4,4] x) => (float[4,4] y, int64 s) {{ y = MatMul(x, W)  s = {op}(W) }}"
    assert only(tiny.model(text, {"W": tiny.weight(4, 4)})).name == "W"


def test_a_constant_node_without_a_tensor_says_so() -> None:
    text = "g (float[5,2] x) => (float y) { k = Constant<value_floats=[1.0, 2.0]>()  y = MatMul(x, k) }"
    assert "a list of numbers in Constant node 'k'" in skipped(tiny.model(text)).reason


def test_layers_inside_bodies_are_weights_and_constants_of_functions_are_listed() -> None:
    text = """g (float[4,4] x, bool c) => (float[4,4] y) {
        a = MatMul(x, V)
        [if] b = If(c) <then_branch = t () => (float o)
          { k = Constant<value=float[4,1] {1,2,3,4}>()  [in_then] o = MatMul(a, k) },
          else_branch = e () => (float p) { [in_else] p = Gemm(a, W) }>
        y = tests.f(b) }"""
    functions = """<domain: "tests", opset_import: ["":17]> f (a) => (r)
        { k = Constant<value=float[1,4] {1,2,3,4}>()  [in_f] r = MatMul(a, k) }"""
    tensors = {"V": tiny.weight(4, 4), "W": tiny.weight(4, 1)}
    weights, skips = find(tiny.model(text, tensors, functions=functions, imports=', "tests":1'))
    assert [weight.name for weight in weights] == ["V", "k", "W"]
    (skip,) = skips
    assert "a constant inside a function, which has it for all its calls" in skip.reason


UNHANDLED = {
    "DeformConv": ("y = DeformConv(x, W, o)", (3, 4, 2, 2), "", "places"),
    "MoE": ("y = com.microsoft.MoE(x, r, W, , V)", (2, 4, 4), "com.microsoft", "inside the operator"),
    "PackedAttention": ("y = com.microsoft.PackedAttention(x, W, b, o, r)", (4, 12), "com.microsoft", "not handled"),
}


@pytest.mark.parametrize("case", list(UNHANDLED))
def test_known_but_unhandled(case: str) -> None:
    body, shape, domain, reason = UNHANDLED[case]
    text = f"g (float x, float o, float r, float b, float V) => (float y) {{ {body} }}"
    proto = tiny.model(text, {"W": tiny.weight(*shape)}, imports=', "com.microsoft":1' if domain else "")
    skip = skipped(proto)
    assert (skip.weight, skip.op_type) == ("W", case)
    assert reason in skip.reason


def test_quantized_weights_say_so() -> None:
    text = """g (float[N,4] x, uint8[N,4] u) => (float y, int32 z, float v) {
        w = DequantizeLinear(W, s)  y = MatMul(x, w)
        z = MatMulInteger(u, I)
        q = QuantizeLinear(F, s)  f = DequantizeLinear(q, s)  v = Gemm(x, f) }"""
    tensors = {
        "W": np.ones((4, 3), np.int8), "I": np.ones((4, 3), np.uint8),
        "F": tiny.weight(4, 3), "s": np.array(0.5, np.float32),
    }  # fmt: skip
    weights, skips = find(tiny.model(text, tensors))
    assert not weights
    assert {skip.weight: skip.reason for skip in skips} == {
        "W": "already quantized (int8)",
        "I": "already quantized (uint8)",
        "F": "already quantized (float32)",
    }


def test_what_is_no_layer_is_not_listed() -> None:
    text = """g (float[4,4] x, int64[2] i) => (float y, float z, float v) {
        h = MatMul(x, x)  y = Add(h, B)  z = Gather(T, i)  p = MatMul(B, B)  v = Add(p, x) }"""
    assert find(tiny.model(text, {"B": tiny.weight(4, 4), "T": tiny.weight(9, 4)})) == ([], [])


def test_empty_and_integer_weights() -> None:
    text = "g (float x) => (float y) { y = MatMul(x, W) }"
    assert "empty" in skipped(tiny.model(text, {"W": np.zeros((4, 0), np.float32)})).reason
    assert "int64" in skipped(tiny.model(text.replace("float", "int64"), {"W": np.ones((4, 3), np.int64)})).reason


def test_repeated_and_missing_node_names() -> None:
    text = "g (float[N,4] x) => (float y) { [n] h = MatMul(x, A)  [n] i = MatMul(h, B)  y = MatMul(i, C) }"
    weights, _ = find(tiny.model(text, {name: tiny.weight(4, 4) for name in "ABC"}))
    assert [weight.uses[0].node for weight in weights] == ["n", "n", "y"]
    assert [weight.uses[0].output for weight in weights] == ["h", "i", "y"]


def test_both_spellings_of_the_standard_domain() -> None:
    proto = tiny.two_layers()
    proto.graph.node[0].domain = "ai.onnx"
    assert len(find(proto)[0]) == 2


def test_order_is_that_of_the_graph_not_of_the_initializers() -> None:
    proto = tiny.two_layers()
    tensors = list(reversed(proto.graph.initializer))
    copies = [numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name) for tensor in tensors]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(copies)
    assert [weight.name for weight in find(proto)[0]] == ["W1", "W2"]
