"""`diagnose` and `--flatness` from the command line, on a real small model."""

import json
from pathlib import Path

from onnx_optshift.cli import main

MODEL = Path(__file__).parent.parent / "models" / "digits_mlp" / "model.onnx"


def test_diagnose_ends_in_a_verdict_and_writes_no_model(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["diagnose", str(MODEL), "--flatness", "4", "--max-samples", "200", "--report", str(report)]) == 0
    assert "freedom exists" in capsys.readouterr().out
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["collapse"]["verdict"]["answer"] in {"go", "try small", "no-go"}
    assert found["flatness"]["loss_before"] >= 0
    assert found["model"]["output"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_pass_reports_flatness_before_and_after(tmp_path, capsys):
    report, out = tmp_path / "report.json", tmp_path / "out.onnx"
    words = [
        str(MODEL),
        str(out),
        "--tolerance",
        "0.05",
        "--heldout",
        "none",
        "--flatness",
        "4",
        "--max-samples",
        "200",
    ]
    assert main([*words, "--report", str(report)]) == 0
    assert "Sharpness" in capsys.readouterr().out
    flatness = json.loads(report.read_text(encoding="utf-8"))["flatness"]
    assert flatness["loss_after"] != flatness["loss_before"]
    # Without the option nothing is measured.
    assert main([*words[:-4], "--max-samples", "200", "--report", str(report)]) == 0
    assert json.loads(report.read_text(encoding="utf-8"))["flatness"] is None
