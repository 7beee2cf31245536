"""docs/coverage.md says what the pass does, and the tool that makes it sees changes."""

from pathlib import Path

import coverage_table as coverage

from onnx_optshift.graph.operators import OPERATORS

ROOT = Path(__file__).parents[1]


def test_page_is_current():
    assert coverage.page() == (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8"), "run tools/coverage_table.py"


def test_every_handled_operator_has_a_row():
    handled = {op for (_, op), operator in OPERATORS.items() if operator.matcher}
    rows = {layer.operator for layer in coverage.layers()}
    assert handled - rows == {"FusedGemm"}  # as Gemm; the CPU runs none


def test_a_layer_that_has_no_freedom_shows(monkeypatch):
    # Six samples span all six features: a table that says "shifted" whatever happens would not notice.
    layer = coverage.Layer("MatMul", "full rank", "y = MatMul(x, W)", x=(6, 6))
    assert coverage.main_graph(layer, "float32") == "unchanged"
    monkeypatch.setattr(coverage, "layers", lambda: iter([layer]))
    assert coverage.page() != (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
