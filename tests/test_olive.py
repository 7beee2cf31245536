"""Olive's released package runs our pass: alone, before its own quantization, and where it must end in an error."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from score import Judge, read_arrays

import onnx_optshift

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("olive") is None, reason="Olive is not installed: pip install olive-ai"
    ),
]
MODELS = Path(__file__).parents[1] / "models"
MLP, TRANSFORMER = MODELS / "digits_mlp", MODELS / "digits_transformer"
MODULE = "onnx_optshift.integrations.olive"
PYTHON = f"import sys; from olive.workflows import run; from {MODULE} import package_config; "
PYTHON += "run(sys.argv[1], package_config=package_config())"
# Olive tells its makers about every run unless this is set.
QUIET = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
DATASET = """
import numpy as np
from olive.data.registry import Registry

class Digits:
    def __init__(self, path, first):
        with np.load(path) as data:
            self.rows, self.labels = data["pixels"][:first], data["labels"][:first]
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, k):
        return {"pixels": self.rows[k]}, self.labels[k]

@Registry.register_dataset()
def digits(path, first):
    return Digits(path, first)
"""


def shift_of(model, **options):
    """The pass for a run's configuration."""
    return {"type": "OptimumShift", "calibration": str(model / "calibration.npz"), "device": "cpu", **options}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package configuration, as its command prints it."""
    path = tmp_path_factory.mktemp("package") / "package_config.json"
    done = subprocess.run([sys.executable, "-m", MODULE], env=QUIET, capture_output=True, text=True, check=True)
    path.write_text(done.stdout, encoding="utf-8")
    return path


@pytest.fixture
def olive(tmp_path, package):
    """Runs a workflow in a process of its own; gives the process and the output model's path."""

    def run(passes, model=MLP / "model.onnx", *, by="command", name="out", data=(), package=package):
        config = {
            "input_model": {"type": "OnnxModel", "model_path": str(model)},
            "passes": passes,
            "data_configs": list(data),
            "output_dir": str(tmp_path / name),
            "cache_dir": str(tmp_path / "cache"),
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        start = [sys.executable, "-c", PYTHON, str(path)]
        if by == "command":
            start = [sys.executable, "-m", "olive", "run", "--config", str(path), "--package-config", str(package)]
        done = subprocess.run(start, cwd=tmp_path, env=QUIET, capture_output=True, text=True, check=False, timeout=600)
        return done, tmp_path / name / "model.onnx"  # which is what Olive calls it

    return run


def test_the_command_prints_olives_configuration_with_our_pass(package):
    config = json.loads(package.read_text(encoding="utf-8"))
    installed = Path(importlib.util.find_spec("olive").origin)
    own = json.loads(installed.with_name("olive_config.json").read_text(encoding="utf-8"))
    assert config["passes"].pop("OptimumShift")["module_path"] == f"{MODULE}.OptimumShift"
    assert config == own


@pytest.mark.parametrize("by", ["command", "python"])
def test_the_pass_writes_what_the_package_writes(olive, by):
    done, out = olive({"shift": shift_of(MLP)}, by=by)
    assert done.returncode == 0, done.stderr
    expected = onnx_optshift.shift(MLP / "model.onnx", str(MLP / "calibration.npz"), device="cpu")
    assert expected.report.summary in done.stdout
    assert onnx.load(out) == expected.model
    assert onnx.load(out) != onnx.load(MLP / "model.onnx")


def test_data_configurations_give_calibration_and_heldout_data(olive, tmp_path):
    script = tmp_path / "digits.py"
    script.write_text(DATASET, encoding="utf-8")
    data = [
        {
            "name": name,
            "user_script": str(script),
            "load_dataset_config": {"type": "digits", "path": str(MLP / f"{name}.npz"), "first": count},
        }
        for name, count in (("calibration", 200), ("heldout", 100))
    ]
    shift = {"type": "OptimumShift", "device": "cpu", "data_config": "calibration", "heldout_data_config": "heldout"}
    done, out = olive({"shift": {**shift, "tolerance": 0.02}}, data=data)
    assert done.returncode == 0, done.stderr
    feeds = [
        [{"pixels": row[None]} for row in read_arrays(MLP / f"{name}.npz")["pixels"][:count]]
        for name, count in (("calibration", 200), ("heldout", 100))
    ]
    expected = onnx_optshift.shift(MLP / "model.onnx", feeds[0], heldout=feeds[1], tolerance=0.02, device="cpu")
    assert onnx.load(out) == expected.model


def test_weights_in_a_data_file_stay_in_one(olive, tmp_path):
    model, inline = tmp_path / "large.onnx", MLP / "model.onnx"
    onnx.save(onnx.load(inline), model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    done, out = olive({"shift": shift_of(MLP)}, model)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size < inline.stat().st_size / 5
    assert out.is_file()
    expected = onnx_optshift.shift(model, str(MLP / "calibration.npz"), device="cpu").model
    assert onnx.load(out) == expected


def test_olives_quantization_comes_out_closer_after_our_pass(olive):
    int4 = {"type": "OnnxBlockWiseRtnQuantization", "block_size": 32}
    grid = {"objective": "range", "tolerance": "auto", "quantization_bits": 4}
    files = {}
    for name, shift in (
        ("without", None),
        ("with", shift_of(TRANSFORMER, **grid, range_block=32)),
        ("another grid", shift_of(TRANSFORMER, **grid)),
    ):
        passes = ({"shift": shift} if shift else {}) | {"int4": int4}
        done, files[name] = olive(passes, TRANSFORMER / "model.onnx", name=name)
        assert done.returncode == 0, done.stderr
        assert "MatMulNBits" in {node.op_type for node in onnx.load(files[name]).graph.node}
    judge = Judge(TRANSFORMER / "model.onnx", read_arrays(TRANSFORMER / "heldout.npz"))
    scores = {name: judge.score(path) for name, path in files.items()}
    # Measured: 0.077, 0.033 and 0.108; a grid that is not the quantizer's is worse than none (docs/quantization.md).
    assert scores["with"].error < 0.6 * scores["without"].error < 0.6 * scores["another grid"].error
    assert scores["with"].top1 > scores["without"].top1 - 0.01


NOISE = """
<ir_version: 8, opset_import: ["": 18]>
noisy (float[n, 4] x) => (float[n, 3] y) <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
    made = MatMul(x, w)
    noise = RandomNormalLike(made)
    y = Add(made, noise)
}
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerence": 0.02}, "OptimumShift: there is no option 'tolerence'. Close matches: 'tolerance'"),
        ({"range_block": 32}, "OptimumShift: range_block only has a meaning with the objective 'range'"),
        ({"calibration": None}, "OptimumShift: no data to calibrate on. Give data_config"),
        ({"calibration": "nowhere.npz"}, "OptimumShift: nowhere.npz: "),
    ],
)
def test_what_cannot_be_used_ends_the_run(olive, tmp_path, options, message):
    done, out = olive({"shift": shift_of(MLP, **options)})
    assert done.returncode != 0
    assert message in done.stderr
    assert not out.exists()
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_a_refusal_ends_the_run_and_leaves_no_model(olive, tmp_path):
    onnx.save(onnx.parser.parse_model(NOISE), tmp_path / "noisy.onnx")
    rows = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=np.hstack([rows, rows[:, :1]]))  # one direction of four is free
    shift = {**shift_of(MLP), "calibration": "data.npz", "heldout": "none"}
    done, out = olive({"shift": shift}, tmp_path / "noisy.onnx")
    assert done.returncode != 0
    assert "ToleranceError" in done.stderr
    assert "ValueError: OptimumShift: " in done.stderr
    assert not out.exists()
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_nothing_to_gain_gives_the_model_as_it_was(olive, tmp_path):
    text = NOISE.replace("    noise = RandomNormalLike(made)\n", "").replace("Add(made, noise)", "Identity(made)")
    model = tmp_path / "plain.onnx"
    onnx.save(onnx.parser.parse_model(text), model)
    rows = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=rows)
    done, out = olive({"shift": {**shift_of(MLP), "calibration": "data.npz"}}, model)
    assert done.returncode == 0, done.stderr
    assert "Nothing to gain" in done.stdout
    assert out.read_bytes() == model.read_bytes()


def test_results_are_kept_for_one_version_alone(olive):
    kept = "Loaded model from cache"
    assert kept not in olive({"shift": shift_of(MLP)}, name="first")[0].stdout
    assert kept in olive({"shift": shift_of(MLP)}, name="again")[0].stdout
    assert kept in olive({"shift": shift_of(MLP, tool_version=onnx_optshift.__version__)}, name="said")[0].stdout
    assert kept not in olive({"shift": shift_of(MLP, tool_version="0.0.1")}, name="other")[0].stdout


def test_olive_knows_the_pass_by_its_package_configuration_alone(olive, package, tmp_path):
    """The negative control of all of the above."""
    config = json.loads(package.read_text(encoding="utf-8"))
    del config["passes"]["OptimumShift"]
    own = tmp_path / "own.json"
    own.write_text(json.dumps(config), encoding="utf-8")
    done, out = olive({"shift": shift_of(MLP)}, package=own)
    assert done.returncode != 0
    assert "type 'optimumshift' not found" in done.stderr
    assert not out.exists()
