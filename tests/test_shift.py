"""The whole pass on real small models, against a slow reference and against theory."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import onnx_optshift
from onnx_optshift.commands import shift
from onnx_optshift.commands.inspect import inspect
from onnx_optshift.errors import DeviceError, InputError
from onnx_optshift.run.budget import Budget
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings

MODELS = Path(__file__).parent.parent / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/model.onnx"))


def run(model, calibration, out=None, heldout="none", **settings):
    sources = None if calibration is None else [calibration]
    return shift.run(model, out, sources, None if heldout is None else [heldout], Settings(**settings))


def arrays(path):
    proto = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def feeds(name, count=None):
    with np.load(MODELS / name / "calibration.npz") as data:
        return {key: data[key][:count] for key in data.files if key != "labels"}


def stacked_rows(model, value, inputs):
    """Every row that meets a layer, by an independent session on all samples at once, float64."""
    proto = onnx.load(model)
    if value not in inputs:
        proto.graph.output.append(onnx.ValueInfoProto(name=value))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        activation = session.run([value], inputs)[0]
    else:
        activation = inputs[value]
    return activation.reshape(-1, activation.shape[-1]).astype(np.float64)


def matrix_layers(model):
    """(weight, tapped value, transposed) of each Gemm and MatMul with a constant right operand."""
    proto = onnx.load(model)
    constants = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in {"Gemm", "MatMul"} and node.input[1] in constants:
            attributes = {a.name: a.i for a in node.attribute}
            yield node.input[1], node.input[0], bool(attributes.get("transB"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [24, None], ids=["few rows", "all rows"])
def test_solution_is_that_of_a_slow_reference(name, samples, tmp_path):
    model, inputs = MODELS / name / "model.onnx", feeds(name, samples)
    result = run(model, inputs, tmp_path / "out.onnx")
    before, after = arrays(model), arrays(tmp_path / "out.onnx")
    status = {layer.name: layer.status for layer in result.report.layers}
    moved = 0
    for weight, value, transposed in matrix_layers(model):
        rows = stacked_rows(model, value, inputs)
        v, w = (a[weight].T if transposed else a[weight] for a in (before, after))
        # numpy's own cut-off, relative to float32 activations: below it lies the runtime's noise, not signal.
        projector = np.linalg.pinv(rows, rcond=1e-6) @ rows
        expected = projector @ v.astype(np.float64)
        gain = 1 - np.linalg.norm(expected) ** 2 / np.linalg.norm(v) ** 2
        if status[weight] == "shifted":
            moved += 1
            assert np.linalg.norm(w - expected) <= 1e-6 * np.linalg.norm(expected)
            # KKT: feasible, and no component outside the row space is left.
            assert np.linalg.norm(rows @ (w - v)) <= 1e-6 * np.linalg.norm(rows @ v)
            assert np.linalg.norm(w - projector @ w) <= 1e-6 * np.linalg.norm(w)
            # Negative control: the original has such a component.
            assert np.linalg.norm(v - projector @ v) > 1e-4 * np.linalg.norm(v)
        else:
            np.testing.assert_array_equal(v, w)
            assert gain < 1e-5
    assert moved or samples is None
    assert result.report.verification.passed


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_finds_nothing_more(name, tmp_path):
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    inputs = feeds(name)
    one = run(MODELS / name / "model.onnx", inputs, first)
    assert any(layer.status == "shifted" for layer in one.report.layers)  # negative control
    two = run(first, inputs, second)
    assert not any(layer.status == "shifted" for layer in two.report.layers)
    assert second.read_bytes() == first.read_bytes()
    assert "unchanged" in two.report.summary


def test_batch_size_and_order_do_not_matter_but_data_does(tmp_path):
    name, model = "noisy_mlp", MODELS / "noisy_mlp" / "model.onnx"
    inputs = feeds(name, 50)
    order = np.random.default_rng(0).permutation(50)
    shuffled = {key: value[order] for key, value in inputs.items()}
    other = {key: value[::-1][:20].copy() for key, value in inputs.items()}
    found = []
    for number, (data, batch_size) in enumerate([(inputs, 7), (inputs, 50), (shuffled, 16), (other, 16)]):
        run(model, data, tmp_path / f"{number}.onnx", batch_size=batch_size)
        found.append(arrays(tmp_path / f"{number}.onnx")["fc2.weight"])
    scale = np.linalg.norm(found[0])
    assert np.linalg.norm(found[1] - found[0]) < 1e-6 * scale
    assert np.linalg.norm(found[2] - found[0]) < 1e-6 * scale
    assert np.linalg.norm(found[3] - found[0]) > 1e-2 * scale


def test_same_seed_same_bytes(tmp_path):
    model, data = MODELS / "noisy_mlp" / "model.onnx", MODELS / "noisy_mlp" / "calibration.npz"
    outs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    reports = [run(model, data, out, heldout=None, tolerance="auto", seed=3).report for out in outs]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert reports[0].settings["seed"] == 3
    assert reports[0].model.sha256_out == reports[1].model.sha256_out != reports[0].model.sha256_in


@pytest.mark.parametrize("tolerance", [0.003, 0.03])
def test_a_tolerance_is_used_and_never_exceeded(tolerance, tmp_path):
    model, out = MODELS / "digits_transformer" / "model.onnx", tmp_path / "out.onnx"
    report = run(model, feeds("digits_transformer", 300), out, tolerance=tolerance).report
    (output,) = report.verification.outputs
    assert 0.3 * tolerance <= output.rel <= tolerance
    # Measured again, by an independent session on the written file.
    inputs = feeds("digits_transformer", 300)
    a, b = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for path in (model, out)
    )
    assert np.linalg.norm(b - a) / np.linalg.norm(a) == pytest.approx(output.rel, rel=1e-3)
    exact = run(model, feeds("digits_transformer", 300), tmp_path / "exact.onnx").report

    def norms(found):
        return sum(layer.norm_after**2 for layer in found.layers if layer.norm_after)

    assert norms(report) < norms(exact)


def test_in_may_equal_out(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes((MODELS / "digits_mlp" / "model.onnx").read_bytes())
    before = model.read_bytes()
    report = run(model, feeds("digits_mlp"), model).report
    assert report.model.sha256_in != report.model.sha256_out
    assert model.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_dry_run_writes_nothing_and_a_result_can_be_saved(tmp_path):
    model = MODELS / "digits_mlp" / "model.onnx"
    report = run(model, feeds("digits_mlp"), tmp_path / "out.onnx", dry_run=True).report
    assert report.verification.passed
    assert report.model.output is None
    assert list(tmp_path.iterdir()) == []
    result = onnx_optshift.shift(model, feeds("digits_mlp"), heldout="none")
    result.save(tmp_path / "saved.onnx")
    run(model, feeds("digits_mlp"), tmp_path / "out.onnx")
    assert (tmp_path / "saved.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_a_model_proto_will_do_and_is_not_changed(tmp_path):
    proto = onnx.load(MODELS / "digits_mlp" / "model.onnx")
    before = proto.SerializeToString()
    result = onnx_optshift.shift(proto, feeds("digits_mlp"), heldout="none")
    result.save(tmp_path / "out.onnx")
    assert proto.SerializeToString() == before
    assert (tmp_path / "out.onnx").read_bytes() != before


def test_without_data_only_dead_directions_go_and_a_warning_says_so(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes((MODELS / "digits_mlp" / "model.onnx").read_bytes())
    report = run(model, None, tmp_path / "out.onnx", heldout=None).report
    assert report.calibration.synthetic
    assert report.calibration.samples >= 2 * 128
    assert any("no calibration data" in warning for warning in report.warnings)


def test_the_gate_leaves_a_model_alone_that_few_samples_would_harm(tmp_path):
    # 64 samples of ten classes, twice as many input features: the exact shift forgets what the others need.
    model, out = MODELS / "noisy_mlp" / "model.onnx", tmp_path / "out.onnx"
    with np.load(MODELS / "noisy_mlp" / "heldout.npz") as data:
        held = {key: data[key][:400] for key in data.files}
    few = {key: value[:12] for key, value in held.items()}
    judge = tmp_path / "judge.npz"
    np.savez(judge, **{key: value[12:] for key, value in held.items()})
    report = run(model, few, out, heldout=str(judge)).report
    assert not report.heldout_result.accepted or report.heldout_result.after.loss <= report.heldout_result.before.loss
    rejected = [layer for layer in report.layers if layer.status == "rejected"]
    assert rejected
    assert all("gate" in layer.reason for layer in rejected)
    # Negative control: without the judge all of them are shifted, and the held-out loss is far worse.
    blind = run(model, few, tmp_path / "blind.onnx", force=True).report
    assert all(layer.status == "shifted" for layer in blind.layers)


def test_inspect_writes_nothing_and_names_the_freedom(tmp_path):
    report = inspect(MODELS / "digits_mlp" / "model.onnx", None, Settings())
    assert [layer.rank for layer in report.layers] == [60, 114, 50]
    assert "3 with freedom" in report.summary
    assert json.dumps(report.to_dict())


def test_patterns_select_layers(tmp_path):
    model = MODELS / "digits_mlp" / "model.onnx"
    report = run(model, feeds("digits_mlp"), tmp_path / "out.onnx", nodes_to_include=("fc2*",)).report
    assert {layer.name: layer.status for layer in report.layers} == {
        "fc1.weight": "skipped",
        "fc2.weight": "shifted",
        "logits.weight": "skipped",
    }
    with pytest.raises(InputError, match="fc2"):
        run(model, feeds("digits_mlp"), tmp_path / "no.onnx", nodes_to_include=("fc_2",))
    assert not (tmp_path / "no.onnx").exists()


def test_a_memory_limit_that_cannot_be_kept_is_refused_with_the_sum(tmp_path):
    with pytest.raises(InputError, match="predicted peak"):
        run(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp"), tmp_path / "out.onnx", max_memory=1000)


def test_cuda_that_cannot_be_had_is_an_error():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match="is not available"):
        run(MODELS / "digits_mlp" / "model.onnx", feeds("digits_mlp"), device="cuda")


@pytest.mark.gpu
def test_cuda_gives_the_same_solution(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA device and CUDA builds of torch and onnxruntime")
    model, inputs = MODELS / "digits_transformer" / "model.onnx", feeds("digits_transformer", 24)
    for device in ("cpu", "cuda"):
        report = run(model, inputs, tmp_path / f"{device}.onnx", device=device).report
        assert report.verification.passed
    cpu, cuda = arrays(tmp_path / "cpu.onnx"), arrays(tmp_path / "cuda.onnx")
    for name, weight in cpu.items():
        assert np.linalg.norm(cuda[name] - weight) <= 1e-4 * np.linalg.norm(weight)


def test_a_tight_memory_limit_costs_passes_and_changes_nothing(tmp_path, monkeypatch):
    # What the process holds by itself changes from test to test; the plan is made from what comes on top.
    alone = classmethod(lambda cls, limit, *_: cls(limit or 2**40, used=0, device=None, asked=limit is not None))
    monkeypatch.setattr(Budget, "of", alone)
    name = "digits_transformer"
    model, inputs = MODELS / name / "model.onnx", feeds(name, 100)
    free = run(model, inputs, tmp_path / "free.onnx", batch_size=10).report
    whole = prepare(model, Settings(device="cpu", batch_size=10), [inputs])
    assert len(whole.bench.waves) == 1
    # One byte less than all layers at once would take: then at least two waves.
    limit = whole.predicted_memory - 1
    tight = prepare(model, Settings(device="cpu", batch_size=10, max_memory=limit), [inputs])
    assert len(tight.bench.waves) > 1
    assert tight.predicted_memory <= limit
    run(model, inputs, tmp_path / "tight.onnx", batch_size=10, max_memory=limit)
    assert (tmp_path / "tight.onnx").read_bytes() == (tmp_path / "free.onnx").read_bytes()
    assert any(layer.status == "shifted" for layer in free.layers)
