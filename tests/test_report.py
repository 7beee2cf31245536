"""The report: a schema that stays, JSON that is always valid, and text that loses nothing at any width."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from reports import (
    AUTO,
    DIAGNOSIS,
    DRIFT,
    ERRORS,
    FULL_RANK,
    HOSTILE_SHOWN,
    LONG,
    RANGE,
    REPORTS,
    flatness,
    heldout,
    layer,
    output,
    report,
    skipped,
    trial,
    unchanged,
)
from rich.cells import cell_len
from rich.console import Console

from onnx_optshift.errors import InputError
from onnx_optshift.report import files, terminal
from onnx_optshift.report.figures import (
    change,
    mean_change,
    number,
    percent,
    relative_change,
    share_change,
    text,
    with_error,
)
from onnx_optshift.report.model import Headline, Verification
from onnx_optshift.report.section import Facts, Note, Table
from onnx_optshift.report.sections import sections

# Version 1. Keys may be added to the report; these may not go.
ESTIMATE = "value error"
SCHEMA = {
    "": "schema tool model settings device calibration heldout layers verification heldout_result quantization "
    "flatness collapse timing peak_memory_bytes predicted_memory_bytes",
    "tool": "version",
    "model": "input output sha256_in sha256_out opset ir_version",
    "device": "requested capture solve",
    "calibration": "source samples synthetic classes fingerprint",
    "layers 0": "name node op_type weight d m rows rank status reason tolerance norm_before norm_after range_before "
    "range_after predicted_residual measured_residual frontier seconds",
    "layers 0 frontier 0": "tolerance norm_ratio range_ratio",
    "verification": "passed outputs noise_floor",
    "verification outputs 0": "name max_abs max_rel rel top1_agreement",
    "heldout_result": "before after accepted tried",
    "heldout_result before": "loss top1",
    "quantization 0": "layer bits error_before error_after",
    "flatness": "loss samples probes seed noise loss_before loss_after trace gauss_newton layers sharpness top_before",
    "flatness trace change": ESTIMATE,
    "flatness layers 0 relative before": ESTIMATE,
    "flatness sharpness 0": "sigma rise",
    "flatness top_before": "lower upper probes",
    "collapse": "verdict features layers",
    "collapse verdict": "answer why checks",
    "collapse verdict checks 0": "name status figure advice",
    "collapse features": "layer classes samples counts nc1 nc2_norms nc2_angles nc2_weight_norms nc3 nc4",
    "collapse layers 0": "name d rows rank needed effective stable",
    "drift": "figure quantile limit passed baseline_figure layers baseline",
    "drift layers 0": "name samples quantiles worst",
    "drift layers 0 quantiles": "0.5 0.9 1.0",
    "timing": "capture solve verify total judge",
}
WHOLE = report(quantization=ERRORS, flatness=flatness(), collapse=DIAGNOSIS, drift=DRIFT)


def at(tree, path):
    for key in path.split():
        tree = tree[int(key) if key.isdigit() else key]
    return tree


def printed(result, *, width=100, **options):
    stream = io.StringIO()
    terminal.render(result, Console(file=stream, width=width, highlight=False), **options)
    return stream.getvalue()


def words(result, **options):
    return " ".join(printed(result, **options).split())


@pytest.mark.parametrize("path", SCHEMA)
def test_schema_1_keys_stay(path):
    assert set(SCHEMA[path].split()) <= set(at(WHOLE.to_dict(), path))


def test_json_round_trip():
    tree = json.loads(files.to_json(report()))
    assert tree["schema"] == 1
    assert tree["layers"][0]["norm_after"] == 3.0
    assert tree["layers"][2]["norm_after"] is None
    assert tree["settings"]["op_types"] == ["Gemm"]
    assert tree["quantization"] is tree["flatness"] is tree["collapse"] is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (-np.inf, "-Infinity"),
        (np.float32("nan"), "NaN"),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (None, None),
    ],
)
def test_json_holds_any_figure(value, expected):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    written = files.to_json(report(layers=(layer(measured_residual=value),)))
    assert json.loads(written, parse_constant=refuse)["layers"][0]["measured_residual"] == expected


def test_json_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match="ndarray"):
        report(settings={"x": np.ones(2)}).to_dict()


def test_json_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "report.json"
    files.write(report(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        files.write(report(settings={"x": object()}), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_suffix_names_the_form(tmp_path):
    files.write(report(), tmp_path / "report.html")
    files.write(report(), tmp_path / "report.json")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["schema"] == 1


def test_a_dash_is_json_on_standard_output(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.check_path(files.STDOUT)
    files.write(report(), files.STDOUT)
    assert json.loads(capsys.readouterr().out)["summary"] == report().summary
    assert not list(tmp_path.iterdir())


def test_json_file_that_cannot_be_replaced_leaves_nothing(tmp_path):
    path = tmp_path / "report.json"
    path.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        files.write(report(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_json_file_holds_names_that_utf8_refuses(tmp_path):
    path = tmp_path / "report.json"
    files.write(report(layers=(layer(name="half \ud800"),)), path)
    assert json.loads(path.read_text(encoding="utf-8"))["layers"][0]["name"] == "half \ud800"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.txt", r"ends in .json or .html, or - for JSON on standard output, found the suffix '.txt'"),
        ("report", "found no suffix"),
        ("nowhere/report.json", "does not exist"),
        ("folder.json", "found a directory"),
        ("x" * 300 + ".json", "cannot be written"),
    ],
)
def test_report_path_is_refused_early(tmp_path, name, message):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=message):
        files.check_path(tmp_path / name)
    files.check_path(tmp_path / "good.JSON")
    files.check_path(tmp_path / "good.HTML")


def values(result):
    """Every label, text and figure of a report's sections, as text."""
    for section in sections(result):
        for block in section.blocks:
            match block:
                case Note():
                    yield text(block.text)
                case Facts():
                    for row in block.rows:
                        yield from map(text, (row.label, row.value, row.remark))
                case Table():
                    yield from (cell for row in block.rows for cell in map(text, row))


@pytest.mark.parametrize("width", [40, 80, 120, 10_000])
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_lost_and_no_line_is_too_long(name, width):
    result = REPORTS[name]
    lines = printed(result, width=width, verbose=True).splitlines()
    assert max(map(cell_len, lines)) <= width
    shown = "\n".join(lines)
    for value in values(result):
        # Names break behind separators, and within only where a piece is wider than the narrowest column.
        words = value.split() if width > 1000 else [w for w in re.findall(r"[^\s/._:-]+", value) if len(w) < 9]
        missing = [word for word in words if word not in shown]
        assert not missing, (value, width)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_is_broken(width):
    layers = (layer(name=LONG), layer(name=LONG.replace("query", "value"), norm_before=0.90123, norm_after=0.80456))
    lines = printed(report(layers=layers), width=width).splitlines()
    for whole in ("0.901 -> 0.805 (-11 %)", "4.00 -> 3.00 (-25 %)", "2.1e-08", "61/64", "64 x 128"):
        assert any(whole in line for line in lines), whole
    # Both layers are told apart, by their whole names.
    glued = "".join("".join(lines).split())
    assert all(layer.name in glued for layer in layers) or all(
        piece in glued for layer in layers for piece in re.findall(r"[^/._]+", layer.name)
    )


def test_a_pipe_has_one_line_for_a_row(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = terminal.console()
    terminal.render(report(layers=(layer(name=LONG),)), out)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(LONG))
    assert row.endswith("shifted")


def test_what_a_shift_says():
    found = words(report())
    for part in (
        "Shift report: in.onnx -> out.onnx",
        "Asked for: the same outputs on calibration data; objective norm.",
        "Verified: the written file was run on 1000 samples, every output within its bound.",
        "layers shifted 1 of 2, 2 more skipped",
        "output deviation 6.0e-07, allowed by noise: 3.0e-06; same argmax on 100.00 %",
        "held-out loss 0.130 -> 0.120 (-7.7 %), 200 samples",
        "held-out accuracy 95.00 -> 96.00 % (+1.00 points)",
        "fc1.weight 64 x 128 61/64 4.00 -> 3.00 (-25 %) 2.1e-08 shifted",
        "fc2.weight 64 x 128 64/64 4.00 - unchanged [1]",
        f"[1] {FULL_RANK}",
        "2 skipped /a, /b, its weight is computed at run time",
        "noise floor 2.0e-07, worst sample 3.0e-07; one thread; batch size 32",
        "exact 87.50 % 75.00 % 100.00 % 0.1 60.00 % 50.00 % 70.00 %",
        "calibration 1000 samples, 10 classes, calibration.npz",
        "time 7.0 s, capture 1.0, solve 2.0, verify 3.0",
        "peak memory 300 MiB, predicted 320 MiB",
        "warning: few samples.",
    ):
        assert part in found, part
    assert found.endswith("1 of 2 layers shifted.")
    assert "sha256" not in found
    assert "sha256 in aa sha256 out bb" in words(report(), verbose=True)


def test_range_speaks_of_quantization_first_and_says_what_it_costs_in_float():
    found = words(RANGE)
    order = [
        "Asked for: rounded weights as close as each layer allows; objective range; to be quantized to 4, 8 bits.",
        "output error, 4 bits 0.115 -> 0.102 (-11 %), held-out data",
        "layer error, 8 bits 0.00313 -> 0.00234 (-25 %), mean of 2 layers; worse in 0",
        "range 0.500 -> 0.447 (-11 %), mean of 2 layers",
        "held-out loss in float 0.114 -> 0.130 (+14 %)",
        "Accepted by the quantized model, whose output error goes from 0.115 to 0.102 at 4 bits; the float model's "
        "loss goes from 0.114 to 0.130.",
    ]
    places = [found.index(part) for part in order]
    assert places == sorted(places)
    assert "norm" not in found
    assert found.endswith("1 of 2 layers shifted. Next: --tolerance 0.1 may give more.")


def test_a_measured_bound_is_never_called_allowed():
    assert "allowed" not in words(RANGE, verbose=True)
    assert "0.460, measured, no bound was set" in words(RANGE)
    assert "allowed" in words(report())


def test_the_chosen_trial_is_marked_and_refusals_have_reasons():
    found = words(AUTO)
    assert found.count("chosen 0.120") == 1
    assert "all layers at residual 0.1 chosen" in found
    assert "rejected [1]" in found
    assert "[1] held-out loss rises by 0.07" in found


def test_headline_is_the_objective_s_own():
    found = words(report(layers=(layer(headline=Headline("weighted norm", 2.0, 1.0)),)))
    assert "weighted norm 2.00 -> 1.00 (-50 %), mean of 1 layers" in found
    assert "4.00 -> 3.00" not in found


def test_the_frontier_is_the_objective_s_own_path_or_none():
    assert "What a tolerance would buy" in words(report())
    # "range" has none, and a mean over the layers that happen to have one would mislead.
    assert "What a tolerance would buy" not in words(report(layers=(layer(frontier=()), unchanged(frontier=()))))
    assert "What a tolerance would buy" not in words(report(layers=(layer(), unchanged(frontier=()))))


def test_names_break_behind_separators():
    layers = tuple(layer(name=f"attention.{kind}.weight") for kind in "qkvo")
    lines = printed(report(layers=layers), width=70).splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("attention."))
    column = [line[:12].strip() for line in lines[first : first + 8]]
    assert column == [part for kind in "qkvo" for part in ("attention.", f"{kind}.weight")]


def test_one_verdict_for_the_question_that_was_asked():
    proof = Verification(False, (output(passed=False, rel=0.5),), None)
    compared = replace(REPORTS["verify"], verification=proof)
    assert "FAILED: not within bounds on 1000 samples: logits" in words(compared)
    monitored = words(replace(compared, drift=replace(DRIFT, limit=0.05)))
    assert "The drift passed: 0.0430 at 90% of the samples, allowed 0.0500." in monitored
    assert "FAILED" not in monitored
    assert "logits reported only" in monitored
    assert "The drift FAILED" in words(REPORTS["drift"])


def test_a_diagnosis_is_headed_as_one():
    found = words(REPORTS["diagnose"])
    assert found.startswith("Diagnosis: in.onnx")
    assert "shift report" not in found.lower()
    assert "verdict try small, Watch: every class present." in found
    assert "every class present warn 8 of 10 Add samples of 3 and 7." in found
    assert "samples per class" not in found
    assert "samples per class 0: 20, 1: 180" in words(REPORTS["diagnose"], verbose=True)


def test_skips_are_counted_unless_verbose():
    layers = tuple(skipped(f"/node{k}") for k in range(9))
    assert "/node2 and 6 more" in words(report(layers=layers))
    assert "/node8" in words(report(layers=layers), verbose=True)


def test_reasons_are_numbered_once():
    layers = (unchanged("a"), unchanged("b"), unchanged("c", reason="another"))
    found = printed(report(layers=layers))
    assert found.count("unchanged [1]") == 2
    assert found.count("unchanged [2]") == 1
    assert found.count(FULL_RANK[:20]) == 1


def test_names_are_neither_markup_nor_control_codes():
    found = printed(report(layers=(layer(name="[red]x[/red]"), layer(name="\x1b[31mred\n"), skipped("\x1b[2J"))))
    assert "[red]x[/red]" in found
    assert "\x1b" not in found
    assert "\\x1b[31mred\\n" in found
    assert HOSTILE_SHOWN in printed(REPORTS["hostile"], width=1000)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (18.0, "18.0"),
        (0.9996, "1.00"),
        (-0.25, "-0.250"),
        (12345.6, "12346"),
        (123456.0, "1.2e+05"),
        (3.5e-7, "3.5e-07"),
        (-2e-12, "-2.0e-12"),
        (float("nan"), "not a number"),
        (-float("inf"), "-infinite"),
    ],
)
def test_numbers_for_people(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (4.0, 3.0, "-25 %"),
        (4.0, 3.9, "-2.5 %"),
        (4.0, 4.0, "same"),
        (4.0, 3.9999, "-<0.1 %"),
        (2.0, 3.0, "+50 %"),
        (0.0, 1.0, ""),
        (float("nan"), 1.0, ""),
        (1.0, None, ""),
    ],
)
def test_relative_change(before, after, shown):
    assert relative_change(before, after) == shown


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (change(4.0, 3.0), "4.00 -> 3.00 (-25 %)"),
        (change(4.0, 4.0), "4.00"),
        (change(4.0, None), "4.00"),
        (change(None, None), "-"),
        (share_change(0.5, 0.75), "50.00 -> 75.00 % (+25.00 points)"),
        (percent(0.9561), "95.61 %"),
        (percent(None), "-"),
        (with_error(105.5, 3.0), "106 +- 3.00"),
        (with_error(2.0, None), "2.00"),
        (7, "7"),
    ],
)
def test_cells_for_people(cell, shown):
    assert text(cell) == shown


def test_names_are_counted_where_there_are_too_many():
    assert text(("a", "b", "c"), 2) == "a, b and 1 more"
    assert text(("a", "b", "c"), 3) == text(("a", "b", "c")) == "a, b, c"


def test_mean_change_is_geometric_and_leaves_out_what_has_no_logarithm():
    moved, count = mean_change([(1.0, 0.25), (100.0, 100.0), (0.0, 1.0), (float("nan"), 1.0), (None, 1.0)])
    assert moved.sizes == (pytest.approx(10.0), pytest.approx(5.0))
    assert (moved, count) == ("10.0 -> 5.00 (-50 %)", 2)
    assert mean_change([(0.0, 0.0)]) is None


def test_trials_without_a_finite_loss_are_still_listed():
    assert "not a number" in words(report(heldout_result=heldout(trial(loss=float("nan")), trial())))


def test_what_was_never_judged_is_not_called_rejected():
    refused = trial(accepted=False, reason="held-out loss rises")
    for tried, word in (((), "Nothing was judged"), ((refused,), "Rejected: the model keeps its weights")):
        shown = words(report(heldout_result=replace(heldout(*tried), accepted=False)))
        assert word in shown
        assert ("Rejected" in shown) == bool(tried)
