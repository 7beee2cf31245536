"""The verdict's rules one by one, the whole diagnosis on a model of models/, and what people see of it."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from rich.console import Console

from onnx_optshift.commands.diagnose import diagnose
from onnx_optshift.diagnosis.verdict import Conditions, verdict
from onnx_optshift.errors import InputError
from onnx_optshift.report.diagnosis import FAIL, GO, NO_GO, NOTE, PASS, TRY_SMALL, WARN, Collapse, LayerRank
from onnx_optshift.report.files import to_json
from onnx_optshift.report.terminal import render
from onnx_optshift.settings import Settings

MODELS = Path(__file__).parents[1] / "models"
RANK = LayerRank("fc", d=64, rows=1000, rank=60, needed=60, free=4, effective=30.0, stable=2.0)
FEATURES = Collapse("fc", 10, 1000, {str(k): 100 for k in range(10)}, 0.05, 0.1, 0.1, 0.1, 0.5, 0.01)
GOOD = Conditions(
    ranks=(RANK,),
    gains=((1.0, 0.5),),
    samples=1000,
    synthetic=False,
    counts={str(k): 100 for k in range(10)},
    classes=10,
    labelled=True,
    collapse=FEATURES,
    judges=500,
    judges_given=True,
)
FULL = replace(RANK, rank=64, needed=64, free=0)


def test_everything_in_order_is_a_go():
    found = verdict(GOOD)
    assert found.answer == GO
    assert [check.status for check in found.checks] == [PASS] * 6
    assert not any(check.advice for check in found.checks)


@pytest.mark.parametrize(
    ("change", "name", "status", "answer"),
    [
        ({"synthetic": True}, "enough samples", WARN, TRY_SMALL),
        ({"ranks": (replace(RANK, rows=100),)}, "enough samples", WARN, TRY_SMALL),
        ({"counts": {str(k): 100 for k in range(8)}}, "every class present", WARN, TRY_SMALL),
        ({"counts": {str(k): 100 for k in range(4)}, "classes": 20}, "every class present", WARN, TRY_SMALL),
        ({"counts": {str(k): 100 for k in range(4)}, "classes": 50}, "every class present", FAIL, NO_GO),
        ({"ranks": (FULL,), "gains": ((1.0, 0.95),)}, "freedom exists", WARN, TRY_SMALL),
        ({"ranks": (FULL,), "gains": ((1.0, 0.5),)}, "freedom exists", PASS, GO),
        ({"ranks": (FULL,), "gains": ((1.0, 0.99),)}, "freedom exists", FAIL, NO_GO),
        ({"gains": ((1.0, 0.99),)}, "freedom exists", FAIL, NO_GO),
        ({"exact": 0.992}, "freedom exists", WARN, TRY_SMALL),
        ({"exact": 0.6}, "freedom exists", PASS, GO),
        ({"judges": 0}, "held-out data", WARN, TRY_SMALL),
        ({"judges": 50}, "held-out data", WARN, TRY_SMALL),
        ({"ranks": (replace(RANK, d=9),)}, "stochastic: B >= classes", NOTE, None),
        ({"collapse": replace(FEATURES, nc1=0.5)}, "stochastic: features collapsed", NOTE, GO),
        ({"collapse": replace(FEATURES, nc1=9.0)}, "stochastic: features collapsed", NOTE, GO),
    ],
)
def test_each_condition_shows(change, name, status, answer):
    found = verdict(replace(GOOD, **change))
    check = next(check for check in found.checks if check.name == name)
    assert check.status == status
    assert (check.advice == "") == (status == PASS)
    assert found.answer != GO or not {WARN, FAIL} & {check.status for check in found.checks}
    assert ("--stochastic" in found.why) == (found.answer == GO and status == NOTE)
    if answer is not None:
        assert found.answer == answer
        assert (name in found.why) == (answer != GO)


def test_a_small_exact_gain_beside_a_large_one_at_a_tolerance_is_no_go_as_it_is():
    model = MODELS / "noisy_mlp" / "model.onnx"
    found = diagnose(model, None, None, Settings(device="cpu"), probes=0).collapse.verdict
    freedom = next(check for check in found.checks if check.name == "freedom exists")
    assert (found.answer, freedom.status) == (TRY_SMALL, WARN)
    assert "give a --tolerance" in freedom.advice
    loose = diagnose(model, None, None, Settings(device="cpu", tolerance=0.05), probes=0).collapse.verdict
    assert loose.answer == GO
    assert loose.why.endswith("Those of --stochastic do not.")


def test_no_classes_and_no_layers():
    found = verdict(replace(GOOD, classes=None, counts={}, collapse=None))
    assert [check.name for check in found.checks] == ["enough samples", "freedom exists", "held-out data"]
    assert verdict(replace(GOOD, ranks=())).answer == NO_GO


def shown(report, verbose=False):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    render(report, console, verbose=verbose)
    return console.file.getvalue()


def test_a_model_from_file_to_screen():
    settings = Settings(device="cpu", tolerance=0.05)
    report = diagnose(MODELS / "digits_mlp" / "model.onnx", None, None, settings, probes=2)
    tree = json.loads(to_json(report))
    assert tree["collapse"]["verdict"]["answer"] in {GO, TRY_SMALL, NO_GO}
    assert tree["collapse"]["features"]["classes"] == 10
    assert tree["collapse"]["features"]["layer"] == "logits.weight"
    assert 0 <= tree["collapse"]["features"]["nc4"] < 0.2
    assert [layer["name"] for layer in tree["collapse"]["layers"]] == ["fc1.weight", "fc2.weight", "logits.weight"]
    assert tree["flatness"]["trace"]["before"]["value"] > 0
    assert tree["flatness"]["loss_after"] > tree["flatness"]["loss_before"]
    assert tree["model"]["sha256_out"] is None
    text = shown(report, verbose=True)
    for expected in ("fc2.weight", "NC1", "total", "eigenvalue" if tree["flatness"]["top_before"] else "Sharpness"):
        assert expected in text
    assert tree["collapse"]["verdict"]["why"][:20] in text


def test_without_probes_and_without_labels(tmp_path):
    proto = tiny_models.two_layers()
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    report = diagnose(path, [tmp_path / "data.npz"], None, Settings(device="cpu"), probes=0)
    assert report.flatness is None
    assert "by the model's own" in " ".join(shown(report).split())
    assert report.collapse.features.classes <= 3


def test_a_model_without_layers_says_so(tmp_path):
    path = tmp_path / "model.onnx"
    proto = tiny_models.model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    path.write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "data.npz", x=np.ones((12, 4), np.float32))
    report = diagnose(path, [tmp_path / "data.npz"], None, Settings(device="cpu"))
    assert report.collapse is None
    assert "there is no layer that could be shifted" in shown(report)


def test_no_data_is_one_message(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_models.two_layers().SerializeToString())
    with pytest.raises(InputError, match="--calib"):
        diagnose(path, None, None, Settings(device="cpu"))


def test_names_from_a_model_are_printed_as_they_are():
    report = diagnose(MODELS / "digits_mlp" / "model.onnx", None, None, Settings(device="cpu"), probes=0)
    layers = tuple(replace(layer, name="[red]\x1b[31mname") for layer in report.collapse.layers)
    text = shown(replace(report, collapse=replace(report.collapse, layers=layers)))
    assert "[red]\\x1b[31mname" in text
    assert "\x1b[31mname" not in text
