"""The benchmarks measure what they say: on models so small that the figures themselves mean nothing."""

import itertools
import subprocess
import sys
from pathlib import Path

import bench
import bench_extrapolation
import bench_floor
import bench_gpu
import bench_models
import bench_profile
import numpy as np
import performance_page
import plots
import pytest
import torch
from bench_memory import Run

from onnx_optshift.geometry import MatrixRows, PatchRows, Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import observe

TOOLS = Path(__file__).parents[1] / "tools"
SMALL = {
    "encoder": {"width": 16, "layers": 1, "tokens": 8, "vocabulary": 50},
    "cnn": {"widths": (4, 8, 8, 8), "side": 16},
    "mlp": {"features": 16, "width": 24},
}


@pytest.fixture(params=SMALL)
def made(request, tmp_path):
    bench_models.MODELS[request.param](tmp_path, 40, **SMALL[request.param])
    return request.param, tmp_path / "model.onnx", tmp_path / "calibration.npz"


@pytest.mark.slow
def test_the_floor_covers_every_distinct_input_once(made):
    name, model, calibration = made
    found = bench_floor.floor(model, calibration, None)
    weights, _ = discover(ModelFile.load(model), Selection())
    assert sum(found["ways"].values()) == len({use.tap for weight in weights for use in weight.uses})
    assert found["samples"] == 40
    assert all(found[part] > 0 for part in ("pass", "gram", "factor"))
    if name == "encoder":
        assert len(weights) > sum(found["ways"].values())  # q, k and v read one input


@pytest.mark.slow
@pytest.mark.parametrize("form", ["matrix", "patches"])
def test_every_way_to_a_gram_matrix_gives_that_of_the_package(form):
    generator = torch.Generator().manual_seed(0)
    if form == "matrix":
        tap, activation = Tap("x", MatrixRows(), 1, 12), torch.randn(5, 30, 12, generator=generator)
    else:
        rows = PatchRows(kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1, 1, 1, 1), group=1)
        tap, activation = Tap("x", rows, 1, 18), torch.randn(4, 2, 24, 24, generator=generator)
    expected = InputMoments(1, tap.width)
    observe(expected, tap, activation)
    ways = bench_floor.ways(tap, activation)
    assert ("lags" in " ".join(ways)) == (form == "patches")
    for name, way in ways.items():
        each = bench_floor.Input(tap, 10**6)
        each._way, each.name = way, name
        each.add(activation)
        torch.testing.assert_close(way.gram(), expected.gram(), rtol=1e-10, atol=1e-10, msg=name)
        assert each.seconds[0] > 0


def test_rows_that_are_few_are_factored_themselves():
    tap = Tap("x", MatrixRows(), 1, 12)
    each = bench_floor.Input(tap, 12)
    each.add(torch.randn(12, 12))
    assert not each.name
    assert each.seconds[0] == 0
    assert each.factor()[0] > 0


@pytest.mark.slow
def test_a_profile_adds_up_and_knows_every_function(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(bench_profile.time, "perf_counter", lambda: float(next(ticks)))
    clocks = bench_profile.Clocks()
    timed = clocks._timed(lambda: None, "inner", is_purpose=False)
    outer = clocks._timed(lambda: [timed(), timed()], "purpose", is_purpose=True)
    clocks.lap(("other", "other"))
    outer()
    clocks.lap(("other", "other"))
    # One tick between two looks at the clock; the purpose's own time is what the inner calls leave.
    assert clocks.seconds == {("other", "other"): 2, ("purpose", "inner"): 2, ("purpose", "other"): 3}
    assert clocks.calls == {("purpose", "other"): 1, ("purpose", "inner"): 2}
    monkeypatch.undo()
    # Installing replaces functions of the package: in a process of its own.
    code = "import bench_profile as b; c = b.Clocks(); c.install(); print(c.missing)"
    run = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def row(name, scale=1.0):
    made = bench.Row(name, 10)
    for k in range(3):
        made.floor.runs.append(Run("", 1, 1, 5.0))
        made.floor.details.append({"pass": 1.0, "gram": 2.0, "factor": 1.0, "ways": {"one way": 1}})
        made.ours.runs.append(Run("", 1, 1, 8.0))
        made.ours.details.append({"capture": 3.0 + k, "solve": 2.0 * scale, "verify": 2.0})
    made.naive.runs.append(Run("timeout", 1, 1, 40.0))
    made.peer.runs += [Run("", 1, 1, 16.0), Run("", 1, 1, 4.0)]
    return made


def test_ratios_are_medians_within_a_round():
    cells = bench.cells(row("encoder"))
    assert cells[1] == "4.00 s (1.00 + 2.00 + 1.00)"
    assert cells[3] == "**1.50x**"  # (4 + 2) / 4
    assert cells[4] == "2.00 s, 2.0 passes"
    assert cells[7] == "over 5.0x (stopped at 40 s)"
    assert cells[8] == "1.25x (10.0 s, 2 runs)"
    assert bench.cells(row("encoder", scale=3))[3] == "**2.50x**"
    broken = row("encoder")
    broken.peer.runs[:] = [Run("exit 1", 1, 1, 4.0, "no such module")]
    assert bench.cells(broken)[8] == "failed: no such module"


def test_a_model_that_is_not_there_is_left_out_with_a_line(tmp_path, capsys):
    assert bench.cases(["magika"], tmp_path, tmp_path, None) == []
    assert "magika: skipped: no model.onnx" in capsys.readouterr().err


def test_slopes_are_those_of_power_laws():
    assert plots.slope([(x, 3 * x**1.5) for x in (1.0, 4.0, 20.0)]) == pytest.approx(1.5)
    picture = plots.loglog("t", ("x", "y"), {"a": [(1.0, 2.0), (100.0, 5.0)]}, {"a": 0.2})
    assert "a (slope 0.20)" in picture
    bars = plots.stacked_bars("t", "n", ["p", "q"], [("one", [0.5, 0.5]), ("two", [1.0, 0.25])])
    assert "one: 1.00; two: 1.25" in bars


def test_a_section_of_the_page_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end of one -->\nb\n<!-- two -->\nstays\n<!-- end of two -->\n")
    monkeypatch.setattr(performance_page, "PAGE", page)
    performance_page.put("one", "new\n")
    assert page.read_text() == (
        "a\n<!-- one -->\nnew\n<!-- end of one -->\nb\n<!-- two -->\nstays\n<!-- end of two -->\n"
    )
    with pytest.raises(SystemExit, match="no section 'three'"):
        performance_page.put("three", "x")


def test_an_extrapolation_counts_what_the_shapes_say():
    shape = bench_extrapolation.Shape()
    assert shape.parameters == pytest.approx(6.6e9, rel=0.01)  # 6.74e9 with the embedding and norms
    costs = {"gram": 1.0, "eigh": 10.0, "solution": 6.0, "passes": 3.0, "rate": 1e9}
    gpu = bench_extrapolation.Gpu()
    text = bench_extrapolation.table(costs, 1000, [1, 64], gpu, shape)
    capture = 2 * shape.parameters * 1000 * shape.tokens
    assert f"{5 * capture:.1e} operations" in text  # 2 passes to prove, 3 waves to capture
    squares = sum(d * d for d in shape.inputs)
    assert f"{squares * 1000 * shape.tokens:.1e} operations" in text
    larger = bench_extrapolation.Gpu(memory=200e9)
    assert f"{3 * capture:.1e} operations" in bench_extrapolation.table(costs, 1000, [1], larger, shape)


def test_without_a_gpu_its_benchmark_says_so_and_ends_with_a_status_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench_gpu.main() == bench_gpu.SKIPPED
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_what_runs_on_a_gpu_runs_on_the_cpu_too():
    rates = bench_gpu.capture(1, "cpu", 32, 16, 1)
    assert set(rates) == {"plain", "handed over", "statistics"}
    assert bench_gpu.agreement("cpu") == 0
    narrowed = bench_gpu.narrowing(0.0001, "cpu", {"up": (32, (16, 8))})
    assert narrowed["blocks"] == 1
    assert narrowed["seconds for all"] == pytest.approx(32 * narrowed["seconds"])


@pytest.mark.gpu
def test_cublas_adds_one_triangle_of_the_product():
    if reason := bench_gpu.missing():
        pytest.skip(reason)
    rows = torch.randn(300, 40, dtype=torch.float64, device="cuda")
    into = torch.zeros(40, 40, dtype=torch.float64, device="cuda")
    bench_gpu.syrk(rows, into)
    expected = (rows.mT @ rows).cpu().numpy()
    found = into.cpu().numpy()
    whole = np.triu(found) + np.triu(found, 1).T if np.triu(found, 1).any() else np.tril(found) + np.tril(found, -1).T
    np.testing.assert_allclose(whole, expected, atol=1e-10)
