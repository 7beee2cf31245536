"""Operators beyond plain matrix products: the freedom that a match leaves is what the runtime leaves, no more.

For operators that are linear in the weight the reference is the whole linear map from weight to output, made column by
column with ONNX Runtime or numpy. For recurrent ones it is the outputs of weights moved inside and outside the freedom.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import coverage_table as coverage
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models as tiny
import torch
from onnx import numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import AxisRows, MatrixRows, Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.weights import Weight
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import observe, to_rows


def find(proto: onnx.ModelProto) -> tuple[dict[str, Weight], dict[str | None, str]]:
    weights, skips = discover(ModelFile.load(proto), Selection())
    return {weight.name: weight for weight in weights}, {skip.weight: skip.reason for skip in skips}


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def rows_of(weight: Weight, values: dict[str, np.ndarray]) -> np.ndarray:
    """Rows [g, n, d] of all uses, stacked."""
    found = [to_rows(torch.from_numpy(values[use.tap.value]), use.tap).double().numpy() for use in weight.uses]
    return np.concatenate(found, axis=1)


def null_projectors(rows: np.ndarray) -> np.ndarray:
    """Projectors [g, d, d] on what the rows of each group do not see."""
    return np.eye(rows.shape[-1]) - np.linalg.pinv(rows) @ rows


def linear_map(apply: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The matrix [outputs, weights] of a linear map, one column per entry of the weight."""
    columns = []
    for index in range(int(np.prod(shape))):
        basis = np.zeros(int(np.prod(shape)))
        basis[index] = 1
        columns.append(apply(basis.reshape(shape)).ravel())
    return np.array(columns).T


def is_exactly_the_freedom(weight: Weight, rows: np.ndarray, jacobian: np.ndarray) -> bool:
    """Whether the weights that leave rows @ V alone are those that leave the output alone, no more and no fewer."""
    projectors = null_projectors(rows)
    free = sum(round(float(np.trace(projector))) for projector in projectors) * weight.m
    random = np.random.default_rng(3).standard_normal((weight.groups, weight.d, weight.m))
    inside = weight.form.from_matrix(projectors @ random).ravel()
    scale = np.abs(jacobian).max()
    unmoved = np.abs(jacobian @ inside).max() < 1e-5 * scale * np.abs(random).max()
    return unmoved and free == jacobian.shape[1] - np.linalg.matrix_rank(jacobian, tol=1e-4 * scale)


EINSUMS = {
    "matmul": ("ij,jk->ik", (3, 5), (5, 2)),
    "columns first": ("ij,kj->ki", (3, 5), (2, 5)),
    "one more axis": ("bsd,dh->bsh", (1, 3, 5), (5, 2)),
    "features in the middle": ("bds,dh->bsh", (1, 5, 3), (5, 2)),
    "features first": ("dbs,dh->bsh", (5, 1, 3), (5, 2)),
    "heads out": ("bsd,dnh->bsnh", (1, 3, 5), (5, 2, 3)),
    "heads in": ("bsnh,nhd->bsd", (1, 3, 2, 3), (2, 3, 4)),
    "heads in, other order": ("bnsh,hnd->bsd", (1, 2, 3, 3), (3, 2, 4)),
    "a problem per head": ("bsnh,nhd->bsnd", (1, 2, 3, 4), (3, 4, 2)),
    "a problem per pair": ("abid,badk->abik", (2, 3, 2, 4), (3, 2, 4, 2)),
    "ellipsis": ("...d,dh->...h", (2, 1, 5), (5, 2)),
    "ellipsis in the middle": ("n...d,ndh->n...h", (2, 1, 3, 5), (2, 5, 3)),
    "ellipsis and implicit output": ("...d,dh", (2, 1, 5), (5, 2)),
    "implicit output": ("ji,jk", (5, 3), (5, 2)),
    "implicit output in order of letters": ("ac,cb", (3, 5), (5, 2)),
    "whole operands": ("ij,ij->", (2, 3), (2, 3)),
    "vector": ("d,dh->h", (5,), (5, 2)),
    "spaces and capitals": (" b S d , d H -> b S H ", (1, 3, 5), (5, 2)),
}


@pytest.mark.parametrize("case", list(EINSUMS))
@pytest.mark.parametrize("side", ["right", "left"])
def test_einsum(case: str, side: str) -> None:
    equation, x_shape, w_shape = EINSUMS[case]
    operands, given = "x, W", equation
    if side == "left":
        left, arrow, out = equation.partition("->")
        operands, given = "W, x", ",".join(reversed(left.split(","))) + arrow + out
    text = f'g (float{list(x_shape)} x) => (float y) {{ y = Einsum<equation="{given}">({operands}) }}'
    proto = tiny.model(text, {"W": tiny.weight(*w_shape)})
    weights, skips = find(proto)
    assert not skips
    weight, x = weights["W"], tiny.weight(*x_shape, seed=1)
    rows = rows_of(weight, {"x": x})

    def apply(w: np.ndarray) -> np.ndarray:
        return np.einsum(equation, x.astype(np.float64), w)

    jacobian = linear_map(apply, w_shape)
    y = run(proto, {"x": x})[0]
    assert np.allclose(y.ravel(), jacobian @ tiny.weight(*w_shape).ravel(), atol=1e-5)
    assert is_exactly_the_freedom(weight, rows, jacobian)
    # Other rows of the same shape leave another freedom.
    assert not is_exactly_the_freedom(weight, np.random.default_rng(4).standard_normal(rows.shape), jacobian)
    # In pieces of one row the moments are the same.
    moments = InputMoments(weight.groups, weight.d)
    observe(moments, weight.uses[0].tap, torch.from_numpy(x))
    assert moments.rows == rows.shape[1]
    assert np.allclose(moments.gram().numpy(), np.swapaxes(rows, 1, 2) @ rows, atol=1e-6)


NO_CONTRACTIONS = {
    "diagonal of the weight": ("ij,jj->i", (3, 5), (5, 5), "diagonal"),
    "diagonal of the activation": ("jj,jk->k", (5, 5), (5, 2), "diagonal"),
    "weight summed": ("ij,jk->i", (3, 5), (5, 2), "of the weight alone"),
    "activation summed": ("ij,jk->k", (3, 5), (5, 2), "of the activation alone"),
    "elementwise": ("ij,j->ij", (3, 5), (5,), "contracts nothing"),
    "outer product": ("i,j->ij", (3,), (5,), "contracts nothing"),
    "ellipsis in the weight": ("...ij,...jk->...ik", (3, 5), (5, 2), "under an ellipsis"),
    "broadcast": ("ij,jk->ik", (3, 5), (1, 2), "broadcast"),
    "malformed": ("ij,jk,->ik", (3, 5), (5, 2), "does not fit"),
    "no equation": ("?", (3, 5), (5, 2), "does not fit"),
}


@pytest.mark.parametrize("case", list(NO_CONTRACTIONS))
def test_einsum_that_is_no_plain_contraction(case: str) -> None:
    equation, x_shape, w_shape, reason = NO_CONTRACTIONS[case]
    text = f'g (float{list(x_shape)} x) => (float y) {{ z = FancyOp(x)  y = Einsum<equation="{equation}">(x, W) }}'
    weights, skips = find(tiny.model(text, {"W": tiny.weight(*w_shape)}))
    assert not weights
    assert reason in skips["W"]


def test_einsum_of_three_operands_is_left_alone() -> None:
    text = 'g (float[3,5] x) => (float y) { y = Einsum<equation="ij,jk,kl->il">(x, W, V) }'
    weights, skips = find(tiny.model(text, {"W": tiny.weight(5, 4), "V": tiny.weight(4, 2)}))
    assert not weights
    assert skips.keys() == {"W", "V"}
    assert all("3 operands" in reason for reason in skips.values())


def test_einsum_shares_the_statistic_of_a_matmul() -> None:
    text = 'g (float[3,5] x) => (float y, float z) { y = MatMul(x, A)  z = Einsum<equation="ij,kj->ik">(x, B) }'
    weights, _ = find(tiny.model(text, {"A": tiny.weight(5, 4), "B": tiny.weight(4, 5)}))
    assert weights["A"].uses[0].tap == weights["B"].uses[0].tap == Tap("x", MatrixRows(), 1, 5)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 5, 3)])
def test_axes_that_do_not_fit_are_an_error(shape: tuple[int, ...]) -> None:
    tap = Tap("x", AxisRows((1, 2), (0,)), groups=2, width=15)
    with pytest.raises(InputError, match=r"value 'x' has shape"):
        to_rows(torch.zeros(*shape[:-1], shape[-1] + 1), tap)
    assert to_rows(torch.zeros(2, 5, 3), tap).shape == (2, 1, 15)


TRANSPOSED = {
    "plain": ((1, 6, 2, 2), (6, 2, 2, 3), ""),
    "no overlap": ((1, 6, 2, 2), (6, 2, 2, 3), "strides=[2,3]"),
    "strides": ((1, 6, 2, 2), (6, 2, 2, 2), "strides=[2,1], pads=[0,1,1,0]"),
    "dilations": ((1, 6, 1, 2), (6, 2, 2, 2), "dilations=[1,2]"),
    "groups": ((1, 8, 1, 2), (8, 3, 2, 2), "group=2"),
    "depthwise": ((1, 2, 2, 2), (2, 1, 2, 2), "group=2"),
    "one axis": ((2, 6, 2), (6, 3, 2), "strides=[2]"),
    "three axes": ((1, 5, 1, 2, 2), (5, 1, 2, 1, 2), ""),
}


@pytest.mark.parametrize("case", list(TRANSPOSED))
def test_conv_transpose(case: str) -> None:
    x_shape, w_shape, attributes = TRANSPOSED[case]
    attributes = f"<{attributes}>" if attributes else ""
    text = f"g (float{list(x_shape)} x) => (float y) {{ y = ConvTranspose{attributes}(x, W) }}"
    proto = tiny.model(text, {"W": tiny.weight(*w_shape)})
    weights, skips = find(proto)
    assert not skips
    weight, x = weights["W"], tiny.weight(*x_shape, seed=1)
    fed = tiny.model(text.replace(" x)", f" x, float{list(w_shape)} W)"))
    session = onnxruntime.InferenceSession(fed.SerializeToString(), providers=["CPUExecutionProvider"])
    jacobian = linear_map(lambda w: session.run(None, {"x": x, "W": w.astype(np.float32)})[0], w_shape)
    rows = rows_of(weight, {"x": x})
    # Patches that overlap or are cut off leave more freedom than the match uses, never less.
    projectors = null_projectors(rows)
    random = np.random.default_rng(3).standard_normal((weight.groups, weight.d, weight.m))
    inside = weight.form.from_matrix(projectors @ random)
    outside = weight.form.from_matrix(random - projectors @ random)
    assert np.abs(jacobian @ inside.ravel()).max() < 1e-5 * np.abs(jacobian).max()
    assert np.abs(jacobian @ outside.ravel()).max() > 1e-2
    if case in {"no overlap", "one axis"}:
        assert is_exactly_the_freedom(weight, rows, jacobian)


def test_conv_transpose_weights_that_fit_nowhere() -> None:
    text = "g (float x) => (float y) { y = ConvTranspose<group=4>(x, W) }"
    assert "cannot be divided" in find(tiny.model(text, {"W": tiny.weight(6, 2, 3)}))[1]["W"]
    assert "at least 3 axes" in find(tiny.model(text, {"W": tiny.weight(6, 2)}))[1]["W"]


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(
    op: str, directions: int, attributes: str = "", *, state: str = "", outputs: str = "y, h"
) -> onnx.ModelProto:
    """X [3 steps, 1, 6] through one layer of width 9: three rows for W, and three states (and a zero one) for R."""
    k, i, h = GATES[op], 6, 9
    direction = "bidirectional" if directions == 2 else "forward"
    inputs = f"x, W, R, B, , {state}" if state else "x, W, R, B"
    declared = ", ".join(f"float {name}" for name in outputs.replace(" ", "").split(",") if name)
    given = f", float[{directions},1,{h}] s" if state == "s" else ""
    text = f"""g (float[3,1,{i}] x{given}) => ({declared})
        {{ [cell] {outputs} = {op}<hidden_size={h}, direction="{direction}"{attributes}>({inputs}) }}"""
    tensors = {
        "W": tiny.weight(directions, k * h, i),
        "R": tiny.weight(directions, k * h, h) / 2,
        "B": tiny.weight(directions, 2 * k * h),
    }
    if state == "S":
        tensors["S"] = tiny.weight(directions, 1, h)
    if state == "Z":
        tensors["Z"] = np.zeros((directions, 1, h), np.float32)
    return tiny.model(text, tensors)


@pytest.mark.parametrize("op", list(GATES))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("state", ["", "Z", "S", "s"])
@pytest.mark.parametrize("name", ["W", "R"])
def test_recurrent_weights(op: str, directions: int, state: str, name: str) -> None:
    proto = recurrent(op, directions, ", linear_before_reset=1" if op == "GRU" else "", state=state)
    weights, skips = find(proto)
    assert not skips
    weight = weights[name]
    feeds = {"x": tiny.weight(3, 1, 6, seed=1)}
    if state == "s":
        feeds["s"] = tiny.weight(directions, 1, 9, seed=2)
    y, h = run(proto, feeds)
    constants = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in proto.graph.initializer}
    rows = rows_of(weight, feeds | {"y": y} | constants)
    expected = (1, 3, 6) if name == "W" else (directions, 4 if state else 3, 9)
    assert rows.shape == expected
    assert weight.groups * weight.m == directions * GATES[op] * 9
    projectors = null_projectors(rows)
    random = np.random.default_rng(3).standard_normal((weight.groups, weight.d, weight.m))
    model = ModelFile.load(proto)
    change = {"inside": projectors @ random, "outside": random - projectors @ random}
    moved = {}
    for where, matrix in change.items():
        array = (model.initializer(name) + weight.form.from_matrix(matrix)).astype(np.float32)
        results = run(tiny.patched(model, {name: array}), feeds)
        moved[where] = max(np.abs(a - b).max() for a, b in zip(results, (y, h), strict=True))
    assert moved["inside"] < 2e-5
    assert moved["outside"] > 1e-2


def test_a_constant_initial_state_may_lie_in_an_external_file(tmp_path: Path) -> None:
    path = tiny.save_external(recurrent("LSTM", 1, state="S"), tmp_path / "model.onnx", {"S": "s.data"})
    weights, skips = discover(ModelFile.load(path), Selection())
    assert [weight.name for weight in weights] == ["W", "R"]
    assert [use.tap.value for use in weights[1].uses] == ["y", "S"]
    assert not skips


def with_default(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with an initializer that may be fed."""
    shape = next(tensor.dims for tensor in proto.graph.initializer if tensor.name == name)
    proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return proto


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (recurrent("GRU", 1), "resets the state"),
        (with_default(recurrent("LSTM", 1, state="S"), "S"), "the constant 'S' that it meets cannot be captured"),
        (recurrent("LSTM", 1, outputs=", h"), "does not output its hidden states"),
        (recurrent("RNN", 1, ", layout=1"), "layout 1"),
    ],
)
def test_recurrent_weights_whose_input_is_unknown(proto: onnx.ModelProto, reason: str) -> None:
    weights, skips = find(proto)
    assert list(weights) == ["W"]
    assert reason in skips["R"]


@pytest.mark.parametrize("layer", list(coverage.layers()), ids=lambda layer: f"{layer.operator}, {layer.orientation}")
def test_every_row_of_the_coverage_table_leaves_its_freedom(layer: coverage.Layer) -> None:
    """Moved inside the freedom, the weight of a layer that is shifted gives the same outputs; outside, others."""
    proto = coverage.plain_model(layer, "float32")
    weights, skips = find(proto)
    if "W" not in weights:
        assert "shifted" not in coverage.main_graph(layer, "float32"), skips
        return
    weight, feeds = weights["W"], {"x": tiny.weight(*layer.x, seed=1)}
    model = ModelFile.load(proto)
    captured = onnx.ModelProto.FromString(probe_model(model, [use.tap for use in weight.uses]))
    names = [output.name for output in captured.graph.output]
    rows = rows_of(weight, feeds | dict(zip(names, run(captured, feeds), strict=True)))
    projectors = null_projectors(rows)
    random = np.random.default_rng(3).standard_normal((weight.groups, weight.d, weight.m))
    y, moved = run(proto, feeds, ["y"])[0], {}
    for where, matrix in (("inside", projectors @ random), ("outside", random - projectors @ random)):
        array = (model.initializer("W") + weight.form.from_matrix(matrix)).astype(np.float32)
        moved[where] = float(np.abs(run(tiny.patched(model, {"W": array}), feeds, ["y"])[0] - y).max())
    assert moved["inside"] < 2e-5
    assert moved["outside"] > 1e-2


QUANTIZED = {
    "MatMulNBits": "y = com.microsoft.MatMulNBits<K=4, N=3, bits=4, block_size=16>(x, W, s)",
    "QAttention": "y = com.microsoft.QAttention<num_heads=2>(x, W, b, s, s)",
    "DynamicQuantizeMatMul": "y = com.microsoft.DynamicQuantizeMatMul(x, W, s)",
    "DynamicQuantizeLSTM": "y = com.microsoft.DynamicQuantizeLSTM<hidden_size=2>(x, W, R)",
}


@pytest.mark.parametrize("case", list(QUANTIZED))
def test_quantized_operators_say_so(case: str) -> None:
    text = f"g (float x, float b) => (float y) {{ {QUANTIZED[case]} }}"
    tensors = {"W": np.ones((4, 3), np.uint8), "R": np.ones((4, 3), np.uint8), "s": np.ones(3, np.float32)}
    weights, skips = find(tiny.model(text, tensors, imports=', "com.microsoft":1'))
    assert not weights
    assert skips["W"] == "already quantized (uint8)"
