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
from onnx_optshift.graph import external
from onnx_optshift.graph.external import copy_bytes
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.patch import write_beside
from onnx_optshift.graph.static_check import unchanged_outside


def no_kernel(*_args, **_options):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def half_kernel(source, target, count, offset_src, offset_dst):
    """Copies a little, then cannot go on."""
    if offset_src > 1000:
        raise OSError(errno.EINVAL, "Invalid argument")
    os.pwrite(target, os.pread(source, min(count, 900), offset_src), offset_dst)
    return min(count, 900)


@pytest.mark.parametrize("kernel", [None, no_kernel, half_kernel])
def test_bytes_are_copied_whoever_does_it(kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system's kernel does not copy between files")
    if kernel is not None:
        monkeypatch.setattr(os, "copy_file_range", kernel)
    monkeypatch.setattr(external, "_CHUNK", 512)
    content = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("xb") as target:
        target.write(b"before")  # still in the buffer
        copy_bytes(source, 5, 9000, target)
        target.write(b"after")
    assert (tmp_path / "b").read_bytes() == b"before" + content[5:9005] + b"after"


def test_other_errors_of_the_kernel_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    (tmp_path / "a").write_bytes(bytes(100))
    with (
        (tmp_path / "a").open("rb") as source,
        (tmp_path / "b").open("xb") as target,
        pytest.raises(OSError, match="No"),
    ):
        copy_bytes(source, 0, 100, target)


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("xb") as target:  # noqa: SIM117
        with pytest.raises(InputError, match="became shorter"):
            copy_bytes(source, 50, 51, target)


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
        unchanged_outside(model, written.temp_path, new)
        written.commit()
    assert out.stat().st_size < weights["A"].nbytes < source.stat().st_size
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    x = tiny.weight(3, 32, seed=5)
    for condition, weight in ((True, new["A"]), (False, weights["B"])):
        assert np.allclose(session.run(None, {"c": np.array(condition), "x": x})[0], x @ weight, atol=1e-4)
