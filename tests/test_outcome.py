"""The summary says what became of the layers: one sentence for each way in which a run can end."""

import io
import re
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import tiny_models as tiny
from rich.console import Console

from onnx_optshift import api
from onnx_optshift.commands import publish, shift
from onnx_optshift.commands.verify import verify
from onnx_optshift.decide.gate import Gate
from onnx_optshift.errors import InputError, OptShiftWarning
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


def lenient(judge):
    def accepted(*arguments):
        trial, after = judge(*arguments)
        return replace(trial, accepted=True, reason="fine"), after

    return accepted


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
    with pytest.warns(OptShiftWarning, match="no calibration data: .* random inputs"):
        summary = api.shift(dead, device="cpu").report.summary
    assert summary.startswith("1 of 1 layers shifted")
    assert "on random inputs only: there was no calibration data" in summary


@pytest.mark.parametrize("heldout", ["none", None], ids=["no gate", "split"])
@pytest.mark.parametrize(("distinct", "rows"), [(1, 1000), (1, 1), (15, 40)])
def test_too_few_different_samples_are_refused(distinct, rows, heldout, tmp_path):
    x = np.resize(data(8)["x"][:distinct], (rows, 8))
    onnx.save(model(), tmp_path / "in.onnx")
    run = partial(shift.run, tmp_path / "in.onnx", tmp_path / "out.onnx", [{"x": x}], [heldout] if heldout else None)
    choices = {"device": "cpu", "tolerance": 0.0 if distinct == 1 else 0.1}
    with pytest.raises(InputError, match=rf"{distinct} distinct samples? found, expected at least 16.*--force"):
        run(Settings(**choices))
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]
    report = run(Settings(force=True, **choices)).report
    assert re.search(rf", on {distinct} distinct samples? only: other inputs may need", report.summary)


def test_enough_different_samples_or_judges_are_not_refused():
    assert "distinct" not in api.shift(model(), data(1, 16), heldout="none", device="cpu").report.summary
    found = api.shift(model(), data(1, 4), heldout=data(1, 40), device="cpu").report
    assert found.summary.startswith("2 of 2 layers shifted")


def test_a_rank_that_grows_with_the_samples_is_said():
    """Twenty rows of 64 inputs against rows of three directions: only the first would have more with more data."""
    wide = tiny.model("g (float[N,64] x) => (float[N,3] y) { y = MatMul(x, W) }", {"W": tiny.weight(64, 3)})
    low = tiny.weight(20, 3) @ tiny.weight(3, 64)
    report = api.shift(wide, {"x": tiny.weight(20, 64)}, heldout="none", device="cpu").report
    assert report.layers[0].growing
    assert "rank 20 of 64 (W), still growing: more calibration data would leave less freedom" in report.summary
    assert api.shift(wide, {"x": low}, heldout="none", device="cpu").report.layers[0].growing is False
    assert "still growing" in api.inspect(wide, {"x": tiny.weight(20, 64)}, device="cpu").summary
    assert "growing" not in api.inspect(wide, {"x": low}, device="cpu").summary


def test_a_part_of_the_samples_shows_that_the_rank_grows(monkeypatch):
    """Many rows of few directions each, so that their number says nothing: 30 samples of 4 rows, 2 directions each."""
    rows = np.concatenate([tiny.weight(4, 2, seed=k) @ tiny.weight(2, 96, seed=100 + k) for k in range(30)])
    text = "g (float[N,4,96] x) => (float[N,4,3] y) { y = MatMul(x, W) }"
    wide = tiny.model(text, {"W": tiny.weight(96, 3)})
    monkeypatch.setattr(Gate, "_judge", lenient(Gate._judge))
    found = api.shift(wide, {"x": rows.reshape(30, 4, 96)}, device="cpu").report
    (layer,) = found.layers
    assert (layer.rows, layer.rank, layer.growing) == (120, 60, True)
    assert "rank 60 of 96 (W), still growing" in found.summary
    same = np.tile(rows[:64].reshape(16, 4, 96), (4, 1, 1))
    assert not api.shift(wide, {"x": same}, device="cpu").report.layers[0].growing


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
