"""Matchers of matrix products and convolutions: the rows and the matrix V that they name reproduce the node."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import tiny_models as tiny
from discovery import only, skipped
from onnx.reference import ReferenceEvaluator

from onnx_optshift.geometry import MatrixRows, PatchRows, Tap
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.weights import Weight


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


WAYS = {
    "identity": ("w = Identity(W)", (4, 3)),
    "transpose": ("w = Transpose(W)", (3, 4)),
    "two transposes": ("t = Transpose<perm=[1,0]>(W)  w = Transpose(t)", (4, 3)),
    "cast": ("w = Cast<to=1>(W)", (4, 3)),
    "reshape": ("s = Constant<value=int64[2] {0, -1}>()  w = Reshape(W, s)", (4, 3, 1)),
    "reshape by attribute": ("s = Constant<value_ints=[-1, 3]>()  w = Reshape(W, s)", (4, 3, 1)),
    "flatten": ("w = Flatten<axis=2>(W)", (2, 2, 3)),
    "squeeze": ("a = Constant<value=int64[1] {-1}>()  w = Squeeze(W, a)", (4, 3, 1)),
    "squeeze two": ("a = Constant<value=int64[2] {0, -1}>()  w = Squeeze(W, a)", (1, 4, 3, 1)),
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
