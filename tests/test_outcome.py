"""The summary says what became of the layers: one sentence for each way in which a run can end."""

import io
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tiny_models as tiny
from rich.console import Console

from onnx_optshift import api
from onnx_optshift.commands import publish, shift
from onnx_optshift.commands.verify import verify
from onnx_optshift.decide.gate import Gate
from onnx_optshift.errors import InputError
from onnx_optshift.report.terminal import render
from onnx_optshift.settings import Settings

TEXT = "g (float[N,8] x) => (float[N,3] y) { h = MatMul(x, W1)  r = Relu(h)  y = MatMul(r, W2) }"


def model(**weights):
    return tiny.model(TEXT, {"W1": tiny.weight(8, 6), "W2": tiny.weight(6, 3)} | weights)


def data(rank, rows=40):
    x = tiny.weight(rows, rank, seed=3) @ tiny.weight(rank, 8, seed=4)
    return {"x": x.astype(np.float32), "labels": np.arange(rows) % 3}


def minimal():
    """A model that the pass has left behind."""
    result = api.shift(model(), data(1), heldout="none", device="cpu")
    return onnx.load(result.path)


def broken():
    weight = tiny.weight(8, 6)
    weight[0, 0] = np.nan
    return model(W1=weight, W2=np.full((6, 3), np.inf, np.float32))


INT8 = """g (float[N,8] x) => (float[N,3] y) { q = QuantizeLinear(x, s, z)
    h = MatMulInteger(q, W, z, z)  f = Cast<to = 1>(h)  y = Mul(f, s) }"""


def int8():
    weight = np.arange(24, dtype=np.int8).reshape(8, 3)
    return tiny.model(INT8, {"W": weight, "s": np.float32(0.1), "z": np.int8(0)})


def no_layers():
    return tiny.model("g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }")


def refuse(monkeypatch):
    judge = Gate._judge

    def refused(*arguments):
        trial, after = judge(*arguments)
        return replace(trial, accepted=False, reason="held-out loss rises by 1"), after

    monkeypatch.setattr(Gate, "_judge", refused)


def disprove(monkeypatch):
    """No written file keeps its promise but a copy."""
    prove = publish.Prover.prove

    def failed(*arguments):
        sha256, proof = prove(*arguments)
        return sha256, replace(proof, passed=proof.identical_bytes)

    monkeypatch.setattr(publish.Prover, "prove", failed)


SHIFTED = r"2 of 2 layers shifted; outputs deviate by \S+ \(relative.*; allowed {}\)\."
REVERTED = "Nothing to gain: 2 layers reverted because the outputs left the tolerance."
WORSE = {"objective": "range", "tolerance": 0.1, "quantization_bits": (8,), "snap": False}
# Name: (model, rank of the inputs, settings, what is changed about the run, the sentence)
CASES = {
    "all shifted": (model, 1, {}, None, SHIFTED.format(r"\S+")),
    "all within a tolerance": (model, 8, {"tolerance": 0.05}, None, SHIFTED.format("0.05")),
    "all full rank": (model, 8, {}, None, "Nothing to gain: 2 layers with only one exact solution."),
    "all rejected": (
        model,
        1,
        {"heldout": data(1)},
        refuse,
        r"Nothing to gain: 2 layers rejected on held-out data \(held-out loss rises by 1\).",
    ),
    "all reverted": (model, 1, {}, disprove, REVERTED),
    "all reverted from a tolerance": (model, 8, {"tolerance": 0.05}, disprove, REVERTED),
    "all minimal": (minimal, 1, {}, None, "Nothing to gain: 2 layers that no solution makes noticeably smaller."),
    "all round worse": (model, 8, WORSE, None, "Nothing to gain: 2 layers that would be farther off once quantized."),
    "all excluded": (
        model,
        1,
        {"nodes_to_exclude": "W*"},
        None,
        r"Nothing to do: 2 layers skipped \(left out by --nodes-to-exclude 'W\*'\).",
    ),
    "int8 weights": (int8, 1, {}, None, r"Nothing to do: 1 layer skipped \(already quantized \(int8\)\)."),
    "not finite": (
        broken,
        1,
        {},
        None,
        r"Nothing to do: 1 layer skipped \(the weight itself contains NaN or infinity\); "
        r"1 layer skipped \(the layer's calibration inputs contain NaN or infinity\).",
    ),
    "no layer": (
        no_layers,
        1,
        {},
        None,
        "Nothing to do: the model has no linear layer with a constant weight.",
    ),
}


@pytest.mark.parametrize("written", [True, False], ids=["written", "dry run"])
@pytest.mark.parametrize("name", CASES)
def test_the_sentence_follows_from_what_became_of_the_layers(name, written, monkeypatch, tmp_path):
    make, rank, settings, change, sentence = CASES[name]
    onnx.save(make(), tmp_path / "in.onnx")
    if change is not None:
        change(monkeypatch)
    heldout, choices = [settings.get("heldout", "none")], {k: v for k, v in settings.items() if k != "heldout"}
    choices = Settings(device="cpu", dry_run=not written, **choices)
    report = shift.run(tmp_path / "in.onnx", tmp_path / "out.onnx", [data(rank)], heldout, choices).report
    if not sentence.startswith("2 of"):
        sentence += r" The model was written unchanged\." if written else r" No model was written\."
        assert report.verification.identical_bytes
        assert not written or (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    assert re.fullmatch(sentence, report.summary), report.summary
    assert (tmp_path / "out.onnx").exists() == written


def test_layers_that_were_put_back_stand_beside_those_that_were_not(monkeypatch):
    refusals = [False, True]
    prove = publish.Prover.prove

    def once(*arguments):
        sha256, proof = prove(*arguments)
        return sha256, replace(proof, passed=refusals.pop(0))

    monkeypatch.setattr(publish.Prover, "prove", once)
    report = api.shift(model(), data(1), heldout="none", device="cpu").report
    assert re.fullmatch(
        r"1 of 2 layers shifted; outputs deviate by .*\. 1 layer reverted because the outputs left the tolerance\.",
        report.summary,
    )
    (back,) = [layer for layer in report.layers if layer.status == "rejected"]
    assert report.verification.reverted == (back.name,)


def nan_column():
    """A model whose first answer is NaN on all data, and whose first layer has freedom all the same."""
    weight = tiny.weight(6, 3)
    weight[0, 0] = np.nan
    return model(W2=weight)


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_what_is_not_finite_in_both_models_is_not_said_to_agree(tolerance):
    report = api.shift(nan_column(), data(1), heldout="none", device="cpu", tolerance=tolerance).report
    (output,) = report.verification.outputs
    assert output.nonfinite == output.samples == 40
    assert output.top1_agreement is None
    assert report.summary.startswith("1 of 1 layers shifted; ")
    assert report.summary.endswith(
        " Output 'y' is not finite on 40 samples, and was not compared there. "
        "1 layer whose weight holds NaN or infinity."
    )


def test_a_model_that_gives_nothing_but_nan_is_refused_with_the_cause(tmp_path):
    broken_at_the_end = model(W2=np.full((6, 3), np.nan, np.float32))
    with pytest.raises(InputError, match=r"NaN or infinity is all that output 'y' has.*Nothing was written.*inspect"):
        api.shift(broken_at_the_end, data(1), heldout="none", device="cpu")


def test_directions_of_groups_are_counted_over_all_of_them():
    """Of nine groups one gets data, and that has one direction: not "0/9", nor "9 free"."""
    image = np.zeros((40, 9, 6, 6), np.float32)
    image[:, 0] = tiny.weight(40, 1, 1)
    depthwise = tiny.model(
        "g (float[N,9,6,6] x) => (float[N,9,4,4] y) { y = Conv<group=9>(x, W) }", {"W": tiny.weight(9, 1, 3, 3)}
    )
    report = api.diagnose(depthwise, {"x": image}, probes=0, device="cpu")
    (layer,), (rank,) = report.layers, report.collapse.layers
    assert (layer.rank, layer.free, layer.d, layer.groups) == (1, 80, 9, 9)
    assert (rank.rank, rank.needed, rank.free) == (1, 1, 80)
    text = io.StringIO()
    render(report, Console(file=text, width=200, highlight=False))
    assert " 1/81 " in text.getvalue()
    assert "80 free directions in 1 of 1 layers" in text.getvalue()


def test_made_up_data_is_said_in_the_sentence():
    dead = tiny.model(
        "g (float[N,8] x) => (float[N,3] y) { z = Mul(x, m)  y = MatMul(z, W) }",
        {"W": tiny.weight(8, 3), "m": np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)},
    )
    summary = api.shift(dead, device="cpu").report.summary
    assert summary.startswith("1 of 1 layers shifted")
    assert "on random inputs only: there was no calibration data" in summary


def test_a_model_beside_itself_is_the_same_and_was_not_written(tmp_path):
    onnx.save(model(), tmp_path / "a.onnx")
    report = verify(tmp_path / "a.onnx", tmp_path / "a.onnx", [data(8)], Settings(device="cpu"))
    assert report.summary == "The two files are the same, byte for byte."
    assert {layer.status for layer in report.layers} == {"unchanged"}
    assert {layer.reason for layer in report.layers} == {"its weight is the same"}


def test_two_models_that_differ_in_a_weight(tmp_path):
    onnx.save(model(), tmp_path / "a.onnx")
    onnx.save(model(W1=2 * tiny.weight(8, 6)), tmp_path / "b.onnx")
    report = verify(tmp_path / "a.onnx", tmp_path / "b.onnx", [data(8)], Settings(device="cpu"))
    assert re.fullmatch(
        r"The outputs do not match \(largest relative deviation \S+\); 1 weight differs\.", report.summary
    )
    assert [layer.status for layer in report.layers] == ["shifted", "unchanged"]


def test_inspection_says_how_many_layers_have_freedom():
    assert api.inspect(model(), data(1), device="cpu").summary == "2 layers, 2 with freedom, 0 skipped."
    assert api.inspect(model(), device="cpu").summary.startswith("2 layers, 0 skipped; which of them have freedom")
