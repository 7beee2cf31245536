"""docs/coverage.md says what the pass does, and the tool that makes it sees changes."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


coverage = load("coverage_table")


def test_page_is_current():
    assert coverage.page() == (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8"), "run tools/coverage_table.py"


def test_every_handled_operator_has_a_row():
    operators = importlib.import_module("onnx_optshift.graph.operators").OPERATORS
    handled = {op for (_, op), operator in operators.items() if operator.matcher}
    rows = {layer.operator for layer in coverage.layers()}
    assert handled - rows == {"FusedGemm"}  # as Gemm; the CPU runs none


def test_a_layer_that_has_no_freedom_shows(monkeypatch):
    # Six samples span all six features: a table that says "shifted" whatever happens would not notice.
    layer = coverage.Layer("MatMul", "full rank", "y = MatMul(x, W)", x=(6, 6))
    assert coverage.main_graph(layer, "float32") == "unchanged"
    monkeypatch.setattr(coverage, "layers", lambda: iter([layer]))
    assert coverage.page() != (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
