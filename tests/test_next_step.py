"""The last line names the command that helps this model most, with a figure that a run of it then bears out."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny

from onnx_optshift import api
from onnx_optshift.cli import main
from onnx_optshift.commands import next_step
from onnx_optshift.report.figures import mean_change

MODELS = Path(__file__).parents[1] / "models"
PREDICTED = re.compile(
    r"`(?P<command>.*)`: layer error under 4-bit rounding (?P<before>\S+) -> about (?P<after>\S+) \("
)


# All 32 directions are used, but not alike, as in trained models: there rounding errors can cancel.
UNEVEN = {"x": ((tiny.weight(200, 32) * np.geomspace(1, 0.01, 32)) @ tiny.weight(32, 32)).astype(np.float32)}


def command_of(line):
    """The words behind `python -m onnx_optshift`."""
    return shlex.split(re.search("`(.*?)`", line)[1])[3:]


@pytest.mark.parametrize("name", ["digits_transformer", "digits_cnn"])
def test_the_predicted_error_is_that_of_the_command_which_runs_as_it_stands(name, tmp_path):
    report = api.shift(MODELS / name / "model.onnx", device="cpu").report
    found = PREDICTED.search(report.next_step)
    words = [str(tmp_path / "out.onnx") if word == "OUT.onnx" else word for word in command_of(report.next_step)]
    assert main([*words, "--device", "cpu", "--quiet", "--report", str(tmp_path / "r.json")]) == 0
    real = api.shift(
        MODELS / name / "model.onnx", device="cpu", objective="range", tolerance="auto", quantization_bits=4
    ).report.quantization
    (text, _) = mean_change((error.error_before, error.error_after) for error in real)
    before, after = map(float, re.findall(r"\d\.\d+", str(text))[:2])
    # A few columns of a few layers, by one start of several: between half and twice the figure, and the same way.
    assert before / 2 < float(found["before"]) < 2 * before
    assert after / 2 < float(found["after"]) < 2 * after


def test_a_model_with_nothing_to_gain_exactly_is_told_what_else_there_is():
    proto = tiny.two_layers(width=32)
    report = api.shift(proto, UNEVEN, heldout="none", device="cpu").report
    assert report.summary.startswith("Nothing to gain: 2 layers with only one exact solution")
    assert report.next_step.startswith(
        "Exact: nothing to gain. Next, for a quantizer: `python -m onnx_optshift IN.onnx "
    )
    assert PREDICTED.search(report.next_step)
    assert report.to_dict()["next_step"] == report.next_step
    # Negative control: where every direction counts alike there is little to cancel.
    even = api.shift(proto, {"x": tiny.weight(200, 32)}, heldout="none", device="cpu").report
    assert even.next_step.endswith("Next: leave the model as it is.")


def test_a_gain_is_to_be_verified_and_a_grid_to_be_rounded_to(tmp_path, capsys):
    model, out = str(MODELS / "digits_mlp" / "model.onnx"), str(tmp_path / "out.onnx")
    low = tiny.weight(100, 64) * (np.arange(64) < 20)
    np.savez(tmp_path / "low.npz", pixels=low)
    assert main([model, out, "--calib", str(tmp_path / "low.npz"), "--heldout", "none", "--device", "cpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    words = command_of(last)
    assert words[:3] == ["verify", model, out]
    assert main([str(tmp_path / "low.npz") if word == "NEW_DATA" else word for word in words]) == 0
    capsys.readouterr()
    grid = [model, out, "--objective", "range", "--quantization-bits", "4", "--tolerance", "0.05", "--device", "cpu"]
    assert main(grid) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(rf"Next: quantize {re.escape(out)} to 4 bits, .*: layer error \S+ -> \S+ \(-\d+ %\)\.", last)


def test_looking_commands_end_with_one_too():
    proto = tiny.model("g (float[N,32] x) => (float[N,3] y) { y = MatMul(x, W) }", {"W": tiny.weight(32, 3)})
    low = {"x": tiny.weight(100, 32) * (np.arange(32) < 12)}
    found = api.inspect(proto, low, device="cpu").next_step
    assert re.fullmatch(r"Next: `python -m onnx_optshift IN.onnx OUT.onnx`: the norm falls by \d\d %, .*", found)
    assert PREDICTED.search(api.inspect(proto, UNEVEN, device="cpu").next_step)
    assert "--calib" in api.inspect(proto, device="cpu").next_step
    noisy = api.diagnose(MODELS / "noisy_mlp" / "model.onnx", device="cpu", probes=0)
    assert re.search(r"--tolerance auto`: the norm falls by \d\d % at a layer residual of 0.1", noisy.next_step)


@pytest.mark.parametrize("weight", [np.zeros((32, 3), np.float32), np.full((32, 3), np.nan, np.float32)])
def test_what_no_figure_can_be_had_of_gets_none(weight):
    proto = tiny.model("g (float[N,32] x) => (float[N,3] y) { y = MatMul(x, W) }", {"W": weight})
    report = api.shift(proto, {"x": tiny.weight(100, 32)}, heldout="none", device="cpu").report
    assert "layer error" not in report.next_step


def test_a_prediction_ends_in_time(monkeypatch):
    """After the first layer that takes longer than is allowed no other one is begun."""
    monkeypatch.setattr(next_step, "SECONDS", 0.0)
    report = api.shift(MODELS / "digits_transformer" / "model.onnx", device="cpu").report
    assert "(estimated on 1 layer)" in report.next_step
