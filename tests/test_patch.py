"""Writing: only the promised bytes, whole or not at all, and a check that notices anything else."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_models as tiny
from onnx import TensorProto, numpy_helper

from onnx_optshift.errors import InputError, OptShiftError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.prove.static import PatchError, holds
from onnx_optshift.write import atomic, patch
from onnx_optshift.write.patch import write_beside

NEW = {"W1": tiny.weight(4, 5, seed=7), "W2": tiny.weight(5, 3, seed=8)}


def saved(folder: Path, proto: onnx.ModelProto | None = None) -> Path:
    path = folder / "in.onnx"
    path.write_bytes((proto or tiny.two_layers()).SerializeToString())
    return path


def written(source: Path | onnx.ModelProto, out: Path, names: tuple[str, ...] = ("W1", "W2"), **options: bool) -> Path:
    """Writes, checks the file before its rename, and renames."""
    model = ModelFile.load(source)
    arrays = {name: NEW[name] for name in names}
    with write_beside(model, arrays, out, **options) as result:
        assert result.final_path == out
        holds(model, result.temp_path, arrays)
        ort.InferenceSession(result.temp_path, providers=["CPUExecutionProvider"])  # it can be tried before it counts
        result.commit()
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
    return out


def values(path: Path) -> dict[str, np.ndarray]:
    model = ModelFile.load(path)
    return {name: np.array(model.initializer(name)) for name in model.tensors}


def check_values(path: Path, names: tuple[str, ...] = ("W1", "W2")) -> None:
    original = {t.name: numpy_helper.to_array(t) for t in tiny.two_layers().graph.initializer}
    expected = original | {name: NEW[name] for name in names}
    found = values(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = tiny.weight(2, 4, seed=3)
    y = np.maximum(x @ expected["W1"] + expected["b"], 0) @ expected["W2"]
    assert np.allclose(session.run(None, {"x": x})[0], y, atol=1e-5)


# --- inline ---


def test_only_the_payload_of_raw_tensors_differs(tmp_path: Path) -> None:
    proto = tiny.two_layers()
    proto.metadata_props.add(key="k", value="v")
    source = saved(tmp_path, proto)
    before = source.read_bytes()
    after = written(source, tmp_path / "out.onnx", ("W2",)).read_bytes()
    payload = numpy_helper.to_array(proto.graph.initializer[2]).tobytes()
    start = before.index(payload)
    assert after == before[:start] + NEW["W2"].tobytes() + before[start + len(payload) :]
    assert source.read_bytes() == before
    check_values(tmp_path / "out.onnx", ("W2",))


@pytest.mark.parametrize(
    ("number", "dtype", "field"),
    [
        (TensorProto.FLOAT, np.float32, "float_data"),
        (TensorProto.DOUBLE, np.float64, "double_data"),
        (TensorProto.FLOAT16, np.float16, "int32_data"),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16, "int32_data"),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_storage_is_kept(number: int, dtype: type, field: str, raw: bool) -> None:
    old, new = (tiny.weight(4, 3, seed=seed).astype(dtype) for seed in (1, 2))
    tensor = onnx.helper.make_tensor("W", number, (4, 3), old.tobytes(), raw=True)
    proto = tiny.model(
        "g (float x) => (float y) { y = MatMul(x, W) }", {"W": tensor if raw else tiny.typed("W", old, number)}
    )
    proto.graph.input[0].type.tensor_type.elem_type = proto.graph.output[0].type.tensor_type.elem_type = number
    result = tiny.patched(ModelFile.load(proto), {"W": new})
    stored = result.graph.initializer[0]
    assert [f.name for f, _ in stored.ListFields()] == [f.name for f, _ in proto.graph.initializer[0].ListFields()]
    assert stored.HasField("raw_data") == raw
    assert (len(getattr(stored, field)) == 0) == raw
    assert np.array_equal(numpy_helper.to_array(stored), new)
    assert np.array_equal(numpy_helper.to_array(proto.graph.initializer[0]), old)


def test_transposed_and_strided_arrays_are_written_in_order() -> None:
    model = ModelFile.load(tiny.two_layers())
    array = np.asfortranarray(NEW["W1"])
    assert np.array_equal(numpy_helper.to_array(tiny.patched(model, {"W1": array}).graph.initializer[0]), array)


def test_constant_nodes(tmp_path: Path) -> None:
    text = "g (float[N,4] x) => (float y) { k = Constant<value=float[4,1] {1,2,3,4}>()  y = MatMul(x, k) }"
    model = ModelFile.load(tiny.model(text))
    new = np.full((4, 1), 0.5, np.float32)
    with write_beside(model, {"k": new}, tmp_path / "out.onnx") as result:
        holds(model, result.temp_path, {"k": new})
        with pytest.raises(PatchError, match="'k' does not hold"):
            holds(model, result.temp_path, {"k": np.nextafter(new, np.float32(1))})
        with pytest.raises(PatchError, match="'k' differs"):
            holds(model, result.temp_path, {})
        result.commit()
    assert np.array_equal(ModelFile.load(tmp_path / "out.onnx").initializer("k"), new)


@pytest.mark.parametrize("array", [NEW["W1"].astype(np.float64), NEW["W1"].T, NEW["W1"].ravel()])
def test_dtype_and_shape_are_insisted_on(array: np.ndarray, tmp_path: Path) -> None:
    model = ModelFile.load(tiny.two_layers())
    with pytest.raises(InputError, match=r"expected float32 \[4, 5\], got"):
        write_beside(model, {"W1": array}, tmp_path / "o")
    with pytest.raises(InputError, match="Close matches: 'W2', 'W1'"):
        write_beside(model, {"W": NEW["W1"]}, tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_nothing_to_change_is_a_copy_byte_for_byte(tmp_path: Path) -> None:
    source = saved(tmp_path)
    # An unknown field in front: parsing and serializing would put it last.
    content = b"\xc0\x3e\x01" + source.read_bytes()
    source.write_bytes(content)
    assert onnx.ModelProto.FromString(content).SerializeToString() != content
    assert written(source, tmp_path / "out.onnx", ()).read_bytes() == content


def test_a_model_object_is_serialized(tmp_path: Path) -> None:
    check_values(written(tiny.two_layers(), tmp_path / "a.onnx"))
    check_values(written(tiny.two_layers(), tmp_path / "b.onnx", ()), ())


def test_out_may_be_in(tmp_path: Path) -> None:
    source = saved(tmp_path)
    check_values(written(source, source))
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


# --- external ---

LAYOUTS = {
    "one file": {"W1": "w.data", "W2": "w.data"},
    "two files": {"W1": "w.data", "W2": "v.data"},
    "folder": {"W1": "sub/w.data", "W2": "w.data"},
    "all": {"W1": "w.data", "b": "w.data", "W2": "w.data"},
}


def external(folder: Path, layout: str) -> Path:
    (folder / "sub").mkdir(parents=True)
    return tiny.save_external(tiny.two_layers(), folder / "in.onnx", LAYOUTS[layout], before=16, gap=12)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("names", [("W1", "W2"), ("W2",), ()])
@pytest.mark.parametrize("where", ["beside", "elsewhere", "itself"])
def test_external_data(layout: str, names: tuple[str, ...], where: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    source = external(home, layout)
    before = contents(home)
    other = tmp_path / "other"
    other.mkdir()
    out = {"beside": home / "out.onnx", "elsewhere": other / "out.onnx", "itself": source}[where]
    written(source, out, names)
    after = contents(home)
    kept = before if where != "itself" else {name: data for name, data in before.items() if name != "in.onnx"}
    assert all(after[name] == data for name, data in kept.items())
    if where == "elsewhere":
        shutil.rmtree(home)
    check_values(out, names)
    if not names:
        assert out.read_bytes() == before["in.onnx"]
    elif where == "beside":
        # Of the external file that changed, only the span of the tensor did.
        place = next(t for t in ModelFile.load(out).proto.graph.initializer if t.name == "W2").external_data
        entries = {entry.key: entry.value for entry in place}
        old, new = before[LAYOUTS[layout]["W2"]], (home / entries["location"]).read_bytes()
        offset, length = int(entries["offset"]), int(entries["length"])
        assert new[offset : offset + length] == NEW["W2"].tobytes()
        if names == ("W2",):
            assert new[:offset] + new[offset + length :] == old[:offset] + old[offset + length :]


def test_two_runs_into_the_same_place(tmp_path: Path) -> None:
    source, out = external(tmp_path, "one file"), tmp_path / "out.onnx"
    written(source, out)
    names = set(contents(tmp_path))
    written(source, out)
    assert set(contents(tmp_path)) == names  # the same result has the same names
    first = out.read_bytes()
    model = ModelFile.load(source)
    result = write_beside(model, {"W1": 2 * NEW["W1"]}, out)
    # Until the rename, the model that is there still has its own data.
    assert out.read_bytes() == first
    check_values(out)
    result.commit()
    assert np.array_equal(ModelFile.load(out).initializer("W1"), 2 * NEW["W1"])


def test_discard_keeps_the_data_of_the_model_that_is_there(tmp_path: Path) -> None:
    source, out = external(tmp_path, "one file"), tmp_path / "out.onnx"
    written(source, out)
    before = contents(tmp_path)
    write_beside(ModelFile.load(source), NEW, out).discard()  # the same data file
    assert contents(tmp_path) == before
    write_beside(ModelFile.load(source), {"W1": 2 * NEW["W1"]}, out).discard()  # another one
    assert contents(tmp_path) == before


def test_tensors_that_share_bytes_part(tmp_path: Path) -> None:
    text = "g (float[N,4] x) => (float y) { h = MatMul(x, A)  y = MatMul(h, B) }"
    path = tiny.save_external(
        tiny.model(text, {"A": tiny.weight(4, 4), "B": tiny.weight(4, 4)}), tmp_path / "in.onnx", {"A": "w", "B": "w"}
    )
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[1].external_data if e.key == "offset").value = "0"
    path.write_bytes(proto.SerializeToString())
    model = ModelFile.load(path)
    new = {"A": tiny.weight(4, 4, seed=1)}
    with write_beside(model, new, tmp_path / "out.onnx") as result:
        holds(model, result.temp_path, new)
        result.commit()
    found = values(tmp_path / "out.onnx")
    assert np.array_equal(found["A"], tiny.weight(4, 4, seed=1))
    assert np.array_equal(found["B"], tiny.weight(4, 4))


def test_a_copy_does_not_replace_another_models_data(tmp_path: Path) -> None:
    source = external(tmp_path / "home", "one file")
    other = tmp_path / "other"
    other.mkdir()
    (other / "w.data").write_bytes(b"of another model")
    with pytest.raises(InputError, match="exists with other content"):
        written(source, other / "out.onnx", ())
    assert contents(other) == {"w.data": b"of another model"}
    written(source, other / "out.onnx")  # a patched model brings its data under a new name
    assert (other / "w.data").read_bytes() == b"of another model"
    check_values(other / "out.onnx")


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("names", [("W1",), ()])
def test_save_as_external_data(
    layout: str | None, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    source = external(home, layout) if layout else None
    other.mkdir()
    out = other / "out.onnx"
    monkeypatch.setattr(patch, "EXTERNAL_FROM_BYTES", 60)  # W1 and W2, but not b
    written(source or tiny.two_layers(), out, names, save_as_external=True)
    check_values(out, names)
    files = [path for path in other.iterdir() if path != out]
    assert len(files) == 1
    tensors = {tensor.name: tensor for tensor in onnx.load(out, load_external_data=False).graph.initializer}
    for name in ("W1", "W2"):
        entries = {entry.key: entry.value for entry in tensors[name].external_data}
        assert entries["location"] == files[0].name
        assert int(entries["offset"]) % patch.ALIGNMENT == 0
        assert not tensors[name].raw_data
    assert (tensors["b"].data_location == TensorProto.EXTERNAL) == (layout == "all")


def test_save_as_external_data_leaves_small_tensors_inline(tmp_path: Path) -> None:
    out = written(tiny.two_layers(), tmp_path / "out.onnx", save_as_external=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    check_values(out)


# --- whole or not at all ---


def test_nothing_appears_before_commit(tmp_path: Path) -> None:
    source, out = saved(tmp_path), tmp_path / "out.onnx"
    out.write_bytes(b"the old one")
    result = write_beside(ModelFile.load(source), NEW, out)
    assert out.read_bytes() == b"the old one"
    assert result.temp_path.parent == tmp_path
    result.discard()
    result.discard()
    result.commit()  # a discarded file cannot appear any more
    assert contents(tmp_path) == {"in.onnx": source.read_bytes(), "out.onnx": b"the old one"}


def test_commit_is_final(tmp_path: Path) -> None:
    result = write_beside(ModelFile.load(saved(tmp_path)), NEW, tmp_path / "out.onnx")
    result.commit()
    result.discard()
    result.commit()
    check_values(tmp_path / "out.onnx")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("step", ["_write_proto", "digest", "little_endian", "_fill_patched"])
def test_interrupts_and_full_disks_leave_nothing(
    error: BaseException, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = external(tmp_path, "two files")
    model, before = ModelFile.load(source), contents(tmp_path)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(patch, step, fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_beside(model, NEW, source)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert str(source) in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupt_around_the_rename(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = external(tmp_path, "one file")
    out = tmp_path / "out.onnx"
    result = write_beside(ModelFile.load(source), NEW, out)
    rename = os.replace

    def interrupted(a: Path, b: Path) -> None:
        if when == "after":
            rename(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.commit()
    if when == "after":
        check_values(out)  # it is in place, so its data stays
    else:
        assert not out.exists()
        assert not list(tmp_path.glob("*.data.*"))
        assert len(contents(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such permissions")
def test_permissions(tmp_path: Path) -> None:
    source = saved(tmp_path)
    out = written(source, tmp_path / "out.onnx")
    probe = tmp_path / "probe"
    probe.touch()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(probe.stat().st_mode)
    out.chmod(0o640)
    assert stat.S_IMODE(written(source, out).stat().st_mode) == 0o640


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = ModelFile.load(tiny.two_layers())
    with pytest.raises(InputError, match="does not exist"):
        write_beside(model, NEW, tmp_path / "none" / "out.onnx")
    with pytest.raises(InputError, match="not a regular file"):
        write_beside(model, NEW, tmp_path)
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        write_beside(model, {}, tmp_path / ("n" * 300))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_devices_are_not_replaced() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        write_beside(ModelFile.load(tiny.two_layers()), NEW, Path("/dev/full"))


# --- the check itself ---


def tampered(model: ModelFile, path: Path, change: object) -> Path:
    proto = tiny.patched(model, NEW)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def set_bias(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[1].raw_data = bytes(20)


def set_nan(proto: onnx.ModelProto) -> None:
    array = NEW["W1"].copy()
    array[2, 3] = np.nan
    proto.graph.initializer[0].raw_data = array.tobytes()


def set_alpha(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", 2.0))


def set_storage(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].float_data.extend(NEW["W1"].ravel().tolist())


def swap_tensors(proto: onnx.ModelProto) -> None:
    first, second = (onnx.TensorProto.FromString(t.SerializeToString()) for t in proto.graph.initializer[:2])
    proto.graph.initializer[0].CopyFrom(second)
    proto.graph.initializer[1].CopyFrom(first)


def add_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="tool", value="was here")


TAMPERINGS = {
    "bias": (set_bias, "'b' differs"),
    "not finite": (set_nan, "'W1' would hold values that are not finite"),
    "attribute": (set_alpha, "more than tensor payloads"),
    "storage": (set_storage, "'W1' is stored in"),
    "order": (swap_tensors, "more than tensor payloads"),
    "metadata": (add_metadata, "more than tensor payloads"),
    "name": (lambda proto: setattr(proto.graph, "name", "h"), "more than tensor payloads"),
}


@pytest.mark.parametrize("case", list(TAMPERINGS))
def test_the_check_notices(case: str, tmp_path: Path) -> None:
    change, message = TAMPERINGS[case]
    model = ModelFile.load(tiny.two_layers())
    holds(model, tampered(model, tmp_path / "good.onnx", lambda proto: None), NEW)
    with pytest.raises(OptShiftError, match=message):
        holds(model, tampered(model, tmp_path / "bad.onnx", change), NEW)


def test_the_check_reads_external_data(tmp_path: Path) -> None:
    source = external(tmp_path, "all")
    model = ModelFile.load(source)
    with write_beside(model, {"W2": NEW["W2"]}, tmp_path / "out.onnx") as result:
        holds(model, result.temp_path, {"W2": NEW["W2"]})
        with pytest.raises(PatchError, match="'W2' differs"):
            holds(model, result.temp_path, {"W1": model.initializer("W1")})
        (data,) = tmp_path.glob("out.*.data")
        content = bytearray(data.read_bytes())
        content[16] ^= 1  # the first byte of W1
        data.write_bytes(content)
        with pytest.raises(PatchError, match="'W1' differs"):
            holds(model, result.temp_path, {"W2": NEW["W2"]})


def test_the_check_lets_old_numbers_that_are_none_pass(tmp_path: Path) -> None:
    proto = tiny.two_layers()
    proto.graph.initializer[1].ClearField("raw_data")
    proto.graph.initializer[1].float_data.extend([float("nan"), 1, 2, 3, 4])
    model = ModelFile.load(proto)
    with write_beside(model, NEW, tmp_path / "out.onnx") as result:
        holds(model, result.temp_path, NEW)
