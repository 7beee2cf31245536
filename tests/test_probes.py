"""In-memory copies: values come out, weights go in, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_models as tiny
from onnx import numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.probes import probe_model

X = tiny.weight(6, 4, seed=9)


def session(data: bytes, folder: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def content(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def test_values_become_outputs() -> None:
    proto = tiny.two_layers()
    before = proto.SerializeToString()
    run = session(probe_model(ModelFile.load(proto), ["r", "h", "r", "x", "y"]))
    assert [output.name for output in run.get_outputs()] == ["y", "r", "h"]  # x is in the feeds, y was there
    y, r, h = run.run(None, {"x": X})
    assert np.allclose(h, X @ content(proto, "W1") + content(proto, "b"), atol=1e-5)
    assert np.array_equal(r, np.maximum(h, 0))
    assert np.array_equal(y, session(before).run(None, {"x": X})[0])
    assert proto.SerializeToString() == before


def test_nothing_asked_is_the_model_itself() -> None:
    proto = tiny.two_layers()
    assert probe_model(ModelFile.load(proto), ()) == proto.SerializeToString()


def test_values_of_unusual_types() -> None:
    text = "g (float[2,4] x) => (float y) { q = SequenceConstruct(x)  n = SequenceLength(q)  y = Identity(x) }"
    run = session(probe_model(ModelFile.load(tiny.model(text)), ["q", "n"]))
    _, q, n = run.run(None, {"x": X[:2]})
    assert n == 1
    assert np.array_equal(q[0], X[:2])


def overridden(proto: onnx.ModelProto, name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs with the default weight, and with another."""
    run = session(probe_model(ModelFile.load(proto), (), [name]))
    assert [value.name for value in run.get_overridable_initializers()] == [name]
    assert [value.name for value in run.get_inputs()] == ["x"]
    return run.run(None, {"x": X})[0], run.run(None, {"x": X, name: array})[0]


def test_initializers_become_inputs_with_a_default() -> None:
    proto = tiny.two_layers()
    default, other = overridden(proto, "W2", 2 * content(proto, "W2"))
    assert np.allclose(other, 2 * default, rtol=1e-5)
    assert np.allclose(default, session(proto.SerializeToString()).run(None, {"x": X})[0], rtol=1e-5)


def test_constant_nodes_become_inputs_with_a_default() -> None:
    text = "g (float[N,4] x) => (float y) { k = Constant<value=float[4,1] {1,2,3,4}>()  y = MatMul(x, k) }"
    proto = tiny.model(text)
    default, other = overridden(proto, "k", np.zeros((4, 1), np.float32))
    assert np.allclose(default, X @ np.array([[1], [2], [3], [4]], np.float32), rtol=1e-5)
    assert not other.any()
    assert len(proto.graph.node) == 2  # the model itself keeps its Constant node


def test_old_models_too() -> None:
    text = "g (float[N,4] x) => (float[N,3] y) { y = Gemm(x, W, b) }"
    tensors = {"W": tiny.weight(4, 3), "b": tiny.weight(3)}
    proto = tiny.model(text, tensors, opset=7, ir_version=3, inputs_too=True)
    default, other = overridden(proto, "W", np.zeros((4, 3), np.float32))
    assert np.allclose(default, X @ tensors["W"] + tensors["b"], atol=1e-5)
    assert np.allclose(other, tensors["b"])


def test_external_tensors_stay_references(tmp_path: Path) -> None:
    plain = tiny.two_layers()
    path = tiny.save_external(tiny.two_layers(), tmp_path / "m.onnx", {"W1": "w.data"})
    model = ModelFile.load(path)
    data = probe_model(model, ["h"], ["W1"])
    assert content(plain, "W1").tobytes() not in data
    run = session(data, tmp_path)
    expected = session(probe_model(ModelFile.load(plain), ["h"])).run(None, {"x": X})
    for a, b in zip(run.run(None, {"x": X}), expected, strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not np.allclose(run.run(["h"], {"x": X, "W1": 0 * content(plain, "W1")})[0], expected[1])


def test_unknown_names() -> None:
    model = ModelFile.load(tiny.two_layers())
    with pytest.raises(InputError, match=r"no value 'hh'.*Close matches: 'h'"):
        probe_model(model, ["hh"])
    with pytest.raises(InputError, match="no initializer 'W3'"):
        probe_model(model, (), ["W3"])


def test_constants_become_outputs_wherever_they_are(tmp_path: Path) -> None:
    """Of the main graph (where the data may be external) and of a body."""
    text = """g (float[2,4] x, bool c) => (float[2,4] y) { h = Add(x, A)
        y = If(c) <then_branch = t () => (float[2,4] a) { a = Add(h, B) }, else_branch = e () => (float[2,4] b)
            { b = Identity(h) }> }"""
    arrays = {name: tiny.weight(2, 4, seed=seed) for seed, name in enumerate("AB")}
    proto = tiny.model(text, {"A": arrays["A"]})
    body = next(attribute.g for attribute in proto.graph.node[1].attribute if attribute.name == "then_branch")
    body.initializer.append(numpy_helper.from_array(arrays["B"], "B"))
    model = ModelFile.load(tiny.save_external(proto, tmp_path / "m.onnx", {"A": "a.data"}))
    run = session(probe_model(model, ["A", "B"]), tmp_path)
    y, a, b = run.run(None, {"x": X[:2], "c": np.array(True)})
    assert np.array_equal(a, arrays["A"])
    assert np.array_equal(b, arrays["B"])
    assert np.allclose(y, X[:2] + arrays["A"] + arrays["B"])
