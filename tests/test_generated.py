"""Whatever the model: outputs kept, only promised bytes changed, and a second run finds nothing more."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from generated_models import models
from hypothesis import HealthCheck, given, note, settings

from onnx_optshift.cli import main

ALL = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# What may pass as exact, relative to the whole output: far above any noise floor, far below any visible error.
MOST_NOISE = {"float32": 1e-3, "float64": 1e-5}


def shift(model: Path, out: Path, data: Path) -> dict:
    report = out.with_suffix(".json")
    options = ["--force", "--device", "cpu", "--quiet", "--report", str(report)]  # of few samples, some of them
    code = main([str(model), str(out), "--calib", str(data), *options])
    assert code == 0
    return json.loads(report.read_text())


def run(model: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0].astype(np.float64)


def blanked(path: Path, names: set[str]) -> onnx.ModelProto:
    """The model without the contents of these initializers or Constant nodes, those of bodies by their own name."""
    proto = onnx.load(path)
    own = {name.split("#")[0] for name in names}
    todo = [proto.graph]
    while todo:
        graph = todo.pop()
        for tensor in graph.initializer:
            if tensor.name in own:
                tensor.ClearField("raw_data")
        for node in graph.node:
            if node.op_type == "Constant" and node.output[0] in own:
                node.attribute[0].t.ClearField("raw_data")
            todo += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return proto


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> dict:
    """Runs the pass twice and holds it to its promises; the report of the first run."""
    original, once, twice, data = (folder / name for name in ("in.onnx", "once.onnx", "twice.onnx", "data.npz"))
    onnx.save(proto, original)
    np.savez(data, **feeds)
    report = shift(original, once, data)

    layers = {layer["weight"]: layer for layer in report["layers"] if layer["weight"]}
    shifted = {name for name, layer in layers.items() if layer["status"] == "shifted"}
    assert blanked(once, shifted) == blanked(original, shifted)
    if not shifted:
        assert onnx.load(once) == onnx.load(original)
    for name in shifted:
        assert layers[name]["norm_after"] < layers[name]["norm_before"]

    reference, result = run(original, feeds), run(once, feeds)
    deviation = float(np.linalg.norm(result - reference))
    bound = max((output["bound"] for output in (report["verification"] or {"outputs": []})["outputs"]), default=0.0)
    assert bound <= MOST_NOISE[str(feeds["x"].dtype)]
    assert deviation <= bound * np.linalg.norm(reference)

    again = shift(once, twice, data)
    more = [layer for layer in again["layers"] if layer["status"] == "shifted"]
    assert not more, f"a second run shifts {more}"
    assert onnx.load(twice) == onnx.load(once)
    return report


def run_case(case: tuple[onnx.ModelProto, dict[str, np.ndarray], list[str]]) -> dict:
    proto, feeds, blocks = case
    note(f"{' '.join(blocks)}")
    with tempfile.TemporaryDirectory(prefix="generated-") as folder:
        return check(proto, feeds, Path(folder))


@given(models())
@settings(ALL, max_examples=25)
def test_promises_on_random_models(case):
    run_case(case)


@pytest.mark.slow
@given(models())
@settings(ALL, max_examples=400)
def test_promises_on_many_random_models(case):
    run_case(case)
