"""Whatever is wrong with a file is one InputError that says what; whatever is right can be read back exactly."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny_models as tiny
from onnx import TensorProto, helper, numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile, TensorSpec
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.tensors import raw_size


def saved(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def test_facts_of_a_file(tmp_path: Path) -> None:
    path = saved(tiny.two_layers(), tmp_path)
    model = ModelFile.load(str(path))
    assert (model.opset, model.ir_version, model.path, model.folder) == (17, 8, path, tmp_path)
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.size == path.stat().st_size
    assert model.inputs == (TensorSpec("x", np.dtype(np.float32), ("N", 4)),)
    assert model.outputs == ("y",)
    assert [node.op for node in model.scopes.nodes] == ["Gemm", "Relu", "MatMul"]


def test_a_model_object_has_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    proto = tiny.two_layers()
    before = proto.SerializeToString()
    model = ModelFile.load(proto)
    assert (model.path, model.folder, model.where) == (None, None, "the model object")
    discover(model, Selection())
    assert proto.SerializeToString() == before
    assert capsys.readouterr() == ("", "")


def test_inputs_of_every_kind() -> None:
    text = """g (float[N,?,3] a, int64 b, string[2] s, seq(float[2]) q, optional(int64[1]) o, bfloat16[1] h)
        => (float y) { y = Identity(D) }"""
    proto = tiny.model(text, {"D": tiny.weight(2)})
    proto.graph.input.append(helper.make_tensor_value_info("D", TensorProto.FLOAT, [2]))
    unknown = helper.make_tensor_value_info("u", TensorProto.FLOAT, None)
    proto.graph.input.append(unknown)
    specs = {spec.name: spec for spec in ModelFile.load(proto).inputs}
    assert list(specs) == ["a", "b", "s", "q", "o", "h", "u"]  # D has a default value
    assert specs["a"].shape == ("N", None, 3)
    assert specs["b"] == TensorSpec("b", np.dtype(np.int64), ())
    assert specs["q"] == TensorSpec("q", None, None)  # a sequence
    assert specs["o"] == TensorSpec("o", None, None)  # an optional tensor
    assert specs["h"].dtype == np.dtype(ml_dtypes.bfloat16)
    assert specs["u"].shape is None


def test_initializer_names_are_checked() -> None:
    with pytest.raises(InputError, match="Close matches: 'W1'"):
        ModelFile.load(tiny.two_layers()).initializer("w1")


def test_sparse_initializers_and_functions_are_left_alone() -> None:
    text = "g (float[N,4] x) => (float y) { h = MatMul(x, S)  y = tests.f(h) }"
    functions = '<domain: "tests", opset_import: ["":17]> f (a) => (r) { r = Neg(a) }'
    proto = tiny.model(text, functions=functions, imports=', "tests":1')
    values = numpy_helper.from_array(np.ones(2, np.float32), "S")
    indices = numpy_helper.from_array(np.array([0, 3]), "S_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    model = ModelFile.load(proto)
    weights, skips = discover(model, Selection())
    assert not weights
    assert [(skip.weight, skip.reason) for skip in skips] == [("S", "its weight is stored sparse")]


def test_what_other_graph_libraries_refuse_is_read() -> None:
    """A classifier's list of maps, as scikit-learn models hand it out, and a sparse Constant node."""
    text = """g (float[N,4] x) => (float y) { h = MatMul(x, W)  z = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2]>(h)
        y = MatMul(h, S) }"""
    proto = tiny.model(text, {"W": tiny.weight(4, 3)}, imports=', "ai.onnx.ml":1')
    scores = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    proto.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(scores)))
    values, indices = numpy_helper.from_array(np.ones(2, np.float32)), numpy_helper.from_array(np.array([0, 3]))
    sparse = helper.make_sparse_tensor(values, indices, [3, 2])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["S"], sparse_value=sparse))
    weights, skips = discover(ModelFile.load(proto), Selection())
    assert [weight.name for weight in weights] == ["W"]
    assert [(skip.node, skip.reason) for skip in skips] == [("y", "its weight is stored sparse")]


def test_unnamed_model_and_old_ir() -> None:
    proto = tiny.model("g (float[N,4] x) => (float y) { y = MatMul(x, W) }", {"W": tiny.weight(4, 3)}, opset=7)
    proto.graph.ClearField("name")
    assert ModelFile.load(proto).opset == 7
    proto.graph.node[0].input[0] = "nowhere"  # a missing name does not stop the other checks
    with pytest.raises(InputError, match="nowhere"):
        ModelFile.load(proto)


def test_operators_of_a_runtime_are_left_to_it() -> None:
    text = "g (float[N,4] x) => (float y) { h = SimplifiedLayerNormalization(x, s)  y = MatMul(h, W) }"
    proto = tiny.model(text, {"s": tiny.weight(4), "W": tiny.weight(4, 3)})
    assert len(discover(ModelFile.load(proto), Selection())[0]) == 1


# --- files that cannot be used ---


def test_no_such_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        ModelFile.load(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="is a directory"):
        ModelFile.load(tmp_path)


BAD_CONTENT = {
    "empty": (b"", "empty"),
    "text": (b"this is not a model\n" * 20, "not an ONNX model"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    "cut short": (tiny.two_layers().SerializeToString()[:-30], "cut short|refuses"),
}


@pytest.mark.parametrize("case", list(BAD_CONTENT))
def test_bad_content(case: str, tmp_path: Path) -> None:
    content, message = BAD_CONTENT[case]
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        ModelFile.load(path)
    assert str(path) in str(caught.value)


def test_too_new(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    proto = tiny.two_layers()
    proto.opset_import[0].version = newest + 1
    with pytest.raises(InputError, match=f"opset {newest + 1} is newer than {newest}"):
        ModelFile.load(saved(proto, tmp_path))
    proto = tiny.two_layers()
    proto.ir_version = onnx.IR_VERSION + 1
    with pytest.raises(InputError, match=f"IR version {onnx.IR_VERSION + 1} is newer than {onnx.IR_VERSION}"):
        ModelFile.load(saved(proto, tmp_path))


def test_checker_errors_are_short() -> None:
    proto = tiny.two_layers()
    proto.graph.node[0].input[0] = "nowhere"
    with pytest.raises(InputError, match="checker refuses") as caught:
        ModelFile.load(proto)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_names_that_are_no_text() -> None:
    data = tiny.two_layers().SerializeToString().replace(b"W1", b"\xff1")
    with pytest.raises(InputError, match="UTF-8"):
        ModelFile.load(onnx.ModelProto.FromString(data))


def test_names_in_bodies_that_are_no_text() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y) { y = If(c) <then_branch = t () => (float[N,4] a)
        { r = Relu(x)  a = Neg(r) }, else_branch = e () => (float[N,4] a) { r = Abs(x)  a = Neg(r) }> }"""
    data = tiny.model(text).SerializeToString()
    ModelFile.load(onnx.ModelProto.FromString(data))  # negative control
    with pytest.raises(InputError, match="UTF-8"):
        ModelFile.load(onnx.ModelProto.FromString(data.replace(b"\x01r", b"\x01\xff")))


@pytest.mark.parametrize("kind", sorted(set(helper.get_all_tensor_dtypes()) - {TensorProto.STRING}))
def test_size_of_raw_data(kind: int) -> None:
    array = np.zeros(5, helper.tensor_dtype_to_np_dtype(kind))
    tensor = numpy_helper.from_array(array)
    assert tensor.data_type == kind
    assert raw_size(tensor) == len(tensor.raw_data)


def test_payload_that_does_not_fit_its_shape() -> None:
    proto = tiny.two_layers()
    proto.graph.initializer[0].raw_data = b"1234"
    with pytest.raises(InputError):
        ModelFile.load(proto).initializer("W1")


# --- external data ---


def external(folder: Path, location: str = "w.data") -> tuple[onnx.ModelProto, Path]:
    proto = tiny.two_layers()
    path = tiny.save_external(proto, folder / "model.onnx", {"W1": location, "W2": location}, before=7, gap=5)
    return proto, path


def test_external_data_is_mapped(tmp_path: Path) -> None:
    _, path = external(tmp_path)
    model = ModelFile.load(path)
    for name in ("W1", "W2"):
        array = model.initializer(name)
        expected = numpy_helper.to_array(next(t for t in tiny.two_layers().graph.initializer if t.name == name))
        assert isinstance(array, np.memmap)
        assert np.array_equal(array, expected)
    assert model.size == path.stat().st_size + 4 * (4 * 5 + 5 * 3)
    assert not next(t for t in model.proto.graph.initializer if t.name == "W1").raw_data


def change(proto: onnx.ModelProto, path: Path, key: str, value: str) -> Path:
    tensor = next(t for t in proto.graph.initializer if t.name == "W1")
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    return saved(proto, path.parent)


ESCAPES = {
    "absolute": ("location", "/etc/passwd", "absolute"),
    "of another system": ("location", "C:\\windows\\system.ini", "absolute"),
    "parent": ("location", "../outside.data", "outside the model's folder"),
    "parent, deeper": ("location", "sub/../../outside.data", "outside|not found"),
    "no name": ("location", "", "without a usable file name"),
    "missing": ("location", "other.data", "not found"),
    "a folder": ("location", "sub", "not a regular file"),
    "too far": ("offset", "100000", "cut short"),
    "negative": ("offset", "-4", "not a number"),
    "not a number": ("length", "ten", "not a number"),
    "other length": ("length", "4", "need 80"),
    "huge": ("offset", "9" * 30, "not a number"),
}


@pytest.mark.parametrize("case", list(ESCAPES))
def test_external_references_are_not_followed_anywhere(case: str, tmp_path: Path) -> None:
    key, value, message = ESCAPES[case]
    folder = tmp_path / "home"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.data").write_bytes(bytes(1000))
    proto, path = external(folder)
    with pytest.raises(InputError, match=message):
        ModelFile.load(change(proto, path, key, value))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_external_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    _, path = external(folder)
    (folder / "w.data").rename(tmp_path / "w.data")
    (folder / "w.data").symlink_to(tmp_path / "w.data")
    with pytest.raises(InputError, match="outside the model's folder"):
        ModelFile.load(path)


def test_external_file_cut_short(tmp_path: Path) -> None:
    _, path = external(tmp_path)
    data = tmp_path / "w.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut short"):
        ModelFile.load(path)


def test_external_data_of_a_model_object(tmp_path: Path) -> None:
    proto, _ = external(tmp_path)
    with pytest.raises(InputError, match="Give the model's path"):
        ModelFile.load(proto)


# --- fuzz: an error is an InputError, never anything else ---


def rich_model() -> onnx.ModelProto:
    text = """g (float[N,4] x, bool c, int64[2] i) => (float y) {
        k = Constant<value=int64[2] {4, 4}>()  r = Reshape(V, k)  t = Transpose<perm=[1,0]>(r)
        h = Gemm<alpha=2.0, transB=1>(x, t, b)
        [if] j = If(c) <then_branch = p () => (float o) { o = MatMul(h, W) },
                        else_branch = q () => (float o2) { o2 = Add(h, W) }>
        s = Constant<value=int64[4] {1, 4, 2, 2}>()  z = Reshape(j, s)
        u = Conv<kernel_shape=[2,2], pads=[1,0,0,1], auto_pad="NOTSET">(z, C)
        f = tests.f(u)  y = Flatten(f) }"""
    functions = (
        '<domain: "tests", opset_import: ["":17]> f <a: float = 1.0> (v) => (w) { w = Elu<alpha: float = @a>(v) }'
    )
    tensors = {"V": tiny.weight(2, 8), "b": tiny.weight(4), "W": tiny.weight(4, 4), "C": tiny.weight(3, 4, 2, 2)}
    return tiny.model(text, tensors, functions=functions, imports=', "tests":1')


@pytest.mark.parametrize("kind", ["bytes", "cut", "insert"])
def test_damaged_files_give_input_errors(kind: str) -> None:
    good = rich_model().SerializeToString()
    assert len(discover(ModelFile.load(rich_model()), Selection())[0]) == 2
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        at = int(generator.integers(len(data)))
        if kind == "bytes":
            for position in generator.integers(0, len(data), 1 + at % 3):
                data[position] = generator.integers(256)
        elif kind == "cut":
            del data[at : at + int(generator.integers(1, 20))]
        else:
            data[at:at] = generator.bytes(3)
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(bytes(data))
        except Exception:  # what cannot be parsed is the case of `test_bad_content`
            refused += 1
            continue
        try:
            model = ModelFile.load(proto)
            for weight in discover(model, Selection())[0]:
                model.initializer(weight.name)
        except InputError:
            refused += 1
    assert refused > 50
