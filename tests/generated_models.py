"""Random small models over everything that the pass takes on, as a hypothesis strategy.

A model is a chain of blocks. Each block knows the shapes it can follow, draws its attributes and sizes, and appends its
nodes; weights are drawn anew, or are those of an earlier block where shapes allow (tied weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

NUMBERS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


@dataclass
class Generated:
    """A model under construction, and then as it is.

    Attributes:
        draw: Of hypothesis.
        dtype: Of all float tensors.
        value: Name of the latest value.
        shape: Its shape, without the samples on axis 0.
        blocks: What it is made of, in words.
    """

    draw: st.DrawFn
    dtype: str
    shape: tuple[int, ...]
    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def add(self, op: str, inputs: list[str], *, domain: str = "", outputs: int = 1, **attributes) -> str:
        """Appends a node on these inputs; returns its first output."""
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{len(self.nodes)}", domain=domain, **attributes))
        return names[0]

    def weight(self, *shape: int) -> str:
        """A weight: one that is there already, or a new one."""
        same = [name for name, array in self.tensors.items() if array.shape == shape]
        if same and self.flag():
            return self.pick(*same)
        return self.tensor(np.random.default_rng([len(self.tensors), *shape]).standard_normal(shape) / shape[-1] ** 0.5)

    def tensor(self, array: np.ndarray) -> str:
        name = f"W{len(self.tensors)}"
        self.tensors[name] = array.astype(self.dtype) if array.dtype.kind == "f" else array
        return name

    def rearranged(self, name: str, *, swap: bool) -> str:
        """A weight on its way to a layer: as it is, or behind nodes that only rearrange it."""
        if swap:
            name = self.add("Transpose", [name], perm=[1, 0])
        if self.pick(False, False, True):
            name = self.add("Identity", [name])
        return name


def gemm(model: Generated) -> None:
    (d,), m = model.shape, model.integer(1, 9)
    trans, left = int(model.flag()), model.flag()
    w = model.weight(*((m, d) if trans else (d, m)))
    bias = [model.tensor(np.ones((m, 1) if left else m))] if model.flag() else []
    attributes = {"alpha": model.pick(1.0, 0.5), "beta": model.pick(1.0, 2.0)}
    if left:  # (op(W) xᵀ)ᵀ
        y = model.add("Gemm", [w, model.value, *bias], transA=1 - trans, transB=1, **attributes)
        model.value = model.add("Transpose", [y], perm=[1, 0])
    else:
        model.value = model.add("Gemm", [model.value, w, *bias], transB=trans, **attributes)
    model.shape = (m,)


def matmul(model: Generated) -> None:
    *rest, d = model.shape
    m, swap = model.integer(1, 9), model.flag()
    w = model.rearranged(model.weight(*((m, d) if swap else (d, m))), swap=swap)
    model.value, model.shape = model.add("MatMul", [model.value, w]), (*rest, m)


def matmul_left(model: Generated) -> None:
    s, d = model.shape
    m = model.integer(1, 6)
    model.value, model.shape = model.add("MatMul", [model.weight(m, s), model.value]), (m, d)


def stacked_matmul(model: Generated) -> None:
    s, d = model.shape
    m = model.integer(1, 4)
    unsqueezed = model.add("Unsqueeze", [model.value, model.tensor(np.array([2], np.int64))])
    y = model.add("MatMul", [unsqueezed, model.weight(s, d, m)])  # [N, s, 1, m]
    model.value = model.add("Squeeze", [y, model.tensor(np.array([2], np.int64))])
    model.shape = (s, m)


def einsum(model: Generated) -> None:
    rest, d = "abc"[: len(model.shape) - 1], model.shape[-1]
    m, k = model.integer(2, 5), model.integer(2, 3)
    if model.flag():
        y = model.add("Einsum", [model.value, model.weight(d, k, m)], equation=f"n{rest}d,dkm->n{rest}km")
        equation = f"n{rest}km,kmd->n{rest}d" if model.flag() else "...km,kmd->...d"
        model.value = model.add("Einsum", [y, model.weight(k, m, d)], equation=equation)
    else:
        w = model.weight(m, d)
        model.value = model.add("Einsum", [w, model.value], equation=f"md,n{rest}d->n{rest}m")
        model.shape = (*model.shape[:-1], m)


def recurrent(model: Generated) -> None:
    s, d = model.shape
    op, h = model.pick("LSTM", "GRU", "RNN"), model.integer(1, 5)
    directions, k = model.integer(1, 2), {"LSTM": 4, "GRU": 3, "RNN": 1}
    attributes = {"hidden_size": h, "direction": ["forward", "bidirectional"][directions - 1]}
    if op == "GRU":
        attributes["linear_before_reset"] = model.integer(0, 1)
    x = model.add("Transpose", [model.value], perm=[1, 0, 2])
    w, r = model.weight(directions, k[op] * h, d), model.weight(directions, k[op] * h, h)
    y = model.add(op, [x, w, r], outputs=2, **attributes)  # [s, dirs, N, h]
    y = model.add("Transpose", [y], perm=[2, 0, 1, 3])
    shape = model.tensor(np.array([0, 0, -1], np.int64))
    model.value, model.shape = model.add("Reshape", [y, shape]), (s, directions * h)


def attention(model: Generated) -> None:
    d = model.shape[-1]
    if d % 2 or model.dtype != "float32":
        return
    w, b = model.weight(d, 3 * d), model.tensor(np.zeros(3 * d))
    model.value = model.add("Attention", [model.value, w, b], domain="com.microsoft", num_heads=2)


def conv(model: Generated) -> None:
    c, *spatial = model.shape
    axes, group = len(spatial), model.pick(*[g for g in (1, 2, c) if c % g == 0])
    kernel = [model.integer(1, min(3, size)) for size in spatial]
    attributes = {"group": group, "strides": [model.integer(1, 2) for _ in range(axes)]}
    how = model.pick("none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "dilations")
    if how == "pads":
        attributes["pads"] = [model.integer(0, 1) for _ in range(2 * axes)]
    elif how == "dilations":
        attributes["dilations"] = [
            model.integer(1, (size - 1) // (k - 1)) if k > 1 else 1 for size, k in zip(spatial, kernel, strict=True)
        ]
    elif how != "none":
        attributes["auto_pad"] = how
    m = group * model.integer(1, 3)
    bias = [model.tensor(np.ones(m))] if model.flag() else []
    model.value = model.add("Conv", [model.value, model.weight(m, c // group, *kernel), *bias], **attributes)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, attributes.get("dilations", [1] * axes), strict=True)]
    pads, strides = attributes.get("pads", [0] * (2 * axes)), attributes["strides"]
    if how.startswith("SAME"):
        out = [-(-size // stride) for size, stride in zip(spatial, strides, strict=True)]
    else:
        out = [(size + pads[a] + pads[a + axes] - reach[a]) // strides[a] + 1 for a, size in enumerate(spatial)]
    model.shape = (m, *out)


def conv_transpose(model: Generated) -> None:
    c, *spatial = model.shape
    axes, group = len(spatial), model.pick(*[g for g in (1, 2, c) if c % g == 0])
    kernel, strides = ([model.integer(1, 2) for _ in spatial] for _ in range(2))
    m = model.integer(1, 3)
    w = model.weight(c, m, *kernel)
    model.value = model.add("ConvTranspose", [model.value, w], group=group, strides=strides)
    out = [(size - 1) * strides[a] + kernel[a] for a, size in enumerate(spatial)]
    assert len(out) == axes
    model.shape = (group * m, *out)


def branches(model: Generated) -> None:
    """An If one of whose branches multiplies with a weight: of the outer graph, or its own under the name of another.

    The input of the multiplication is computed outside, or in the branch.
    """
    *_, d = model.shape
    kind = NUMBERS[model.dtype]
    condition, inner = model.tensor(np.array(model.flag())), model.flag()
    name, own = f"v{len(model.nodes)}_0", []
    if model.flag():
        w = model.weight(d, d)
    else:
        w = "own"
        own = [numpy_helper.from_array((np.eye(d)[::-1] + 0.1).astype(model.dtype), w)]
    outputs = [helper.make_tensor_value_info(f"{name}_{branch}", kind, None) for branch in ("then", "else")]
    read = [helper.make_node("Tanh", [model.value], ["in"])] if inner else []
    multiply = helper.make_node("MatMul", ["in" if inner else model.value, w], [f"{name}_then"])
    then = helper.make_graph([*read, multiply], "then", [], outputs[:1], own)
    read = [helper.make_node("Neg", [model.value], ["in"])]
    other = helper.make_graph([*read, helper.make_node("Identity", ["in"], [f"{name}_else"])], "else", [], outputs[1:])
    model.value = model.add("If", [condition], then_branch=then, else_branch=other)


def loop(model: Generated) -> None:
    """A Loop that multiplies its state with a weight of the outer graph, 0 to 3 times."""
    *_, d = model.shape
    kind, name = NUMBERS[model.dtype], f"v{len(model.nodes)}"
    true, trips = model.tensor(np.array(True)), model.tensor(np.array(model.integer(0, 3), np.int64))
    names = [f"{name}_{value}" for value in ("i", "c", "s", "c2", "h", "s2")]
    number, condition, state, kept, product, new = names
    nodes = [
        helper.make_node("Identity", [condition], [kept]),
        helper.make_node("MatMul", [state, model.weight(d, d)], [product]),
        helper.make_node("Tanh", [product], [new]),
    ]
    inputs = [(number, TensorProto.INT64), (condition, TensorProto.BOOL), (state, kind)]
    outputs = [(kept, TensorProto.BOOL), (new, kind)]
    typed = [
        [helper.make_tensor_value_info(value, of, None if of == kind else []) for value, of in entries]
        for entries in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "body", *typed)
    model.value = model.add("Loop", [trips, true, model.value], body=graph)


def function(model: Generated) -> None:
    """Two calls of a function that multiplies what it is given with the weight that it is given."""
    *_, d = model.shape
    w = model.weight(d, d)
    model.value = model.add("f", [model.value, w], domain="local")
    model.value = model.add("f", [model.value, w], domain="local")


def nonlinear(model: Generated) -> None:
    model.value = model.add(model.pick("Relu", "Tanh", "Sigmoid"), [model.value])


def flatten(model: Generated) -> None:
    model.value, model.shape = model.add("Flatten", [model.value]), (int(np.prod(model.shape)),)


# By number of axes besides the samples.
BLOCKS: dict[int, list[Callable[[Generated], None]]] = {
    1: [gemm, matmul, einsum, nonlinear, branches, loop, function],
    2: [
        matmul,
        matmul_left,
        stacked_matmul,
        einsum,
        recurrent,
        attention,
        conv,
        nonlinear,
        branches,
        loop,
        function,
        flatten,
    ],
    3: [conv, conv_transpose, matmul, nonlinear, flatten],
    4: [conv, nonlinear, flatten],
}
_SHAPES = st.one_of(
    st.tuples(st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 8)),
    st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(2, 5)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 3), st.integers(1, 3)),
)


@st.composite
def models(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[str]]:
    """A model, calibration data for it, and what it is made of."""
    model = Generated(draw, draw(st.sampled_from(["float32", "float32", "float64"])), draw(_SHAPES))
    if model.dtype == "float64" and len(model.shape) >= 3:
        model.dtype = "float32"  # ONNX Runtime convolves float64 nowhere on the CPU
    inputs = model.shape
    for _ in range(draw(st.integers(1, 4))):
        choices = BLOCKS[len(model.shape)]
        if model.dtype == "float64":
            choices = [block for block in choices if block not in {conv, recurrent, attention}]
        block = draw(st.sampled_from(choices))
        block(model)
        model.blocks.append(f"{block.__name__}{list(model.shape)}")
        if np.prod(model.shape) > 400:
            break
    samples = draw(st.sampled_from([1, 2, 3, 6, 12, 24]))
    x = np.random.default_rng(draw(st.integers(0, 3))).standard_normal((samples, *inputs)).astype(model.dtype)
    if draw(st.booleans()):  # a dead feature
        x[:, 0] = 0
    return _proto(model, inputs), {"x": x}, [model.dtype, f"{samples} samples", *model.blocks]


def _proto(model: Generated, inputs: tuple[int, ...]) -> onnx.ModelProto:
    kind = NUMBERS[model.dtype]
    output = helper.make_tensor_value_info("y", kind, ["N", *[None] * len(model.shape)])
    nodes = [*model.nodes, helper.make_node("Identity", [model.value], ["y"], "last")]
    initializers = []
    for name, array in model.tensors.items():
        if model.draw(st.sampled_from([False, False, False, True])):
            nodes.insert(0, helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            initializers.append(numpy_helper.from_array(array, name))
    graph = helper.make_graph(
        nodes, "generated", [helper.make_tensor_value_info("x", kind, ["N", *inputs])], [output], initializers
    )
    standard = helper.make_opsetid("", model.draw(st.sampled_from([13, 17, 21])))
    opsets = [standard, helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    product, tanh = helper.make_node("MatMul", ["a", "b"], ["h"]), helper.make_node("Tanh", ["h"], ["r"])
    f = helper.make_function("local", "f", ["a", "b"], ["r"], [product, tanh], [standard])
    functions = [f] if any(node.op_type == "f" for node in nodes) else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
