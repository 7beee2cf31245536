"""Data of a replaced model goes, and only where nobody else can need it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models as tiny

from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.write.atomic import data_files
from onnx_optshift.write.patch import write_beside


def run(folder: Path, factor: float) -> Path:
    """One run from `in.onnx` into `out.onnx`; returns the data file that OUT names afterwards."""
    source, out = folder / "in.onnx", folder / "out.onnx"
    if not source.exists():
        tiny.save_external(tiny.two_layers(), source, {"W1": "w.data", "W2": "w.data"})
    model = ModelFile.load(source)
    with write_beside(model, {"W1": np.float32(factor) * model.initializer("W1")}, out) as written:
        written.commit()
    (data,) = data_files(out)
    return data


def test_the_data_of_the_model_before_goes(tmp_path: Path) -> None:
    first = run(tmp_path, 2)
    assert first.exists()
    second = run(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "w.data", "out.onnx", second.name}
    assert run(tmp_path, 3) == second  # the same result again: still named, still there
    assert second.exists()


def copied(folder: Path) -> None:
    (folder / "copy.onnx").write_bytes((folder / "out.onnx").read_bytes())


def listed(folder: Path) -> None:
    (folder / "files.json").write_text(f'["{data_files(folder / "out.onnx")[0].name}"]', encoding="utf-8")


def changed(folder: Path) -> None:
    with data_files(folder / "out.onnx")[0].open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("need", [copied, listed, changed])
def test_data_that_somebody_else_may_need_stays(need, tmp_path: Path) -> None:
    first = run(tmp_path, 2)
    need(tmp_path)
    run(tmp_path, 3)
    assert first.exists()


def test_data_of_another_name_is_never_touched(tmp_path: Path) -> None:
    run(tmp_path, 2)
    out = tmp_path / "out.onnx"
    proto = onnx.load(out, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "w.data"
    out.write_bytes(proto.SerializeToString())
    assert data_files(out) == []
    run(tmp_path, 3)
    assert (tmp_path / "w.data").exists()


def test_what_stands_there_need_not_be_a_model(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert data_files(out) == []
    out.write_bytes(b"\xff no model")
    assert data_files(out) == []
