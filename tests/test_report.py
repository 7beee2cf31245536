"""The report: a schema that stays, JSON that is always valid, and a page that people can read at any width."""

import io
import itertools
import json
import time

import numpy as np
import pytest
from reports import FULL_RANK, LONG, layer, output, report, skipped, unchanged
from rich.console import Console

from onnx_optshift.errors import InputError
from onnx_optshift.report import files, jsonfile, terminal
from onnx_optshift.report.progress import SILENT, Bar, Lines, progress_for

# Version 1. Keys may be added to the report; these may not go.
SCHEMA = {
    "": "schema tool model settings device calibration heldout layers verification heldout_result quantization "
    "flatness collapse timing peak_memory_bytes",
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
    "timing": "capture solve verify total",
}


def at(tree, path):
    for key in path.split():
        tree = tree[int(key) if key.isdigit() else key]
    return tree


def text_of(result, *, width=100, show=terminal.render, **options):
    stream = io.StringIO()
    show(result, Console(file=stream, width=width, highlight=False), **options)
    return stream.getvalue()


@pytest.mark.parametrize("path", SCHEMA)
def test_schema_1_keys_stay(path):
    assert set(SCHEMA[path].split()) <= set(at(report().to_dict(), path))


def test_json_round_trip():
    tree = json.loads(jsonfile.to_json(report()))
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

    text = jsonfile.to_json(report(layers=(layer(measured_residual=value),)))
    assert json.loads(text, parse_constant=refuse)["layers"][0]["measured_residual"] == expected


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
        ("report.txt", r"ends in .json or .html, found the suffix '.txt'"),
        ("report", "found no suffix"),
        ("nowhere/report.json", "does not exist"),
        ("folder.json", "found a directory"),
    ],
)
def test_report_path_is_refused_early(tmp_path, name, message):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=message):
        files.check_path(tmp_path / name)
    files.check_path(tmp_path / "good.JSON")
    files.check_path(tmp_path / "good.HTML")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_page_keeps_its_width(width):
    layers = (layer(name=LONG), layer(name=LONG.replace("query", "value")), *report().layers)
    text = text_of(report(layers=layers), width=width)
    assert max(map(len, text.splitlines())) <= width
    # Elided or not, layers that differ in the middle are told apart when there is room for it.
    assert ("query" in text) == ("value" in text) == (width == 120)


def test_page_says_what_happened():
    text = " ".join(text_of(report()).split())
    for part in (
        "in.onnx -> out.onnx (opset 17",
        "capture on CPUExecutionProvider, solve on cpu",
        "1000 samples, 10 classes, calibration.npz",
        "split off the calibration data",
        "64 x 128 61/64 4 -> 3 2.1e-08 shifted",
        "64 x 128 64/64 4 - unchanged [1]",
        f"[1] {FULL_RANK}",
        "skipped 2 its weight is computed at run time (/a, /b)",
        "verified logits: relative 6e-07 of 3e-06 allowed, largest of a sample 9e-07, absolute 1.5e-06, top-1 "
        "agreement 100.00 %, 1000 samples",
        "one sample at a time 0.001, not part of it",
        "cross-entropy 0.123 -> 0.123, top-1 95.61 % -> 95.61 %, 200 samples: accepted",
        "0.75 at 0, 0.5 at 0.1",
        "7.0 s (capture 1.0, solve 2.0, verify 3.0), peak memory 300 MiB",
        "warning: few samples.",
    ):
        assert part in text
    assert text.endswith("1 of 2 layers shifted.")
    assert "held-out loss rises" not in text
    assert "held-out loss rises" in text_of(report(), verbose=True)


def test_page_of_a_failed_comparison_says_so():
    proof = report().verification
    failed = type(proof)(passed=False, outputs=(output(passed=False, rel=0.5),), noise_floor=proof.noise_floor)
    text = " ".join(text_of(report(verification=failed)).split())
    assert "FAILED logits: relative 0.5 of 3e-06 allowed" in text
    assert "NOT within its bounds" in text
    assert "FAILED" not in text_of(report())


def test_page_of_range_shows_ranges():
    text = " ".join(text_of(report(settings={"objective": "range"})).split())
    assert "range" in text
    assert "0.5 -> 0.4" in text
    assert "4 -> 3" not in text
    assert "0.8 at 0, 0.6 at 0.1" in text


def test_inspection_shows_layers_without_a_proof():
    text = text_of(report(), show=terminal.render_inspect)
    assert "61/64" in text
    assert "skipped 2" in text
    assert "verified" not in text


def test_bare_report_prints():
    bare = report(
        calibration=None, heldout=None, layers=(), verification=None, heldout_result=None, peak_memory_bytes=None
    )
    text = text_of(bare)
    assert "none" in text
    assert "verified" not in text


def test_layers_without_data_print_dashes():
    text = text_of(report(layers=(unchanged(rank=None, norm_before=None, norm_after=None),)))
    assert " - " in text


def test_reasons_are_numbered_once():
    layers = (unchanged("a"), unchanged("b"), unchanged("c", reason="another"))
    text = text_of(report(layers=layers))
    assert text.count("unchanged [1]") == 2
    assert text.count("unchanged [2]") == 1
    assert text.count(FULL_RANK[:20]) == 1


def test_many_skips_are_counted_unless_verbose():
    layers = tuple(skipped(f"/node{k}") for k in range(9))
    assert "/node2 and 6 more" in " ".join(text_of(report(layers=layers)).split())
    assert "/node8" in text_of(report(layers=layers), verbose=True)


def test_names_are_neither_markup_nor_control_codes():
    text = text_of(report(layers=(layer(name="[red]x[/red]"), layer(name="\x1b[31mred\n"), skipped("\x1b[2J"))))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "\\x1b[31mred\\n" in text


def test_middle_elision():
    assert terminal.middle_elided("short", 10) == "short"
    for name, width in itertools.product(("a" * 30 + "END", LONG), range(1, 40)):
        cut = terminal.middle_elided(name, width)
        assert len(cut) <= width
        assert len(name) <= width or width < 5 or (cut[0] == name[0] and cut[-1] == name[-1] and "..." in cut)


def test_silence_is_silent(capsys):
    with SILENT.stage("capture", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_lines_count_and_time(capsys):
    with Lines().stage("capture", 5) as advance:
        advance(2)
        advance(3)
        time.sleep(0.06)
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("capture: 5 of 5, 0.")
    with pytest.raises(KeyError), Lines().stage("capture", 5):
        raise KeyError
    assert not capsys.readouterr().err


def test_bar_draws_and_cleans_up_when_stages_nest_and_fail(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal gets no bar
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = Bar(stream)

    def run():
        with bar.stage("outer", 2) as advance:
            with bar.stage("inner [red]", None) as inner:
                inner(1)
            advance(1)
            raise KeyError

    for _ in range(2):  # the second time shows that the first cleaned up
        with pytest.raises(KeyError):
            run()
    assert "outer" in stream.getvalue()
    assert bar._display is None


def test_progress_suits_the_place():
    pipe, screen = io.StringIO(), io.StringIO()
    screen.isatty = lambda: True
    assert progress_for(file=pipe) is SILENT
    assert isinstance(progress_for(file=pipe, verbose=True), Lines)
    assert isinstance(progress_for(file=screen), Bar)
    assert progress_for(file=screen, quiet=True) is SILENT
