"""The models of the onnx package's own backend tests: whatever they are, the pass ends well on them.

A part of them in the default run, all of them with `-m slow`. `tools/backend_survey.py` prints the same as tables.
"""

from __future__ import annotations

import collections
from pathlib import Path

import backend_survey as survey
import numpy as np
import onnx
import pytest
import tiny_models as tiny
from onnx import numpy_helper

ROOT = Path(__file__).parents[1]


# Modules of node cases that hold a linear operator.
LINEAR = ("conv", "convtranspose", "einsum", "gemm", "gru", "lstm", "matmul", "rnn")


def run(cases, tmp_path):
    rows = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows.append(survey.survey(case, folder))
        for file in folder.glob("*.onnx"):
            file.unlink()  # some are large, and pytest keeps folders
    return rows


def outcomes(rows):
    problems = [f"{row.kind}/{row.name}: {row.message}" for row in rows if row.outcome == "problem"]
    assert not problems, "\n".join(problems)
    return collections.Counter(row.outcome for row in rows)


def test_pytorch_operators_and_simple_models(tmp_path):
    found = outcomes(run(survey.cases(["simple", "pytorch-operator"]), tmp_path))
    assert found.total() >= 58
    assert found["shifted"] >= 1


def test_converted_layers(tmp_path):
    cases = [
        *survey.cases(["pytorch-converted"], "ConvTranspose"),
        *survey.cases(["pytorch-converted"], "Conv1d_groups"),
    ]
    rows = run(cases, tmp_path)
    found = outcomes(rows)
    operators = {(op_type, status) for row in rows for op_type, status, _ in row.layers}
    assert {op_type for op_type, _ in operators} == {"Conv", "ConvTranspose"}
    assert found["shifted"] + found["unchanged"] == len(rows)


def test_linear_operators_with_a_frozen_operand(tmp_path):
    # One feed of few rows: where anything is free the layer is shifted, and its outputs are compared.
    rows = run(survey.cases(["frozen"], modules=["gemm", "matmul", "einsum", "convtranspose"]), tmp_path)
    found = outcomes(rows)
    shifted = {op_type for row in rows for op_type, status, _ in row.layers if status == "shifted"}
    assert shifted >= {"Gemm", "MatMul", "Einsum"}
    assert found["shifted"] + found["unchanged"] + found["refused"] == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", survey.KINDS)
def test_every_model(kind, tmp_path):
    rows = run(survey.cases([kind]), tmp_path)
    found = outcomes(rows)
    least = {"simple": 23, "pytorch-operator": 35, "pytorch-converted": 82, "light": 9, "drawn": 9, "node": 1800}
    assert len(rows) >= least.get(kind, 100)
    # Most node cases that are refused hold values that are not finite: bad calibration data, said in one message.
    assert found["refused"] <= max(1, 0.1 * len(rows))


# --- the survey notices what it is there to notice ---


def gemm(**changes):
    x = tiny.weight(3, 4, seed=1)
    proto = tiny.model("g (float[3,4] x) => (float[3,2] y) { y = MatMul(x, W) }", {"W": tiny.weight(4, 2)} | changes)
    return survey.Case("node", "gemm", proto, [[numpy_helper.from_array(x, "x").SerializeToString()]])


def test_outputs_that_moved_are_seen():
    case = gemm()
    same, allowed = survey.deviation(case.model, case.model, case.feeds)
    assert same == 0
    moved, _ = survey.deviation(case.model, gemm(W=tiny.weight(4, 2) * np.float32(1 + 1e-5)).model, case.feeds)
    assert allowed < moved


@pytest.mark.parametrize(
    ("code", "text", "files", "problem"),
    [
        (0, "", ["out.onnx", "report.json"], ""),
        (0, "", ["report.json"], "exit 0, but"),
        (0, "", ["out.onnx", "report.json", "out.onnx.tmp"], "exit 0, but"),
        (2, "error: this.\n", [], ""),
        (2, "error: this.\n", ["out.onnx"], "was written"),
        (2, "error: this.\nand that\n", [], "not one message"),
        (2, "", [], "not one message"),
        (2, "error: internal error: KeyError: 3\n", [], "internal error"),
        (3, "error: outputs differ.\n", [], "exit 3"),
    ],
)
def test_bad_endings_are_seen(code, text, files, problem, tmp_path):
    for name in ["model.onnx", "test_data_set_0", *files]:
        (tmp_path / name).touch()
    found = survey._problem(code, text, tmp_path)
    assert problem in found
    assert bool(problem) == bool(found)


def test_an_unchanged_model_that_changed_is_seen(tmp_path):
    case = gemm()
    onnx.save(gemm(W=tiny.weight(4, 2, seed=5)).model, tmp_path / "out.onnx")
    (tmp_path / "report.json").write_text('{"layers": []}')
    assert "the model changed" in survey._differs(case, tmp_path / "out.onnx", tmp_path / "report.json")


def test_freezing_makes_one_case_for_each_operand():
    text = "g (float[3,4] a, float[4,2] b) => (float[3,2] y) { y = MatMul(a, b) }"
    feeds = [[numpy_helper.from_array(tiny.weight(*shape)).SerializeToString() for shape in ((3, 4), (4, 2))]]
    frozen = list(survey._frozen(survey.Case("node", "matmul", tiny.model(text), feeds)))
    assert [case.name for case in frozen] == ["matmul[a]", "matmul[b]"]
    assert [[value.name for value in case.model.graph.input] for case in frozen] == [["b"], ["a"]]
    assert [len(case.feeds[0]) for case in frozen] == [1, 1]
