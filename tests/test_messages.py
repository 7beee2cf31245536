"""What goes wrong between a user and the runtime is one message: the file, the place, and what to do next."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models as tiny

from onnx_optshift import api
from onnx_optshift.cli import main
from onnx_optshift.commands import shift
from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.settings import Settings

MODEL = Path(__file__).parent.parent / "models" / "digits_mlp"
# Sizes that are a multiple of 32, or that make 5 x 5 positions, are all that these take.
DETECTOR = """g (float[batch,3,height,width] images) => (float[batch,4,h,w] y) {
    p = AveragePool<kernel_shape = [16, 16], strides = [16, 16]>(images)  y = Conv(p, W) }"""
FLATTENED = """g (float[batch,1,height,width] images) => (float[batch,4] y) { f = Flatten(images)  y = MatMul(f, W) }"""


def detector():
    return tiny.model(DETECTOR, {"W": tiny.weight(4, 3, 2, 2)})


def flattened():
    return tiny.model(FLATTENED, {"W": tiny.weight(25, 4)})


def failing(words, capsys):
    """The one message of a run that ends with status 2."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()[-1].removeprefix("error: ")


def test_usual_sizes_are_tried_for_a_model_that_leaves_them_free():
    report = shift.run(detector(), None, None, None, Settings()).report
    assert report.calibration.synthetic
    assert report.verification.passed


def test_a_model_that_takes_no_usual_size_names_the_option_that_gives_one(tmp_path, capsys):
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(flattened(), path)
    message = failing([path, out], capsys)
    assert message.startswith(
        f"{path}: no calibration data, and the model does not run on random inputs of any of these"
    )
    assert "images [1, 1, 224, 224]" in message
    assert "--input-shape images:1,1,224,224" in message
    assert main([str(path), str(out), "--quiet", "--input-shape", "images:1,1,5,5"]) == 0
    assert out.exists()
    report = shift.run(flattened(), None, None, None, Settings(input_shapes={"images": (8, 1, 5, 5)})).report
    assert report.settings["input_shapes"] == ("images:8,1,5,5",)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (("images:5,5",), "expected 4 sizes, one for each axis"),
        (("image:1,1,5,5",), "the model has no input 'image'. Close matches: 'images'"),
        (("5,5",), "such as images:1,3,320,320"),
        (("images:1,1,5,5", "images:1,1,6,6"), "expected one for each input"),
        (("images:1,1,6,6",), "size 6 along axis 2, found 5"),
    ],
)
def test_shapes_that_cannot_be_meant(shapes, message):
    data = {"images": np.ones((12, 1, 5, 5), np.float32)}
    with pytest.raises(InputError) as caught:
        api.inspect(flattened(), data, input_shapes=shapes)
    assert message in str(caught.value)


@pytest.mark.parametrize(("domain", "shown"), [("com.acme", "com.acme:Odd"), ("", "Odd")])
def test_an_unknown_operator_says_where_it_is_and_what_would_have_it(domain, shown, tmp_path, capsys):
    model = tiny.model("g (float[N,8] x) => (float[N,3] y) { h = Relu(x)  y = MatMul(h, W) }", {"W": tiny.weight(8, 3)})
    node = model.graph.node[0]
    node.op_type, node.domain, node.name = "Odd", domain, "odd_node"
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert failing([path, tmp_path / "out.onnx"], capsys) == (
        f"{path}: this onnxruntime has no operator {shown} of node 'odd_node'. Give the library that has it with "
        "--custom-op-library FILE, or update onnxruntime."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels + 99, "the labels are 99 to 108; expected class indices 0 to 9 for output 'logits'"),
        (lambda labels: labels.astype(float), "Save class indices as integers, not as floats."),
        (lambda labels: labels + 0.5, "fits no output of the model"),
    ],
)
def test_labels_that_do_not_fit_name_their_file(change, message, tmp_path, capsys):
    path = tmp_path / "data.npz"
    with np.load(MODEL / "calibration.npz") as data:
        np.savez(path, pixels=data["pixels"], labels=change(data["labels"]))
    said = failing([MODEL / "model.onnx", tmp_path / "out.onnx", "--calib", path], capsys)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert ("not as floats" in said) == ("not as floats" in message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "nolabel"], "no array 'nolabel' with labels"),
        (["--heldout", "data.npz", "--labels", "nolabel"], "no array 'nolabel' with labels"),
        (["--heldout", "data.npz", "--heldout-fraction", "0.3"], "splits nothing off where --heldout is given"),
        (["--heldout", "none", "--heldout-fraction", "0.2"], "splits nothing off where --heldout is given"),
    ],
)
def test_what_would_be_ignored_is_refused(words, message, tmp_path, monkeypatch, capsys):
    shutil.copy(MODEL / "heldout.npz", tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    assert message in failing([MODEL / "model.onnx", "out.onnx", *words], capsys)


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (os.mkfifo, "{} out.onnx", "a pipe or a device, and a model is read several times. Save it as a file."),
        (os.mkfifo, "model.onnx out.onnx --calib {}", "cannot be read again on each pass. Save the data as a file."),
        (
            lambda path: path.write_bytes(b"\xff\0\0\0\0\0\0\0{}"),
            "model.onnx out.onnx --calib {}.safetensors",
            "it is cut short. Write the file again",
        ),
        (Path.touch, "model.onnx out.onnx --custom-op-library {}.so", "no such file. Give a shared library"),
        (Path.touch, "model.onnx out.onnx --custom-op-library {}", "cannot load it, as it must a shared library"),
        (Path.touch, "inspct model.onnx", "'inspct': no such command, and no such file. Close matches: 'inspect'"),
    ],
)
def test_files_of_other_kinds(make, words, message, tmp_path, monkeypatch, capsys):
    shutil.copy(MODEL / "model.onnx", tmp_path)
    shutil.copy(MODEL / "calibration.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / ("odd.safetensors" if "safetensors" in words else "odd"))
    assert message in failing(words.format("odd").split(), capsys)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("words", [("", "out.onnx"), ("m.onnx", ""), ("m.onnx", "o.onnx", "--calib", "")])
def test_no_name_does_not_mean_the_current_folder(words, capsys):
    assert "found ''" in failing(words, capsys)
    with pytest.raises(InputError, match="no calibration data given"):
        api.inspect(flattened(), "")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "data").mkdir()
    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "iterdir", refuse)
        words = ["inspect", MODEL / "model.onnx", "--calib", tmp_path / "data"]
        assert failing(words, capsys) == f"{tmp_path / 'data'}: permission denied. Choose data that you may read."
        (tmp_path / "data.py").touch()
        loaded = ModelFile.load(MODEL / "model.onnx")
        refusing.setattr(ModelFile, "load", lambda _: loaded)
        refusing.setattr(Path, "read_bytes", refuse)
        script = [*words[:3], tmp_path / "data.py"]
        assert failing(script, capsys).startswith(f"{tmp_path / 'data.py'}: permission denied. Choose files")
        refusing.setattr(Path, "is_dir", refuse)  # as where the folder above may not be searched
        assert "permission denied. Choose files and folders that you may use." in failing(words, capsys)


def test_what_a_script_prints_is_no_part_of_the_report(tmp_path, capsys):
    script = tmp_path / "data.py"
    data = str(MODEL / "calibration.npz")
    script.write_text(f"import numpy as np\ndef load():\n    print('hello')\n    return dict(np.load({data!r}))\n")
    words = ["inspect", str(MODEL / "model.onnx"), "--calib", f"{script}:load", *("--report", "-") * 2]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "inspect"  # once, although it was asked for twice
    assert "hello" in err


def test_labels_of_no_data_are_refused():
    with pytest.raises(InputError, match="there is no data that could hold 'classes'"):
        api.shift(tiny.two_layers(), labels="classes")


def test_a_provider_that_cannot_load_lets_no_noise_through(tmp_path):
    import onnxruntime
    import torch

    if torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs an onnxruntime for GPUs, and no GPU")
    words = [MODEL / "model.onnx", tmp_path / "out.onnx", "--providers", "CUDAExecutionProvider"]
    done = subprocess.run([sys.executable, "-m", "onnx_optshift", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("error: CUDAExecutionProvider was asked for, but ONNX Runtime runs this model on CPU")
    assert done.stderr.count("\n") == 1


def test_a_home_that_cannot_be_written_to_makes_no_noise(tmp_path):
    home = tmp_path / "home"
    home.touch()  # no folder, for whomever
    command = [sys.executable, "-m", "onnx_optshift", "inspect", MODEL / "model.onnx", "--quiet"]
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_memory_limit_counts_interpreter_and_libraries(tmp_path):
    def run(limit):
        words = [MODEL / "model.onnx", "--dry-run", "--max-memory", limit, "--report", tmp_path / "report.json"]
        return subprocess.run(
            [sys.executable, "-m", "onnx_optshift", *words], capture_output=True, text=True, check=False
        )

    refused = run("20M")
    assert refused.returncode == 2
    predicted, process = (int(part.split()[0]) for part in refused.stderr.partition("peak ")[2].split("(process "))
    assert 20 < process <= predicted
    assert run(f"{predicted + 1}M").returncode == 0
    # What was promised is kept: by the resident size of the whole process.
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peak_memory_bytes"] <= report["predicted_memory_bytes"] <= (predicted + 1) * 2**20
