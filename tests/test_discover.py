"""Finding weights: each use must say how rows and V reproduce the node, and every other reader must stop the weight."""

from __future__ import annotations

import itertools
from functools import partial

import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny_models as tiny
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import MatrixRows, PatchRows, Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.weights import Skip, Weight


def find(proto: onnx.ModelProto, **selection: tuple[str, ...]) -> tuple[list[Weight], list[Skip]]:
    return discover(ModelFile.load(proto), Selection(**selection))


def only(proto: onnx.ModelProto) -> Weight:
    weights, skips = find(proto)
    assert len(weights) == 1, skips
    assert not skips
    return weights[0]


def skipped(proto: onnx.ModelProto) -> Skip:
    weights, skips = find(proto)
    assert not weights
    assert len(skips) == 1
    return skips[0]


def matrix_rows(x: np.ndarray, tap: Tap) -> np.ndarray:
    """Rows [g, n, d], one slice at a time."""
    form = tap.form
    assert isinstance(form, MatrixRows)
    if x.ndim == 1:
        return form.scale * np.broadcast_to(x, (tap.groups, 1, tap.width))
    if form.feature_axis == -2:
        x = np.swapaxes(x, -1, -2)
    if not form.batch:
        return form.scale * x.reshape(1, -1, tap.width)
    lead = np.broadcast_shapes(x.shape[:-2], form.batch)
    x = np.broadcast_to(x, (*lead, *x.shape[-2:]))
    x = x.reshape(-1, tap.groups, *x.shape[-2:])
    return form.scale * np.stack([x[:, g].reshape(-1, tap.width) for g in range(tap.groups)])


def patch_rows(x: np.ndarray, tap: Tap) -> np.ndarray:
    """Rows [g, n, d]: one patch per output position, by loops."""
    form = tap.form
    assert isinstance(form, PatchRows)
    spatial = x.shape[2:]
    pads = form.pads_for(spatial)
    axes = len(spatial)
    x = np.pad(x, [(0, 0), (0, 0), *((pads[a], pads[a + axes]) for a in range(axes))])
    reach = [(k - 1) * d + 1 for k, d in zip(form.kernel, form.dilations, strict=True)]
    counts = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, form.strides, strict=True)]
    channels = x.shape[1] // form.group
    groups = []
    for g in range(form.group):
        image = x[:, g * channels : (g + 1) * channels]
        rows = []
        for sample, *position in itertools.product(range(x.shape[0]), *map(range, counts)):
            window = tuple(
                slice(p * s, p * s + r, d)
                for p, s, r, d in zip(position, form.strides, reach, form.dilations, strict=True)
            )
            rows.append(image[(sample, slice(None), *window)].ravel())
        groups.append(rows)
    return np.array(groups)


def reproduces(proto: onnx.ModelProto, found: Weight, x: np.ndarray, expected: np.ndarray) -> bool:
    """Whether rows @ V equals the expected [g, n, m], and the form is invertible."""
    content = ModelFile.load(proto).initializer(found.name)
    matrix = found.form.to_matrix(content)
    assert matrix.shape == (found.groups, found.d, found.m)
    back = found.form.from_matrix(matrix)
    assert back.shape == found.shape
    assert np.array_equal(back, content)
    tap = found.uses[0].tap
    assert tap.value == "x"
    rows = patch_rows(x, tap) if isinstance(tap.form, PatchRows) else matrix_rows(x, tap)
    result = rows.astype(np.float64) @ matrix.astype(np.float64)
    return result.shape == expected.shape and np.allclose(result, expected, rtol=1e-5, atol=1e-5)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    result = ReferenceEvaluator(proto).run(None, {"x": x})
    return np.asarray(result[0], np.float64)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_gemm(side: str, trans_a: int, trans_b: int, alpha: float, beta: float) -> None:
    n, d, m = 6, 4, 3
    a, b = ((n, d), (d, m)) if side == "right" else ((m, d), (d, n))
    a, b = a[::-1] if trans_a else a, b[::-1] if trans_b else b
    x_shape, w_shape = (a, b) if side == "right" else (b, a)
    operands = "x, W" if side == "right" else "W, x"
    attributes = f"transA={trans_a}, transB={trans_b}, alpha={alpha}, beta={beta}"
    text = f"g (float{list(x_shape)} x) => (float y) {{ y = Gemm<{attributes}>({operands}, c) }}"
    c = tiny.weight(1, m) if side == "right" else tiny.weight(m, 1)
    proto = tiny.model(text, {"W": tiny.weight(*w_shape), "c": c})
    found = only(proto)
    x = tiny.weight(*x_shape, seed=1)
    product = run(proto, x) - beta * c.astype(np.float64)
    expected = (product if side == "right" else product.T)[None]
    assert (found.groups, found.d, found.m) == (1, d, m)
    assert found.uses[0].output == "y"
    assert reproduces(proto, found, x, expected)
    assert not reproduces(proto, found, x + 1, expected)  # another activation is noticed


MATMULS = {
    "matrix right": ((5, 4), (4, 3)),
    "batch of rows": ((2, 5, 4), (4, 3)),
    "vector activation": ((4,), (4, 3)),
    "vector weight right": ((2, 5, 4), (4,)),
    "two vectors": ((4,), (4,)),
    "stack of matrices": ((2, 5, 4), (2, 4, 3)),
    "stack, broadcast activation": ((5, 4), (2, 4, 3)),
    "stack under more axes": ((3, 2, 5, 4), (2, 4, 3)),
    "stack of two axes": ((2, 3, 5, 4), (2, 3, 4, 6)),
    "leading ones": ((7, 5, 4), (1, 1, 4, 3)),
    "stack, vector activation": ((4,), (2, 4, 3)),
}


@pytest.mark.parametrize("case", list(MATMULS))
@pytest.mark.parametrize("side", ["right", "left"])
def test_matmul(case: str, side: str) -> None:
    x_shape, w_shape = MATMULS[case]
    if side == "left":  # the same products, transposed
        x_shape, w_shape = (s if len(s) == 1 else (*s[:-2], s[-1], s[-2]) for s in (x_shape, w_shape))
    operands = "x, W" if side == "right" else "W, x"
    proto = tiny.model(f"g (float x) => (float y) {{ y = MatMul({operands}) }}", {"W": tiny.weight(*w_shape)})
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    proto.graph.input[0].type.tensor_type.ClearField("shape")  # the rank of x is not known beforehand
    found = only(proto)
    x, w = tiny.weight(*x_shape, seed=1), tiny.weight(*w_shape)
    y = np.matmul(x, w) if side == "right" else np.matmul(w, x)
    if side == "left" and x.ndim > 1 and w.ndim > 1:
        y = np.swapaxes(y, -1, -2)
    groups, m = found.groups, found.m
    if groups == 1:
        expected = y.reshape(1, -1, m)
    else:
        rows = 1 if x.ndim == 1 else y.shape[-2]
        expected = y.reshape(-1, groups, rows, m).transpose(1, 0, 2, 3).reshape(groups, -1, m)
    assert groups == (int(np.prod(w_shape[:-2])) if len(w_shape) > 2 and "ones" not in case else 1)
    assert reproduces(proto, found, x, expected)
    assert not reproduces(proto, found, x + 1, expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_fused_matmul(side: str, trans_a: int, trans_b: int) -> None:
    a, b = ((5, 4), (4, 3)) if side == "right" else ((3, 4), (4, 5))
    a, b = a[::-1] if trans_a else a, b[::-1] if trans_b else b
    x_shape, w_shape = (a, b) if side == "right" else (b, a)
    operands = "x, W" if side == "right" else "W, x"
    text = f"""g (float x) => (float y)
    {{ y = com.microsoft.FusedMatMul<transA={trans_a}, transB={trans_b}, alpha=0.5>({operands}) }}"""
    proto = tiny.model(text, {"W": tiny.weight(*w_shape)}, imports=', "com.microsoft":1')
    x, w = tiny.weight(*x_shape, seed=1), tiny.weight(*w_shape)
    left, right = (x, w) if side == "right" else (w, x)
    y = 0.5 * (left.T if trans_a else left) @ (right.T if trans_b else right)
    assert reproduces(proto, only(proto), x, (y if side == "right" else y.T)[None])


def test_fused_matmul_over_batch_axes_is_left_alone() -> None:
    text = "g (float x) => (float y) { y = com.microsoft.FusedMatMul<transBatchA=1>(x, W) }"
    proto = tiny.model(text, {"W": tiny.weight(4, 3)}, imports=', "com.microsoft":1')
    assert "transBatchA" in skipped(proto).reason


CONVS = {
    "plain": ((2, 3, 5, 6), (4, 3, 3, 2), ""),
    "strides and pads": ((2, 3, 6, 5), (4, 3, 3, 3), "strides=[2,1], pads=[1,0,2,1]"),
    "dilations": ((1, 2, 7, 8), (3, 2, 2, 3), "dilations=[2,3]"),
    "groups": ((2, 4, 5, 5), (6, 2, 3, 3), "group=2"),
    "depthwise": ((1, 3, 5, 5), (6, 1, 3, 3), "group=3, pads=[1,1,1,1]"),
    "same upper": ((1, 2, 5, 6), (3, 2, 2, 3), 'auto_pad="SAME_UPPER", strides=[2,2]'),
    "same lower": ((1, 2, 5, 6), (3, 2, 2, 3), 'auto_pad="SAME_LOWER", strides=[2,1]'),
    "valid": ((1, 2, 5, 6), (3, 2, 2, 3), 'auto_pad="VALID", kernel_shape=[2,3]'),
    "one axis": ((2, 3, 9), (4, 3, 4), "strides=[2], pads=[1,2]"),
    "three axes": ((1, 2, 4, 3, 5), (3, 2, 2, 2, 2), "strides=[1,1,2]"),
    "pointwise": ((2, 3, 4, 4), (5, 3, 1, 1), ""),
}


@pytest.mark.parametrize("case", list(CONVS))
def test_conv(case: str) -> None:
    x_shape, w_shape, attributes = CONVS[case]
    attributes = f"<{attributes}>" if attributes else ""
    text = f"g (float{list(x_shape)} x) => (float{['n'] * len(x_shape)} y) {{ y = Conv{attributes}(x, W, b) }}"
    text = text.replace("'n'", "N")
    proto = tiny.model(text, {"W": tiny.weight(*w_shape), "b": np.zeros(w_shape[0], np.float32)})
    found = only(proto)
    x = tiny.weight(*x_shape, seed=1)
    import onnxruntime as ort  # the reference evaluator has no SAME_LOWER and no third axis

    y = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    group = found.uses[0].tap.form.group
    y = y.reshape(y.shape[0], group, w_shape[0] // group, -1)
    expected = y.transpose(1, 0, 3, 2).reshape(group, -1, w_shape[0] // group)
    assert reproduces(proto, found, x, expected)
    assert not reproduces(proto, found, x + 1, expected)


def test_values_of_gemm_that_leave_no_equation() -> None:
    text = "g (float[5,4] x) => (float y) { y = Gemm<alpha=0.0>(x, W) }"
    assert "alpha is 0" in skipped(tiny.model(text, {"W": tiny.weight(4, 3)})).reason


# --- on the way from the constant to the layer ---

WAYS = {
    "identity": ("w = Identity(W)", (4, 3)),
    "transpose": ("w = Transpose(W)", (3, 4)),
    "two transposes": ("t = Transpose<perm=[1,0]>(W)  w = Transpose(t)", (4, 3)),
    "cast": ("w = Cast<to=1>(W)", (4, 3)),
    "reshape": ("s = Constant<value=int64[2] {0, -1}>()  w = Reshape(W, s)", (4, 3, 1)),
    "reshape by attribute": ("s = Constant<value_ints=[-1, 3]>()  w = Reshape(W, s)", (4, 3, 1)),
    "flatten": ("w = Flatten<axis=2>(W)", (2, 2, 3)),
    "squeeze": ("a = Constant<value=int64[1] {-1}>()  w = Squeeze(W, a)", (4, 3, 1)),
    "squeeze all": ("w = Squeeze(W)", (1, 4, 1, 3)),
    "unsqueeze": ("a = Constant<value=int64[2] {0, -3}>()  w = Unsqueeze(W, a)", (4, 3)),
    "together": ("t = Transpose(W)  a = Constant<value=int64[1] {0}>()  u = Unsqueeze(t, a)  w = Identity(u)", (3, 4)),
}


@pytest.mark.parametrize("case", list(WAYS))
def test_weight_behind_rearrangement(case: str) -> None:
    way, shape = WAYS[case]
    dtype = np.float64 if case == "cast" else np.float32
    text = f"g (float[5,4] x) => (float y) {{ {way}  y = MatMul(x, w) }}"
    proto = tiny.model(text, {"W": tiny.weight(*shape, dtype=dtype)})
    found = only(proto)
    assert found.dtype == np.dtype(dtype).name
    x = tiny.weight(5, 4, seed=1)
    assert reproduces(proto, found, x, run(proto, x).reshape(1, 5, 3))


def test_old_opsets_hold_shapes_in_attributes() -> None:
    text = """g (float[5,4] x) => (float y)
    { u = Unsqueeze<axes=[0]>(W)  q = Squeeze<axes=[0]>(u)  y = MatMul(x, q) }"""
    proto = tiny.model(text, {"W": tiny.weight(4, 3)}, opset=7)
    assert only(proto).form.result_shape == (1, 4, 3)


def test_reshape_to_a_computed_shape_is_left_alone() -> None:
    text = """g (float[5,4] x, int64[2] s) => (float y) { w = Reshape(W, s)  y = MatMul(x, w) }"""
    weights, skips = find(tiny.model(text, {"W": tiny.weight(4, 3)}))
    assert not weights
    assert not skips  # two computed values multiply: there is no constant weight


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
    assert (found.name, found.owner) == ("k", "constant")
    assert found.uses[0].node == ("layer" if named else "y")


def test_ir_3_initializers_are_inputs_too() -> None:
    text = "g (float[5,4] x) => (float y) { y = Gemm(x, W, b) }"
    proto = tiny.model(text, {"W": tiny.weight(4, 3), "b": tiny.weight(3)}, opset=7, ir_version=3, inputs_too=True)
    found = only(proto)
    assert (found.name, found.owner) == ("W", "initializer")
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


# --- more than one reader ---


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
    assert [weight.owner for weight in weights] == ["initializer", "constant", "initializer"]
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


# --- selection ---

CHOICES = {
    "all": ({}, ["W1", "W2"]),
    "node": ({"include": ("h",)}, ["W1"]),
    "initializer": ({"include": ("W2",)}, ["W2"]),
    "glob": ({"include": ("W*",)}, ["W1", "W2"]),
    "regular expression": ({"include": ("re:[12]$",)}, ["W1", "W2"]),
    "anchored": ({"include": ("re:^h$",)}, ["W1"]),
    "excluded": ({"exclude": ("W1",)}, ["W2"]),
    "exclusion wins": ({"include": ("W*",), "exclude": ("y",)}, ["W1"]),
    "operator": ({"op_types": ("Gemm",)}, ["W1"]),
    "both": ({"include": ("W*",), "op_types": ("MatMul",)}, ["W2"]),
}


@pytest.mark.parametrize("case", list(CHOICES))
def test_selection(case: str) -> None:
    selection, expected = CHOICES[case]
    weights, skips = find(tiny.two_layers(), **selection)
    assert [weight.name for weight in weights] == expected
    assert {skip.weight for skip in skips} == {"W1", "W2"} - set(expected)
    patterns = selection.get("exclude", ())
    assert all(skip.reason in {"not selected", *(f"excluded by {p!r}" for p in patterns)} for skip in skips)


def test_an_exact_name_may_hold_glob_characters() -> None:
    text = "g (float[N,4] x) => (float y) { h = MatMul(x, A)  y = MatMul(h, B) }"
    proto = tiny.model(text, {"A": tiny.weight(4, 4), "B": tiny.weight(4, 4)})
    proto.graph.node[0].name = "layer[0]"
    assert [weight.name for weight in find(proto, include=("layer[0]",))[0]] == ["A"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"include": ("w1",)}, "Close matches: 'W1'"),
        ({"exclude": ("nothing*",)}, "--nodes-to-exclude"),
        ({"include": ("re:(",)}, "no regular expression"),
        ({"op_types": ("gemm",)}, "Close matches: 'Gemm'"),
        ({"op_types": ("Conv",)}, "fits no layer"),
    ],
)
def test_patterns_that_fit_nothing(selection: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        find(tiny.two_layers(), **selection)


def test_names_of_skipped_layers_may_be_excluded() -> None:
    text = "g (float[N,4] x) => (float y) { h = MatMul(x, W)  y = Add(h, W) }"
    select = partial(find, tiny.model(text, {"W": tiny.weight(4, 4)}))
    assert select(exclude=("W",)) == select()
