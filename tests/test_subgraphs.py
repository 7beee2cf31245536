"""Weights used inside If, Loop, Scan and functions: their rows against numpy, and the whole pass on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models as tiny
import torch
from onnx import numpy_helper

from onnx_optshift.commands import shift
from onnx_optshift.errors import InputError
from onnx_optshift.graph.bodies import flattened, graphs, unique_names
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.stats.rows import to_rows

W, V, K = tiny.weight(8, 5), tiny.weight(8, 8, seed=1) / 4, tiny.weight(3, 2, 2, 2)
Feed = dict[str, np.ndarray]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def x_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass
class Case:
    """A model, feeds, and the rows that meet each of its weights in them, by numpy."""

    text: str
    tensors: dict[str, np.ndarray]
    feeds: list[Feed]
    rows: dict[str, Callable[[Feed], np.ndarray]]
    functions: str = ""

    @property
    def proto(self) -> onnx.ModelProto:
        imports = ', "tests":1' if self.functions else ""
        return tiny.model(self.text, self.tensors, functions=self.functions, imports=imports)


def states(feed: Feed) -> list[np.ndarray]:
    """The state before each iteration of the loop below."""
    state, result = feed["x"], []
    for _ in range(int(feed["n"])):
        result.append(state)
        state = np.tanh(state @ V)
    return result


def none(width: int) -> np.ndarray:
    return np.zeros((0, width), np.float32)


def in_branch(feed: Feed) -> np.ndarray:
    return relu(feed["x"]) if feed["c"] else none(8)


BRANCHES = [{"x": x_of(seed, 1, 8), "c": np.array(seed % 2 == 0)} for seed in range(4)]
TRIPS = [{"x": x_of(seed, 1, 8), "n": np.array(seed, np.int64)} for seed in (2, 0, 3)]
IN_THEN = """g (float[N,8] x, bool c) => (float[N,5] y) {{
    y = If(c) <then_branch = t () => (float[N,5] a) {{ r = Relu(x)  a = MatMul(r, W) }},
               else_branch = e () => (float[N,5] b) {{ r = Neg(x)  b = {other} }}> }}"""
LOOP = """g (float[N,8] x, int64 n) => (float[N,8] y, float[N,5] z) {
    t = Constant<value = bool {1}>()
    y = Loop(n, t, x) <body = b (int64 i, bool u, float[N,8] s) => (bool u2, float[N,8] s2)
        { u2 = Identity(u)  h = MatMul(s, V)  s2 = Tanh(h) }>
    z = MatMul(y, W) }"""
SLICE = {name: np.array([value], np.int64) for name, value in {"zero": 0, "five": 5, "one": 1}.items()}

CASES = {
    "if": Case(IN_THEN.format(other="Slice(r, zero, five, one)"), {"W": W, **SLICE}, BRANCHES, {"W": in_branch}),
    "both branches, same names": Case(
        IN_THEN.format(other="MatMul(r, W)"),
        {"W": W},
        BRANCHES,
        {"W": lambda feed: relu(feed["x"]) if feed["c"] else -feed["x"]},
    ),
    "loop": Case(
        LOOP,
        {"V": V, "W": W},
        TRIPS,
        {
            "V": lambda feed: np.concatenate([none(8), *states(feed)]),
            "W": lambda feed: np.tanh(states(feed)[-1] @ V) if feed["n"] else feed["x"],
        },
    ),
    "vector on the right of the weight": Case(
        """g (float[8] x, int64 n) => (float[8] y) { t = Constant<value = bool {1}>()
        y = Loop(n, t, x) <body = b (int64 i, bool u, float[8] s) => (bool u2, float[8] s2)
            { u2 = Identity(u)  w = Transpose(V)  h = MatMul(w, s)  s2 = Tanh(h) }> }""",
        {"V": V},
        [{**feed, "x": feed["x"][0]} for feed in TRIPS],
        {"V": lambda feed: np.array(states(feed), np.float32).reshape(-1, 8)},
    ),
    "convolution in a scan": Case(
        """g (float[T,1,2,4,4] x) => (float[T,1,3,4,4] y) {
        y = Scan<num_scan_inputs = 1, body = b (float[1,2,4,4] s) => (float[1,3,4,4] c)
            { r = Relu(s)  c = Conv<pads = [0,0,1,1]>(r, K) }>(x) }""",
        {"K": K},
        [{"x": x_of(seed, 3, 1, 2, 4, 4) * np.array([[[0]], [[1]]], np.float32)} for seed in range(2)],
        {"K": lambda feed: patches(relu(feed["x"][:, 0]))},
    ),
    "if within loop": Case(
        """g (float[N,8] x, int64 n) => (float[N,8] y) { t = Constant<value = bool {1}>()
        y = Loop(n, t, x) <body = b (int64 i, bool u, float[N,8] s) => (bool u2, float[N,8] s2) {
            u2 = Identity(u)  w = Identity(s)  m = ReduceMax<keepdims = 0>(w)  f = Cast<to = 9>(m)
            k = Or(f, u)
            s2 = If(k) <then_branch = p () => (float[N,8] a) { h = MatMul(w, V)  a = Tanh(h) },
                        else_branch = q () => (float[N,8] a) { a = Neg(w) }> }> }""",
        {"V": V},
        TRIPS,
        {"V": lambda feed: np.concatenate([none(8), *states(feed)])},
    ),
    "function": Case(
        "g (float[N,8] x) => (float[N,5] y) { a = tests.f(x, V)  b = tests.f(a, V)  y = MatMul(b, W) }",
        {"V": V, "W": W},
        [{"x": x_of(0, 3, 8)}],
        {
            "V": lambda feed: np.concatenate([feed["x"], np.tanh(feed["x"] @ V)]),
            "W": lambda feed: np.tanh(np.tanh(feed["x"] @ V) @ V),
        },
        '<domain: "tests", opset_import: ["":17]> f (a, b) => (r) { h = MatMul(a, b)  r = Tanh(h) }',
    ),
}


def patches(images: np.ndarray) -> np.ndarray:
    """2x2 patches of images `[N, 2, 4, 4]` padded by one at the end, as rows `[N*16, 8]`, by loops."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1)))
    rows = [image[:, i : i + 2, j : j + 2].ravel() for image in padded for i in range(4) for j in range(4)]
    return np.array(rows)


def with_body_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Moves floating initializers into the bodies that read them: each has its own, under the same name."""
    moved = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    for graph in list(graphs(proto.graph))[1:]:
        read = {name for node in graph.node for name in node.input}
        graph.initializer.extend(tensor for tensor in moved if tensor.name in read)
    read = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor not in moved or tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def with_body_constants(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same with Constant nodes."""
    proto = with_body_initializers(proto)
    for graph in list(graphs(proto.graph))[1:]:
        nodes = [onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer]
        nodes += list(graph.node)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.initializer[:], graph.node[:]
        graph.node.extend(nodes)
    return proto


STORAGE = {"outer": lambda proto: proto, "initializer": with_body_initializers, "constant": with_body_constants}


def outputs(model: bytes, feeds: list[Feed]) -> list[list[np.ndarray]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


@pytest.mark.parametrize("name", list(CASES))
def test_captured_rows_are_those_of_numpy(name: str) -> None:
    case = CASES[name]
    bench = prepare(case.proto, Settings(device="cpu"), None).bench
    weights = bench.weights
    assert {weight.name for weight in weights} == set(case.rows)
    session = bench.sessions.probe(bench.taps)
    for feed in case.feeds:
        for weight in weights:
            rows = []
            for use in weight.uses:
                value = use.tap.value
                found = torch.from_numpy(feed[value]) if value in feed else session.run_tensors(feed, [value])[value]
                rows.append(to_rows(found, use.tap)[0].numpy())
            expected = case.rows[weight.name](feed)
            assert np.concatenate(rows).shape == expected.shape
            assert np.allclose(_sorted(np.concatenate(rows)), _sorted(expected), atol=1e-6)


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(np.round(rows, 4).T)]


@pytest.mark.parametrize("storage", list(STORAGE))
@pytest.mark.parametrize("name", list(CASES))
def test_the_pass_keeps_outputs_and_moves_those_weights(name: str, storage: str, tmp_path) -> None:
    case = CASES[name]
    proto = STORAGE[storage](case.proto)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, path)
    result = shift.run(path, out, [case.feeds], ["none"], Settings(device="cpu", force=True))
    statuses = {layer.name: layer.status for layer in result.report.layers}
    assert "shifted" in statuses.values(), [layer.reason for layer in result.report.layers]
    scale = max(np.abs(value).max() for values in outputs(path.read_bytes(), case.feeds) for value in values)
    assert _moved(path, out, case.feeds) < 1e-5 * scale
    # Freedom was really used: other inputs give other outputs.
    others = [{k: (x_of(9, *v.shape) if v.dtype == np.float32 else v) for k, v in feed.items()} for feed in case.feeds]
    assert _moved(path, out, others) > 1e-3 * scale
    again = shift.run(out, tmp_path / "again.onnx", [case.feeds], ["none"], Settings(device="cpu", force=True))
    assert all(layer.status != "shifted" for layer in again.report.layers)
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()


def _moved(one: Path, two: Path, feeds: list[Feed]) -> float:
    """The largest difference of any output."""
    pairs = zip(outputs(one.read_bytes(), feeds), outputs(two.read_bytes(), feeds), strict=True)
    return max(np.abs(a - b).max() for before, after in pairs for a, b in zip(before, after, strict=True))


def test_one_name_in_both_branches_means_two_tensors(tmp_path) -> None:
    case = CASES["both branches, same names"]
    proto = with_body_initializers(case.proto)
    tensors = [tensor for graph in graphs(proto.graph) for tensor in graph.initializer if tensor.name == "W"]
    assert len(tensors) == 2
    tensors[1].CopyFrom(numpy_helper.from_array(2 * W, "W"))
    model = ModelFile.load(proto)
    assert set(model.tensors) >= {"W#1", "W#2"}
    assert np.array_equal(model.initializer("W#2"), 2 * W)
    result = shift.run(proto, tmp_path / "out.onnx", [case.feeds], ["none"], Settings(device="cpu", force=True))
    norms = {layer.name: layer.norm_before for layer in result.report.layers}
    assert norms["W#2"] == pytest.approx(2 * norms["W#1"])
    assert all(layer.status == "shifted" for layer in result.report.layers)


def test_a_model_without_bodies_and_functions_is_not_copied() -> None:
    proto = tiny.two_layers()
    assert flattened(proto) is proto
    assert unique_names(proto.graph) == [{name: name for name in ("x", "h", "r", "y", "W1", "b", "W2")}]


def test_numbered_names_avoid_names_that_exist() -> None:
    proto = with_body_initializers(CASES["both branches, same names"].proto)
    proto.graph.initializer.append(numpy_helper.from_array(W, "W#1"))
    found = [scope["W"] for scope in unique_names(proto.graph) if "W" in scope]
    assert found == ["W#2", "W#3"]


@pytest.mark.parametrize("name", ["if", "loop", "function"])
def test_renaming_and_inlining_change_no_output(name: str) -> None:
    case = CASES[name]
    flat = flattened(with_body_initializers(case.proto))
    assert not flat.functions
    names = [value for scope in unique_names(flat.graph) for value in scope]
    assert len(names) == len(set(names))
    for one, two in zip(
        outputs(case.proto.SerializeToString(), case.feeds), outputs(flat.SerializeToString(), case.feeds), strict=True
    ):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_branch_that_is_never_taken_keeps_its_weight(tmp_path) -> None:
    case = CASES["if"]
    feeds = [feed for feed in case.feeds if not feed["c"]]
    result = shift.run(case.proto, tmp_path / "out.onnx", [feeds], ["none"], Settings(device="cpu", force=True))
    (layer,) = result.report.layers
    assert layer.status == "unchanged"
    assert "no calibration row reached the layer" in layer.reason


GROWING = """g (float[N,8] x, int64 n) => (float[M,8] y, float[M,5] z) { t = Constant<value = bool {1}>()
    y = Loop(n, t, x) <body = b (int64 i, bool u, float[M,8] s) => (bool u2, float[M,8] s2)
        { u2 = Identity(u)  h = MatMul(s, V)  s2 = Concat<axis = 0>(s, h) }>
    z = MatMul(y, W) }"""


def test_an_input_that_changes_its_shape_between_iterations_is_skipped(tmp_path) -> None:
    proto = tiny.model(GROWING, {"V": V, "W": W})
    result = shift.run(proto, tmp_path / "out.onnx", [TRIPS], ["none"], Settings(device="cpu", force=True))
    by_name = {layer.name: layer for layer in result.report.layers}
    assert by_name["V"].status == "skipped"
    assert "stack" in by_name["V"].reason
    assert by_name["W"].status in {"shifted", "unchanged"}


def test_a_shape_that_changes_later_on_is_an_error_that_says_so(tmp_path) -> None:
    proto = tiny.model(GROWING, {"V": V, "W": W})
    once_first = [{**TRIPS[0], "n": np.array(1, np.int64)}, TRIPS[2]]
    with pytest.raises(InputError, match="nodes-to-exclude"):
        shift.run(proto, tmp_path / "out.onnx", [once_first], ["none"], Settings(device="cpu", force=True))
    assert not (tmp_path / "out.onnx").exists()
