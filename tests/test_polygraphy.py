"""`polygraphy run ... --optshift`: the released package finds the plugin, and compares original and shifted model."""

import gc
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny_models

from onnx_optshift.calibration.load import load
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.run.prepare import input_specs
from onnx_optshift.settings import Settings

pytest.importorskip("polygraphy", reason="polygraphy is not installed (extra test, or integrations)")
from polygraphy.exception import PolygraphyException
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER
from polygraphy.tools._main import main

# Of Polygraphy itself, under Python 3.11.
pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups dict interface:DeprecationWarning")
# It never closes the file of --gen-script.
LEFT_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

BODY = """
g (float[b,8] x) => (float[b,3] y) {
    h = Gemm(x, v)
    r = Relu(h)
    y = MatMul(r, w)
}
"""
SCRIPT = """
import numpy as np

def load_data():
    for row in np.load({path!r})["x"]:
        yield {{"x": row[None]}}

def too_wide():
    yield {{"x": np.zeros((1, 9), np.float32)}}
"""


@pytest.fixture(name="case")
def fixture_case(tmp_path):
    """A model, and 40 samples that lie in 5 of its 8 input directions: an exact shift has room."""
    tensors = {"v": tiny_models.weight(8, 16), "w": tiny_models.weight(16, 3)}
    model, data, script = (str(tmp_path / name) for name in ("m.onnx", "c.npz", "loader.py"))
    onnx.save(tiny_models.model(BODY, tensors), model)
    rows = tiny_models.weight(40, 5, seed=1) @ tiny_models.weight(5, 8, seed=2)
    np.savez(data, x=rows)
    (tmp_path / "loader.py").write_text(SCRIPT.format(path=data), encoding="utf-8")
    return SimpleNamespace(model=model, data=data, script=script, rows=rows, folder=tmp_path)


@pytest.fixture(name="run")
def fixture_run(capsys, monkeypatch):
    """Runs `polygraphy run WORDS` in this process; gives its exit status and what it said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["polygraphy", "run", *map(str, words)])
        status = main()
        found = capsys.readouterr()
        return status, found.out + found.err

    yield run
    G_LOGGER.module_severity = G_LOGGER.INFO


def test_the_entry_point_is_installed():
    (point,) = metadata.entry_points(group="polygraphy.run.plugins", name="onnx-optshift")
    (group,) = point.load()()
    assert group.get_name_opt()[1] == "optshift"


def test_an_exact_shift_passes_on_the_calibration_data(case, run):
    saved = case.folder / "shifted.onnx"
    status, said = run(case.model, "--onnxrt", "--optshift", "--optshift-calib", case.data, "--optshift-save", saved)
    assert status == 0, said
    # Feeds of 32 and 8 samples: all samples that the promise covers were compared.
    assert "Passed: 2/2 iterations" in said
    assert "layers shifted" in said
    assert ModelFile.load(saved).initializer("v").tobytes() != ModelFile.load(case.model).initializer("v").tobytes()


def test_data_beside_the_model_is_found(case, run):
    (case.folder / "c.npz").rename(case.folder / "m.calibration.npz")
    status, said = run(case.model, "--onnxrt", "--optshift")
    assert status == 0, said
    assert "Passed: 2/2 iterations" in said


@pytest.mark.parametrize(
    "words",
    [
        # Outputs that are allowed to deviate do, and a tight comparison sees it.
        ["--optshift-tolerance", "0.2", "--optshift-heldout", "none", "--atol", "1e-5"],
        # On noise, that the user asks for, an exact shift may differ: 3 of 8 directions were free.
        ["--iterations", "2"],
        ["--val-range", "[-3,3]"],
    ],
)
def test_a_difference_is_noticed(case, run, words):
    status, said = run(case.model, "--onnxrt", "--optshift", "--optshift-calib", case.data, *words)
    assert status == 1, said
    assert "FAILED | Output: 'y'" in said


@LEFT_OPEN
def test_options_arrive(case, run):
    words = ["--optshift-objective", "range", "--optshift-tolerance", "auto", "--optshift-quantization-bits", "4,3"]
    words += ["--optshift-range-block", "32", "--optshift-heldout", "a.npz", "b.npz", "--gen-script", case.script]
    status, _ = run(case.model, "--onnxrt", "--optshift", "--optshift-calib", case.data, *words)
    assert not status
    said = generated(case.script)
    assert "objective='range'" in said
    assert "tolerance='auto'" in said
    assert "quantization_bits=(4, 3)" in said
    assert "range_block=32" in said
    assert "heldout=['a.npz', 'b.npz']" in said


def generated(path):
    gc.collect()  # Polygraphy leaves it to be closed
    return Path(path).read_text(encoding="utf-8")


@LEFT_OPEN
def test_the_generated_script_runs_alone(case, run):
    script = case.folder / "compare.py"
    words = ["--optshift-tolerance", "0.2", "--optshift-heldout", "none", "--atol", "1e-5", "--gen-script", script]
    run(case.model, "--onnxrt", "--optshift", "--optshift-calib", case.data, *words)
    assert "ShiftedOnnx" in generated(script)
    with pytest.raises(PolygraphyException, match="FAILED"):
        runpy.run_path(str(script))


def test_inner_values_are_compared_where_all_are_outputs(case, run):
    words = ["--optshift", "--optshift-calib", case.data, "--onnx-outputs", "*", "--atol", "1e-4"]
    status, said = run(case.model, "--onnxrt", *words)
    assert status == 0, said
    assert "Outputs: ['h', 'r', 'y']" in said


def samples_of(case, *sources):
    return load([str(source) for source in sources], input_specs(ModelFile.load(case.model), Settings()))


@pytest.mark.parametrize("form", ["script", "inputs", "folder", "json"])
def test_its_data_calibrates(case, run, form):
    """Data that Polygraphy writes or loads is the .npz it was made of, and calibrates where it is compared on."""
    target = case.folder / ("inputs" if form == "folder" else "inputs.json")
    words = ["--data-loader-script", case.script]
    if form in {"inputs", "folder"}:  # written by `polygraphy run`; a folder has a file for each iteration
        status, said = run(
            case.model, "--onnxrt", *words, "--save-inputs", f"{target}/" if form == "folder" else target
        )
        assert status == 0, said
        words = ["--load-inputs", target]
    elif form == "json":
        save_json([{"x": row[None]} for row in case.rows], str(target))
        words = ["--load-inputs", target]
    samples = samples_of(case, case.script if form == "script" else target)
    assert samples.fingerprint == samples_of(case, case.data).fingerprint
    status, said = run(case.model, "--onnxrt", "--optshift", *words)
    assert status == 0, said
    assert "Passed: 40/40 iterations" in said
    assert "layers shifted" in said


def test_a_named_function_of_a_script(case, run):
    status, said = run(case.model, "--optshift", "--data-loader-script", f"{case.script}:too_wide")
    assert status == 1
    assert "too_wide" in said
    assert "[1, 9]" in said or "(1, 9)" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optshift-calib", "{data}", "--optshift-objective", "nrom"], "objective: 'nrom' is not known"),
        (["--optshift-calib", "{folder}/none.npz"], "none.npz"),
        (["--optshift-calib", "{script}:too_wide", "--onnxrt"], "too_wide"),
    ],
)
def test_an_error_is_one_message(case, run, words, message):
    status, said = run(case.model, "--optshift", *(word.format(**vars(case)) for word in words))
    assert status == 1
    assert message in said
    assert "Traceback" not in said


def test_a_file_that_is_no_model_is_one_message(case, run):
    status, said = run(case.script, "--model-type", "onnx", "--optshift")
    assert status == 1
    assert "loader.py" in said
    assert "Traceback" not in said


def test_a_run_without_the_option_loads_nothing_heavy(case):
    code = (
        "import sys; from polygraphy.tools._main import main; "
        # Without --gen-script it would run the model, and look for torch itself.
        f"sys.argv = ['polygraphy', 'run', {case.model!r}, '--onnxrt', '--gen-script', {case.script!r}]; "
        "status = main(); "
        "print('loaded:', status, *sorted({'torch', 'onnx_optshift.api', 'onnx_graphsurgeon'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1].strip() == "loaded: 0"
    assert "Failed to load plugin" not in found.stdout + found.stderr
