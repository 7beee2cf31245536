"""What may be relied on: the public names, and that nothing else leaks."""

import dataclasses
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import onnx
import pytest

import onnx_optshift
from onnx_optshift import settings

ROOT = Path(__file__).parents[1]
NAMES = {
    "DeviceError",
    "InputError",
    "OptShiftError",
    "OptShiftWarning",
    "Report",
    "Settings",
    "ToleranceError",
    "__version__",
    "diagnose",
    "inspect",
    "shift",
    "verify",
}


def test_public_names():
    assert set(onnx_optshift.__all__) == NAMES
    assert set(dir(onnx_optshift)) == NAMES


def test_every_public_name_resolves_and_is_documented():
    for name in NAMES - {"__version__"}:
        thing = getattr(onnx_optshift, name)
        assert thing.__name__ == name
        assert inspect.getdoc(thing)
    assert isinstance(onnx_optshift.__version__, str)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'shfit'"):
        _ = onnx_optshift.shfit


def test_nothing_but_submodules_leaks():
    allowed = {"annotations", "import_module", "TYPE_CHECKING", "Any"}
    leaked = {
        name
        for name, value in vars(onnx_optshift).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert leaked <= allowed


def test_shift_takes_data_by_position_and_settings_by_name():
    parameters = inspect.signature(onnx_optshift.shift).parameters
    assert list(parameters)[:2] == ["model", "calibration"]
    assert parameters["calibration"].default is None
    assert parameters["heldout"].kind is inspect.Parameter.KEYWORD_ONLY
    assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_errors_share_a_base_and_carry_the_exit_status():
    for error, code in (
        (onnx_optshift.InputError, 2),
        (onnx_optshift.DeviceError, 2),
        (onnx_optshift.ToleranceError, 3),
    ):
        assert issubclass(error, onnx_optshift.OptShiftError)
        assert error.exit_code == code


@pytest.mark.parametrize("what", ["import onnx_optshift", "from onnx_optshift import Settings, Report, InputError"])
def test_import_loads_nothing_heavy(what):
    code = f"{what}\nimport sys\nprint(*sorted({{'torch', 'onnxruntime', 'onnx', 'numpy'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not found.stdout.strip()


def test_import_test_would_notice():
    code = "import onnx_optshift.geometry, sys; print('numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_a_result_is_a_model_that_is_saved_and_verified(tmp_path):
    original, out = ROOT / "models" / "digits_mlp" / "model.onnx", tmp_path / "out.onnx"
    result = onnx_optshift.shift(original, heldout="none", nodes_to_include="fc1.weight")
    result.save(out)
    assert onnx.load(out) == result.model != onnx.load(original)
    report = onnx_optshift.verify(original, out, original.with_name("calibration.npz"))
    assert report.verification.passed
    assert [layer.status for layer in report.layers if layer.status == "shifted"] == ["shifted"]
    # Negative control: another model's outputs do not match.
    other = onnx.load(out)
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "fc1.weight")
    weight.raw_data = (2 * onnx.numpy_helper.to_array(weight)).tobytes()
    onnx.save(other, out)
    assert not onnx_optshift.verify(original, out).verification.passed


def test_a_report_is_saved_by_its_suffix_and_short_to_look_at(tmp_path):
    model = ROOT / "models" / "digits_mlp" / "model.onnx"
    report = onnx_optshift.inspect(model, model.with_name("calibration.npz"), max_samples=50)
    assert json.loads(report.save(tmp_path / "r.json").read_text(encoding="utf-8")) == report.to_dict()
    assert report.save(tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(repr(report)) < 300
    with pytest.raises(onnx_optshift.InputError, match="expected a file name that ends in"):
        report.save(tmp_path / "r.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_the_keywords_are_the_fields_of_settings():
    choices = settings.Choices.__annotations__
    assert list(choices) == [field.name for field in dataclasses.fields(onnx_optshift.Settings)]


@pytest.mark.parametrize("call", ["shift", "inspect", "diagnose", "verify"])
def test_a_misspelt_keyword_is_an_input_error_with_a_suggestion(call):
    model = ROOT / "models" / "digits_mlp" / "model.onnx"
    files = (model, model) if call == "verify" else (model,)
    with pytest.raises(
        onnx_optshift.InputError, match=r"tolerence: there is no such setting. Close matches: .tolerance"
    ):
        getattr(onnx_optshift, call)(*files, tolerence=0.1)


def test_diagnose_answers_for_a_model_in_memory():
    folder = ROOT / "models" / "noisy_mlp"
    report = onnx_optshift.diagnose(
        onnx.load(folder / "model.onnx"), folder / "calibration.npz", probes=0, max_samples=200
    )
    assert report.command == "diagnose"
    assert report.collapse.verdict.answer in {"go", "try small", "no-go"}
    assert report.flatness is None
