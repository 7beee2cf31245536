"""Which weights are shifted: operator x orientation x dtype x place, found out by trying. Writes docs/coverage.md.

    python tools/coverage_table.py [--check]

Every cell is a run of the whole pass on a model of one layer with fewer samples than features. With
`--check` nothing is written; exit status 1 if docs/coverage.md is not what would be written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, parser

import onnx_optshift
from onnx_optshift.errors import InputError
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection

TARGET = Path(__file__).parents[1] / "docs" / "coverage.md"
DTYPES = {
    "float32": (TensorProto.FLOAT, "float", np.float32),
    "float16": (TensorProto.FLOAT16, "float16", np.float16),
    "bfloat16": (TensorProto.BFLOAT16, "bfloat16", ml_dtypes.bfloat16),
    "float64": (TensorProto.DOUBLE, "double", np.float64),
}
PLACES = ("If", "Loop", "Scan", "function")
ONNX_OPSET = 21


@dataclass(frozen=True)
class Layer:
    """One way to multiply with a weight.

    Attributes:
        operator: As it is called in the table.
        orientation: What is particular about this way.
        text: Nodes that compute `y` from `x` and the weight `W`.
        x: Shape of the activation, samples first.
        w: Shape of the weight.
        quantized: Whether W holds integers.
        more: Other initializers that the nodes read, by shape.
    """

    operator: str
    orientation: str
    text: str
    x: tuple[int, ...] = (2, 6)
    w: tuple[int, ...] = (6, 4)
    quantized: bool = False
    more: tuple[tuple[str, tuple[int, ...]], ...] = ()


_SEQUENCE, _IMAGE = (2, 1, 6), (1, 9, 2, 2)
_RECURRENT = {"RNN": 1, "GRU": 3, "LSTM": 4}


def layers() -> Iterator[Layer]:
    """All rows of the first table."""
    yield Layer("Gemm", "weight right", "y = Gemm(x, W)")
    yield Layer("Gemm", "weight right, transB", "y = Gemm<transB=1>(x, W)", w=(4, 6))
    yield Layer("Gemm", "weight left", "y = Gemm<transB=1>(W, x)", w=(4, 6))
    yield Layer("Gemm", "weight left, transA", "y = Gemm<transA=1, transB=1>(W, x)")
    yield Layer("Gemm", "alpha = 0", "y = Gemm<alpha=0.0>(x, W)")
    yield Layer("MatMul", "weight right", "y = MatMul(x, W)")
    yield Layer("MatMul", "weight right, more axes", "y = MatMul(x, W)", x=_SEQUENCE)
    yield Layer("MatMul", "weight left", "t = Transpose(x)  y = MatMul(W, t)", w=(4, 6))
    yield Layer("MatMul", "vector", "y = MatMul(x, W)", w=(6,))
    yield Layer("MatMul", "stack of matrices", "y = MatMul(x, W)", x=(2, 3, 1, 6), w=(3, 6, 4))
    yield Layer("FusedMatMul", "transB, alpha", "y = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(x, W)", w=(4, 6))
    yield Layer(
        "FusedMatMul", "transBatchB", "y = com.microsoft.FusedMatMul<transBatchB=1>(x, W)", (6, 2, 6), (6, 6, 4)
    )
    yield Layer("TransposeMatMul", "transA", "t = Transpose(x)  y = com.microsoft.TransposeMatMul<transA=1>(t, W)")
    yield Layer("Conv", "one axis", "y = Conv(x, W)", (1, 4, 5), (3, 4, 3))
    yield Layer("Conv", "two axes", "y = Conv(x, W)", (1, 4, 3, 3), (3, 4, 2, 2))
    yield Layer("Conv", "three axes", "y = Conv(x, W)", (1, 4, 2, 2, 2), (3, 4, 2, 2, 2))
    yield Layer("Conv", "groups", "y = Conv<group=2>(x, W)", (1, 4, 3, 3), (6, 2, 2, 2))
    yield Layer("Conv", "depthwise", "y = Conv<group=4>(x, W)", (1, 4, 2, 2), (4, 1, 2, 2))
    yield Layer(
        "Conv", "auto_pad, strides", 'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, W)', (1, 4, 3, 3), (3, 4, 3, 3)
    )
    yield Layer("Conv", "dilations", "y = Conv<dilations=[2,2]>(x, W)", (1, 4, 4, 4), (3, 4, 2, 2))
    yield Layer(
        "FusedConv", "with its activation", 'y = com.microsoft.FusedConv<activation="Relu">(x, W)', _IMAGE, (3, 9, 1, 1)
    )
    yield Layer("ConvTranspose", "any", "y = ConvTranspose<strides=[2,2]>(x, W)", _IMAGE, (9, 3, 2, 2))
    yield Layer("ConvTranspose", "groups", "y = ConvTranspose<group=2>(x, W)", (1, 10, 2, 2), (10, 3, 2, 2))
    yield Layer(
        "ConvTransposeWithDynamicPads",
        "any",
        "p = Constant<value=int64[4] {0, 1, 1, 0}>()  y = com.microsoft.ConvTransposeWithDynamicPads(x, W, p)",
        _IMAGE,
        (9, 3, 2, 2),
    )
    yield Layer(
        "CausalConvWithState",
        "one axis",
        "y, s = com.microsoft.CausalConvWithState<dilation=2>(x, W)",
        (1, 4, 3),
        (4, 1, 5),
    )
    yield Layer(
        "CausalConvWithState",
        "goes on from a state",
        "y, s = com.microsoft.CausalConvWithState(x, W, , S)",
        (1, 4, 3),
        (4, 1, 5),
        more=(("S", (1, 4, 4)),),
    )
    yield Layer("Einsum", "one axis contracted", 'y = Einsum<equation="nsd,dh->nsh">(x, W)', _SEQUENCE)
    yield Layer("Einsum", "several axes contracted", 'y = Einsum<equation="nhd,hdm->nm">(x, W)', (2, 2, 3), (2, 3, 4))
    yield Layer(
        "Einsum", "a problem for each letter in all", 'y = Einsum<equation="nhd,hdm->nhm">(x, W)', (2, 3, 6), (3, 6, 4)
    )
    yield Layer("Einsum", "an axis of the weight alone summed", 'y = Einsum<equation="nd,dh->n">(x, W)')
    yield Layer("Einsum", "diagonal", 'y = Einsum<equation="nd,dd->n">(x, W)', w=(6, 6))
    for op, gates in _RECURRENT.items():
        reset = "<hidden_size=6, linear_before_reset=1>" if op == "GRU" else "<hidden_size=6>"
        bias, w = (("R", (1, 6 * gates, 6)), ("B", (1, 12 * gates))), (1, 6 * gates, 6)
        rest = (("R", (1, 6 * gates, 6)),)
        yield Layer(op, "input weights W", f"y, h = {op}{reset}(x, W, R)", _SEQUENCE, w, more=rest)
        note = ", linear_before_reset = 1" if op == "GRU" else ""
        yield Layer(op, f"recurrent weights R{note}", f"y, h = {op}{reset}(x, R, W, B)", _SEQUENCE, w, more=bias)
    yield Layer(
        "GRU",
        "recurrent weights R",
        "y, h = GRU<hidden_size=6>(x, R, W)",
        _SEQUENCE,
        (1, 18, 6),
        more=(("R", (1, 18, 6)),),
    )
    yield Layer(
        "LSTM",
        "recurrent weights R, from a constant state",
        "y, h = LSTM<hidden_size=6>(x, R, W, , , S)",
        _SEQUENCE,
        (1, 24, 6),
        more=(("R", (1, 24, 6)), ("S", (1, 1, 6))),
    )
    yield Layer(
        "LSTM",
        "recurrent weights R, Y not computed",
        " , y = LSTM<hidden_size=6>(x, R, W)",
        _SEQUENCE,
        (1, 24, 6),
        more=(("R", (1, 24, 6)),),
    )
    yield Layer(
        "Attention",
        "projections",
        "y = com.microsoft.Attention<num_heads=2>(x, W, B)",
        (1, 2, 6),
        (6, 18),
        more=(("B", (18,)),),
    )
    yield Layer("DeformConv", "any", "y = DeformConv(x, W, O)", (1, 4, 3, 3), (3, 4, 2, 2), more=(("O", (1, 8, 2, 2)),))
    yield Layer(
        "QAttention",
        "any",
        "y = com.microsoft.QAttention<num_heads=2>(x, W, B, S, S)",
        _SEQUENCE,
        quantized=True,
        more=(("B", (4,)), ("S", (1,))),
    )
    yield Layer(
        "MatMulNBits",
        "any",
        "y = com.microsoft.MatMulNBits<K=6, N=4, bits=4, block_size=16>(x, W, S)",
        quantized=True,
        more=(("S", (4,)),),
    )
    yield Layer(
        "MatMulInteger, ConvInteger, QLinear...",
        "any",
        "q, s, z = DynamicQuantizeLinear(x)  y = MatMulInteger(q, W)",
        quantized=True,
    )


# On the way from the initializer to a MatMul of [2, 6] with [6, 4]: (what, nodes that make w of W, shape of W).
WAYS = (
    ("Identity", "w = Identity(W)", (6, 4)),
    ("Transpose", "w = Transpose(W)", (4, 6)),
    ("Reshape to a constant shape", "s = Constant<value=int64[2] {6, -1}>()  w = Reshape(W, s)", (24,)),
    ("Reshape to a shape that is computed", "s = Shape(W)  w = Reshape(W, s)", (6, 4)),
    ("Flatten", "w = Flatten<axis=2>(W)", (2, 3, 4)),
    ("Squeeze", "w = Squeeze(W)", (6, 1, 4)),
    ("Unsqueeze", "a = Constant<value=int64[1] {0}>()  w = Unsqueeze(W, a)", (6, 4)),
    ("Cast between floating types", "w = Cast<to=1>(W)", (6, 4)),
    ("Constant node instead of an initializer", "", (6, 4)),
    ("QuantizeLinear, DequantizeLinear", "q = QuantizeLinear(W, s)  w = DequantizeLinear(q, s)", (6, 4)),
    ("computed from constants (Mul and so on)", "w = Mul(W, W)", (6, 4)),
)
# Nodes beside `y = MatMul(x, W)` with W [6, 6] that read the weight too.
READERS = (
    ("another layer that reads the same matrix", "z = Gemm(y, W)"),
    ("another layer that reads its transpose", "z = Gemm<transB=1>(y, W)"),
    ("Shape, Size", "z = Shape(W)"),
    ("Gather (an embedding)", "z = Gather(W, i)"),
    ("Add", "z = Add(y, W)"),
    ("an output of the graph", "z = Identity(W)"),
)


def _array(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def _model(body: str, tensors: list[onnx.TensorProto], signature: str, functions: str = "") -> onnx.ModelProto:
    imports = f'"":{ONNX_OPSET}, "com.microsoft":1, "local":1'
    proto = parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> g ({signature}) {{ {body} }} {functions}")
    proto.graph.initializer.extend(tensors)
    return proto


def _tensors(layer: Layer, dtype: str) -> list[onnx.TensorProto]:
    number, _, kind = DTYPES[dtype]
    found = []
    for name, shape in (("W", layer.w), *layer.more):
        if name == "W" and layer.quantized:
            found.append(
                helper.make_tensor("W", TensorProto.UINT8, shape, np.ones(shape, np.uint8).tobytes(), raw=True)
            )
        else:
            found.append(helper.make_tensor(name, number, shape, _array(shape).astype(kind).tobytes(), raw=True))
    return found


def plain_model(layer: Layer, dtype: str) -> onnx.ModelProto:
    """The layer alone, in the main graph."""
    text = DTYPES[dtype][1]
    return _model(layer.text, _tensors(layer, dtype), f"{text}{list(layer.x)} x) => ({text} y")


def main_graph(layer: Layer, dtype: str) -> str:
    """What becomes of a layer's weight in the main graph, by running the pass.

    Returns:
        `shifted`, `shifted, computed in float32` where there is no kernel for the type, or the reason of a skip.
    """
    number, text, _ = DTYPES[dtype]
    shape, names = list(layer.x), ["W", *(name for name, _ in layer.more)]
    casts = "  ".join(
        f"{name}_f = Cast<to=1>({name})" for name in ("x", *names) if not (layer.quantized and name == "W")
    )
    cast_text = _renamed(layer.text, [name for name in ("x", *names) if not (layer.quantized and name == "W")])
    body = f"{casts}  {cast_text}  y = Cast<to={number}>(y_f)"
    casted = _model(body, _tensors(layer, dtype), f"{text}{shape} x) => ({text} y")
    for model, suffix in ((plain_model(layer, dtype), ""), (casted, ", computed in float32")):
        found = _discovered(model)
        if found != "shifted":
            return found
        status = _status(model, {"x": _array(layer.x, 1)})
        if status is not None:
            return f"{status}{suffix}"
    return "no kernel on the CPU"


def _status(model: onnx.ModelProto, calibration: object) -> str | None:
    """What the pass made of the weight; None where ONNX Runtime cannot run the model."""
    model.graph.output[0].type.tensor_type.ClearField("shape")
    try:
        # A few samples show what an operator needs; a real shift would be refused on so few.
        result = onnx_optshift.shift(model, calibration, device="cpu", heldout="none", force=True)
    except InputError as error:
        if "ONNX Runtime cannot" in str(error):
            return None
        raise
    return next(entry for entry in result.report.layers if entry.weight == "W").status


def _renamed(text: str, names: list[str]) -> str:
    """The nodes with `_f` appended to these names and to y."""
    return re.sub(rf"\b({'|'.join([*names, 'y'])})\b(?!\s*=\s*\d|=)", r"\1_f", text)


def in_body(layer: Layer, place: str) -> str:
    """What becomes of a weight of the outer graph whose layer, with its input, is inside a body or a function."""
    tensors, shape = _tensors(layer, "float32"), list(layer.x)
    inner = f"x_f = Identity(x)  {_renamed(layer.text, ['x'])}"
    functions = ""
    if place == "If":
        body = f"""y = If(c) <then_branch = t () => (float y_f) {{ {inner} }},
            else_branch = e () => (float o) {{ o = Identity(x) }}>"""
    elif place == "Loop":
        body = f"""y = Loop(n, c) <body = b (int64 k, bool u) => (bool v, float y_f)
            {{ v = Identity(u)  {inner} }}>"""
    elif place == "Scan":
        inner = inner.replace("Identity(x)", "Add(x, step)")
        # A Scan wants to know the rank of what it stacks.
        inner += "  flat = Constant<value=int64[1] {-1}>()  y_r = Reshape(y_f, flat)"
        body = f"y = Scan<num_scan_inputs=1, body = b (float[] step) => (float[k] y_r) {{ {inner} }}>(r)"
    else:
        others = "".join(f", {name}" for name, _ in layer.more)
        body = f"y = local.f(x, W{others})"
        imports = f'"":{ONNX_OPSET}, "com.microsoft":1'
        functions = f'<domain: "local", opset_import: [{imports}]> f (x, W{others}) => (y) {{ {layer.text} }}'
    model = _model(body, tensors, f"float{shape} x, bool c, int64 n, float[2] r) => (float y", functions)
    found = _discovered(model)
    if found != "shifted":
        return found
    x = _array(layer.x, 1).astype(np.float32)
    feed = {"x": x, "c": np.array(True), "n": np.array(2), "r": np.zeros(2, np.float32)}
    return _status(model, [feed]) or "no kernel on the CPU"


def _discovered(model: onnx.ModelProto) -> str:
    weights, skips = discover(ModelFile.load(model), Selection())
    if any(weight.name == "W" for weight in weights):
        return "shifted"
    return next((skip.reason for skip in skips if skip.weight == "W"), skips[0].reason if skips else "not a layer")


def _way(nodes: str, shape: tuple[int, ...]) -> str:
    number = TensorProto.DOUBLE if "Cast" in nodes else TensorProto.FLOAT
    tensor = helper.make_tensor("W", number, shape, np.ravel(_array(shape)))
    more = [helper.make_tensor("s", TensorProto.FLOAT, (), [0.1])] if "Quantize" in nodes else []
    if nodes:
        return _discovered(_model(f"{nodes}  y = MatMul(x, w)", [tensor, *more], "float[2,6] x) => (float y"))
    model = _model("y = MatMul(x, W)", [], "float[2,6] x) => (float y")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value=tensor))
    return _discovered(model)


def _reader(nodes: str) -> str:
    tensor = helper.make_tensor("W", TensorProto.FLOAT, (6, 6), np.ravel(_array((6, 6))))
    kind = "int64" if "Shape" in nodes else "float"
    signature = f"float[6,6] x, int64[2] i) => (float y, {kind} z"
    return _discovered(_model(f"y = MatMul(x, W)  {nodes}", [tensor], signature))


class _Notes:
    """Reasons as numbered notes under a table."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, outcome: str) -> str:
        if outcome == "shifted":
            return "shifted"
        word = "shifted" if outcome.startswith("shifted") else "skipped" if "no kernel" not in outcome else "-"
        return f"{word} ({self.numbers.setdefault(outcome, len(self.numbers) + 1)})"

    def lines(self) -> list[str]:
        return [f"{number}. {outcome}" for outcome, number in self.numbers.items()]


def page() -> str:
    """The whole page."""
    notes = _Notes()
    lines = [
        "# Which weights are shifted",
        "",
        "Made by `python tools/coverage_table.py`, which tries every cell; a test keeps it current. `inspect` says",
        "the same of the layers of a given model. A weight that is skipped keeps its bytes; the report says why.",
        "",
        "The columns of types are layers of the main graph, run on the CPU. The last four are layers inside a body,",
        "or inside a function that the weight is handed to. Weights that a body holds itself are found as well; those",
        "that a function holds, as a constant for all its calls, are skipped.",
        "",
    ]
    columns = [*DTYPES, *PLACES]
    lines += [f"| operator | orientation | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for layer in layers():
        cells = [main_graph(layer, dtype) for dtype in DTYPES] + [in_body(layer, place) for place in PLACES]
        row = " | ".join(notes.cell(cell) for cell in cells)
        lines.append(f"| {layer.operator} | {layer.orientation} | {row} |")
    lines += ["", *notes.lines(), ""]
    lines += ["## On the way from the weight to its layer", "", "| node | the weight is |", "|---|---|"]
    lines += [f"| {what} | {_said(_way(nodes, shape))} |" for what, nodes, shape in WAYS]
    lines += ["", "## What else reads the weight", "", "| reader | the weight is |", "|---|---|"]
    lines += [f"| {what} | {_said(_reader(nodes))} |" for what, nodes in READERS]
    return "\n".join(lines) + "\n"


def _said(outcome: str) -> str:
    return outcome if outcome == "shifted" else f"skipped: {outcome}"


def main() -> None:
    """Reads the command line; writes or checks the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if the page is not current"
    )
    check = arguments.parse_args().check
    text = page()
    if check:
        current = TARGET.exists() and TARGET.read_text(encoding="utf-8") == text
        sys.exit(0 if current else f"{TARGET} is not current: run tools/coverage_table.py")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
