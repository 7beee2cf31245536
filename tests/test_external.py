"""External data: copied without being held, found in bodies too, and never followed out of the model's folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_models as tiny

from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.prove.static import holds
from onnx_optshift.write.atomic import data_files
from onnx_optshift.write.patch import write_beside


def no_kernel(*_args, **_options):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def half_kernel(copy):
    """Copies a little, then cannot go on."""
    calls = []

    def copied(source, target, count):
        calls.append(count)
        if len(calls) > 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return copy(source, target, 33)

    return copied


@pytest.mark.parametrize("kernel", ["all", "half", "none", "absent"])
def test_data_is_copied_whole_whoever_does_it(kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system's kernel does not copy between files")
    if kernel == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif kernel != "all":
        monkeypatch.setattr(os, "copy_file_range", no_kernel if kernel == "none" else half_kernel(os.copy_file_range))
    source = tiny.save_external(tiny.two_layers(), tmp_path / "in.onnx", {"W1": "w.data", "W2": "w.data"}, before=100)
    model, out = ModelFile.load(source), tmp_path / "out.onnx"
    new = {"W2": 2 * model.initializer("W2")}
    with write_beside(model, new, out) as written:
        holds(model, written.temp_path, new)
        written.commit()
    (data,) = data_files(out)
    before, after = (tmp_path / "w.data").read_bytes(), data.read_bytes()
    assert len(after) == len(before)
    assert after.replace(new["W2"].tobytes(), model.initializer("W2").tobytes()) == before


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.data", "C:\\w.data", "link.data"])
def test_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "w.data").write_bytes(bytes(80))
    (home / "link.data").symlink_to(tmp_path / "w.data")
    path = tiny.save_external(tiny.two_layers(), home / "in.onnx", {"W1": "w.data"})
    ModelFile.load(path)  # negative control
    proto = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in proto.graph.initializer if t.name == "W1")
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"refused|outside the model's folder"):
        ModelFile.load(path)


def test_weights_of_bodies_become_external_too(tmp_path: Path) -> None:
    weights = {name: tiny.weight(32, 32, seed=seed) for seed, name in enumerate(("A", "B"))}
    proto = tiny.model(
        """g (bool c, float[N,32] x) => (float[N,32] y) {
            y = If(c) <then_branch = t () => (float[N,32] p) { p = MatMul(x, A) },
                       else_branch = e () => (float[N,32] q) { q = MatMul(x, B) }>
        }"""
    )
    for attribute in proto.graph.node[0].attribute:
        name = "A" if attribute.name == "then_branch" else "B"
        attribute.g.initializer.append(onnx.numpy_helper.from_array(weights[name], name))
    source = tmp_path / "in.onnx"
    source.write_bytes(proto.SerializeToString())
    model, out = ModelFile.load(source), tmp_path / "out.onnx"
    new = {"A": 2 * weights["A"]}
    with write_beside(model, new, out, save_as_external=True) as written:
        holds(model, written.temp_path, new)
        written.commit()
    assert out.stat().st_size < weights["A"].nbytes < source.stat().st_size
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    x = tiny.weight(3, 32, seed=5)
    for condition, weight in ((True, new["A"]), (False, weights["B"])):
        assert np.allclose(session.run(None, {"c": np.array(condition), "x": x})[0], x @ weight, atol=1e-4)
