"""Drift: the share of each sample's output that a shift changes, and the exit status for monitoring jobs."""

import re
from pathlib import Path

import numpy as np
import pytest

from onnx_optshift.cli import main
from onnx_optshift.commands.shift import run
from onnx_optshift.commands.verify import verify
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.settings import Settings

MODEL = Path(__file__).parent.parent / "models" / "noisy_mlp"
ORIGINAL = MODEL / "model.onnx"


def pixels(name, rows):
    with np.load(MODEL / name) as data:
        return {"pixels": data["pixels"][rows]}


@pytest.fixture(name="shifted", scope="module")
def fixture_shifted(tmp_path_factory):
    out = tmp_path_factory.mktemp("drift") / "shifted.onnx"
    run(ORIGINAL, out, [pixels("calibration.npz", slice(0, 100))], ["none"], Settings(device="cpu"))
    return out


def drift(shifted, data, **settings):
    return verify(ORIGINAL, shifted, [data], Settings(device="cpu", **settings)).drift


def test_shares_are_those_of_plain_numpy(shifted):
    data = pixels("heldout.npz", slice(0, 40))
    found = {layer.name: layer for layer in drift(shifted, data).layers}["fc1.weight"]
    v, w = (ModelFile.load(path).initializer("fc1.weight").astype(np.float64) for path in (ORIGINAL, shifted))
    v, w = (matrix if matrix.shape[0] == 64 else matrix.T for matrix in (v, w))
    rows = data["pixels"].astype(np.float64)
    shares = np.linalg.norm(rows @ (w - v), axis=1) / np.linalg.norm(rows @ v, axis=1)
    assert found.quantiles["1.0"] == pytest.approx(shares.max(), rel=1e-6)
    assert found.worst[0][0] == shares.argmax()
    assert found.quantiles["0.5"] == pytest.approx(np.quantile(shares, 0.5, method="higher"), rel=1e-6)


def test_calibration_data_does_not_drift_and_strange_data_drifts_most(shifted):
    own = drift(shifted, pixels("calibration.npz", slice(0, 100))).figure
    like = drift(shifted, pixels("heldout.npz", slice(0, 100))).figure
    rng = np.random.default_rng(0)
    strange = drift(shifted, {"pixels": rng.random((100, 64)).astype(np.float32)}).figure
    assert own < 1e-5
    assert 0.01 < like < strange


def test_the_exit_status_tells_a_monitoring_job(shifted, tmp_path, capsys):
    like, strange = tmp_path / "like.npz", tmp_path / "strange.npz"
    np.savez(like, **pixels("heldout.npz", slice(0, 100)))
    np.savez(strange, pixels=np.random.default_rng(0).random((100, 64)).astype(np.float32))
    words = ["verify", str(ORIGINAL), str(shifted), "--baseline", str(MODEL / "calibration.npz"), "--max-drift", "0.2"]
    assert main([*words, "--calib", str(like)]) == 0
    out, err = capsys.readouterr()
    assert "baseline" in out
    assert re.match(r"The drift passed: 0\.1\d+, allowed 0\.2\. The outputs deviate by .*only\)", out.splitlines()[-1])
    assert not re.search("fail|not match|not within|error", out + err, re.IGNORECASE)
    assert main([*words, "--calib", str(strange)]) == 3
    out, err = capsys.readouterr()
    assert "unlike its calibration data" in err
    assert out.splitlines()[-1].startswith("The drift FAILED: ")
    assert "passed" not in out
    # Without a limit the outputs themselves are judged, and these do differ.
    assert main([*words[:-2], "--calib", str(like)]) == 3
    assert "The outputs do not match" in capsys.readouterr().out
    assert main([*words, "--calib", str(like), "--tolerance", "0.9"]) == 2
    assert "are two questions" in capsys.readouterr().err


def test_a_quantized_copy_is_compared_by_its_outputs(tmp_path):
    """Weights of other names or types are not compared, and that is said."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="its quantizers need onnx-ir")
    target = tmp_path / "int8.onnx"
    quantization.quantize_dynamic(ORIGINAL, target, weight_type=quantization.QuantType.QInt8, per_channel=True)
    data = pixels("heldout.npz", slice(0, 60))
    report = verify(ORIGINAL, target, [data], Settings(device="cpu", tolerance=0.2))
    assert report.verification.passed
    assert 1e-4 < max(output.rel for output in report.verification.outputs) < 0.2
    assert any("3 of 3 weights have no match" in warning for warning in report.warnings)
    assert all(layer.status != "shifted" for layer in report.layers)
    # Negative control: within the noise of the original it is not.
    assert not verify(ORIGINAL, target, [data], Settings(device="cpu")).verification.passed
