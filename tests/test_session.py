"""What was asked for is what runs, or is said, or is an error; and what comes out of a session."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import tiny_models as tiny
import torch

from onnx_optshift.calibration.inputs import InputSpec
from onnx_optshift.calibration.load import load
from onnx_optshift.capture import session as session_module
from onnx_optshift.capture.device import CPU, CUDA, choose_device, fallback_note
from onnx_optshift.capture.session import Session, resolve_device
from onnx_optshift.errors import DeviceError, InputError
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.run.bench import Bench

BOTH = [CUDA, CPU]
X = tiny.weight(4, 3)
W = tiny.weight(3, 2, seed=1)
PROTO = tiny.model("g (float[n, 3] x) => (float[n, 2] y, int64[2] s) { y = MatMul(x, W) s = Shape(y) }", {"W": W})
MODEL = PROTO.SerializeToString()


def cuda_device(**options):
    return choose_device("cuda:1", (), BOTH, 2, **options)


def test_without_a_gpu_auto_says_why_it_runs_on_the_cpu():
    for available, gpus, why in (([CPU], 1, "has no CUDA"), (BOTH, 0, "torch finds no CUDA device")):
        device = choose_device("auto", (), available, gpus)
        assert (device.providers, device.solve, device.strict) == ((CPU,), "cpu", False)
        assert why in device.note
        with pytest.raises(DeviceError, match=f"--device cuda is not available.*{why}.*Use --device cpu"):
            choose_device("cuda", (), available, gpus)
    with pytest.raises(DeviceError, match="no CUDA device 2, torch finds 2"):
        choose_device("cuda:2", (), BOTH, 2)


def test_with_a_gpu_auto_takes_it_and_only_its_name_makes_it_strict():
    for requested, strict in (("auto", False), ("cuda", True)):
        device = choose_device(requested, (), BOTH, 1)
        assert (device.capture, device.solve, device.strict) == (CUDA, "cuda:0", strict)
    assert (cuda_device().index, cuda_device().solve, cuda_device().strict) == (1, "cuda:1", True)
    assert not cuda_device(allow_cpu_fallback=True).strict
    assert choose_device("cpu", (), BOTH, 1).providers == (CPU,)


@pytest.mark.parametrize(
    ("requested", "providers", "expected", "strict"),
    [
        ("auto", ["cuda"], (CUDA, CPU), False),
        ("cuda", ["cuda"], (CUDA, CPU), True),
        ("cuda", ["cuda", "cpu"], (CUDA, CPU), False),  # the CPU was asked for by name too
        ("auto", [CPU], (CPU,), False),
        ("auto", ["TensorrtExecutionProvider", "cuda"], ("TensorrtExecutionProvider", CUDA, CPU), False),
    ],
)
def test_providers_in_the_order_given(requested, providers, expected, strict):
    device = choose_device(requested, providers, ["TensorrtExecutionProvider", *BOTH], 1)
    assert (device.providers, device.strict) == (expected, strict)


def test_providers_that_do_not_exist_or_contradict_the_device():
    with pytest.raises(DeviceError, match=r"'CUDAExecutionProvidr' is not in this.*Close matches: 'CUDAExec"):
        choose_device("auto", ["CUDAExecutionProvidr"], BOTH, 1)
    for requested, providers in (("cpu", ["cuda"]), ("cuda", ["cpu"])):
        with pytest.raises(DeviceError, match="contradict each other"):
            choose_device(requested, providers, BOTH, 1)


def test_tensor_float_32_is_off_wherever_cuda_runs():
    for providers in ((), ["TensorrtExecutionProvider", "cuda"]):
        options = dict(choose_device("auto", providers, ["TensorrtExecutionProvider", *BOTH], 1).options)
        assert options[CUDA] == {"device_id": 0, "use_tf32": 0}
        assert options[CPU] == {}


ON_GPU = (CUDA, ["MatMul", "Conv", "Shape"])
SHAPES = (CPU, ["Gather", "Unsqueeze", "Concat", "Mul"])


def test_nothing_is_said_where_all_nodes_run_as_asked():
    for placements in ([ON_GPU], [ON_GPU, SHAPES], []):
        assert fallback_note(cuda_device(), placements) == ""
    assert fallback_note(choose_device("cpu", (), BOTH, 1), [(CPU, ["NonMaxSuppression"])]) == ""


def test_nodes_on_the_cpu_are_said_in_one_line_and_are_an_error_where_the_gpu_was_asked_for():
    placements = [ON_GPU, SHAPES, (CPU, ["NonZero"]), (CPU, ["Unique", "NonZero"])]
    expected = (
        "ONNX Runtime runs 3 nodes of this model on the CPU (2 NonZero, 1 Unique), as CUDAExecutionProvider cannot"
    )
    for device in (choose_device("auto", (), BOTH, 1), cuda_device(allow_cpu_fallback=True)):
        assert fallback_note(device, placements) == f"{expected}."
    with pytest.raises(DeviceError) as caught:
        fallback_note(cuda_device(), placements)
    assert str(caught.value).startswith(f"--device cuda:1: {expected}.")
    assert "--allow-cpu-fallback" in str(caught.value)
    many = [(CPU, [kind]) for kind in "ABCDEFGH"]
    assert "8 nodes of this model on the CPU (1 A, 1 B, 1 C, 1 D, 1 E and 3 kinds more)" in fallback_note(
        choose_device("auto", (), BOTH, 1), many
    )


def test_an_onnxruntime_that_cannot_tell_where_nodes_run_is_not_taken_at_its_word():
    assert "too old to tell" in fallback_note(choose_device("auto", (), BOTH, 1), None)
    with pytest.raises(DeviceError, match=r"too old.*--allow-cpu-fallback"):
        fallback_note(cuda_device(), None)


def test_placements_are_read_as_this_onnxruntime_reports_them(monkeypatch):
    recorded = onnxruntime.SessionOptions()
    recorded.add_session_config_entry(session_module._RECORD_ASSIGNMENT, "1")
    body = "s = Scan<num_scan_inputs = 1, body = b (float[2] i) => (float[2] o) { o = Tanh(i) }>(y)"
    proto = tiny.model(f"g (float[n, 3] x) => (float[n, 2] s) {{ y = MatMul(x, W) {body} }}", {"W": W})
    opened = Session(proto.SerializeToString(), resolve_device("cpu"))
    opened._session = onnxruntime.InferenceSession(proto.SerializeToString(), recorded, providers=[CPU])
    placements = opened._placements()
    assert {provider for provider, _ in placements} == {CPU}
    assert {"MatMul", "Scan", "Tanh"} <= {kind for _, kinds in placements for kind in kinds}
    # What a GPU that took nothing would have it say: all but the arithmetic on shapes.
    assert "MatMul" in fallback_note(choose_device("auto", (), BOTH, 1), placements)
    monkeypatch.setattr(opened, "_session", object())  # before 1.24
    assert opened._placements() is None


def test_a_provider_that_was_asked_for_and_does_not_run_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider to fail")
    with pytest.raises(
        DeviceError, match="CUDAExecutionProvider was asked for, but ONNX Runtime runs this model on CPU"
    ):
        Session(MODEL, cuda_device())


def test_outputs_by_name_and_what_is_asked_for_alone():
    session = Session(MODEL, resolve_device("cpu"))
    assert session.outputs == ("y", "s")
    assert session.note == ""
    found = session.run({"x": X})
    np.testing.assert_allclose(found["y"], X @ W, rtol=1e-6)
    assert found["s"].tolist() == [4, 2]
    assert list(session.run({"x": X}, ["s"])) == ["s"]
    tensors = session.run_tensors({"x": X}, ["y"])
    assert isinstance(tensors["y"], torch.Tensor)
    np.testing.assert_array_equal(tensors["y"], found["y"])
    assert session.run_tensors({"x": X}, []) == {}


def test_bfloat16_goes_in_and_out():
    proto = tiny.model("g (bfloat16[n, 3] x) => (bfloat16[n, 3] y) { y = Identity(x) }")
    session = Session(proto.SerializeToString(), resolve_device("cpu"))
    values = np.float32([[1, -2.5, 3.140625]])
    np.testing.assert_array_equal(session.run({"x": values})["y"], values)
    tensor = session.run_tensors({"x": values}, ["y"])["y"]
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(tensor.float(), values)


def test_sequences_and_maps_come_flattened():
    body = "p = SplitToSequence<axis = 1>(x, two) q = ai.onnx.ml.ZipMap<classlabels_int64s = [4, 7, 9]>(x)"
    proto = tiny.model(
        f"g (float[n, 3] x) => (seq(float[n, m]) p, seq(map(int64, float)) q) {{ {body} }}",
        {"two": np.array([2, 1])},
        imports=', "ai.onnx.ml":3',
    )
    found = Session(proto.SerializeToString(), resolve_device("cpu")).run({"x": X})
    assert list(found) == ["p[0]", "p[1]", "q[4]", "q[7]", "q[9]"]
    np.testing.assert_array_equal(found["p[0]"], X[:, :2])
    np.testing.assert_array_equal(found["q[9]"], X[:, 2])


def test_failures_are_one_message_each():
    with pytest.raises(InputError, match="ONNX Runtime cannot load the model"):
        Session(b"no model", resolve_device("cpu"))
    with pytest.raises(InputError, match=r"cannot load it") as caught:
        Session(MODEL, resolve_device("cpu"), custom_op_library="/nowhere.so")
    assert "--custom-op-library /nowhere.so" in str(caught.value)
    session = Session(MODEL, resolve_device("cpu"))
    with pytest.raises(InputError, match=r"on the inputs x float32\[4, 2\]: .*Check these arrays") as caught:
        session.run({"x": X[:, :2]})
    assert ".cc:" not in str(caught.value)
    assert "\n" not in str(caught.value)


GROWTH = """
import sys
import numpy as np, psutil
from onnx_optshift.capture.session import Session, resolve_device
model, x, device = open(sys.argv[1], "rb").read(), np.ones((64, 3), np.float32), resolve_device("cpu")
sessions, found = [], []
for _ in range(5):
    sessions.append(Session(model, device, shared_arena=sys.argv[2] == "shared"))
    sessions[-1].run({"x": x})
    found.append(psutil.Process().memory_info().rss / 2**20)
print(*found)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what allocators hold differs")
def test_sessions_share_their_working_memory(tmp_path):
    wide = 2**18  # 64 MiB for 64 rows
    body = "h = MatMul(x, U) a = Tanh(h) y = ReduceMean<axes = [1], keepdims = 0>(a)"
    text = f"g (float[n, 3] x) => (float[n] y) {{ {body} }}"
    (tmp_path / "model.onnx").write_bytes(tiny.model(text, {"U": tiny.weight(3, wide)}).SerializeToString())

    def grown(kind):
        run = [sys.executable, "-c", GROWTH, str(tmp_path / "model.onnx"), kind]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        # The second may still find room cut up by what the first one left.
        _, second, *_, last = map(float, done.stdout.split())
        return last - second

    assert grown("own") > 150  # negative control: three further sessions
    assert grown("shared") < 50


def test_a_gpu_that_solves_multiplies_in_full_float32(monkeypatch):
    monkeypatch.setattr(session_module._runtime(), "get_available_providers", lambda: BOTH)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.get_float32_matmul_precision()
    try:
        for requested, precision in (("cpu", "high"), ("cuda", "highest")):  # negative control: it stays as it was
            torch.set_float32_matmul_precision("high")
            resolve_device(requested)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_moments_are_taken_on_the_gpu_without_a_copy_to_the_host(monkeypatch):
    if not torch.cuda.is_available() or CUDA not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA device and CUDA builds of torch and onnxruntime")
    source = ModelFile.load(tiny.two_layers(width=64))
    weights, _ = discover(source, Selection())
    (spec,) = source.inputs
    x = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    samples = load([{spec.name: x}], [InputSpec(spec.name, spec.dtype, spec.shape)])
    found = {}
    for device in ("cpu", "cuda"):
        bench = Bench.open(source, weights, resolve_device(device), batch_size=32)
        if device == "cuda":  # results on the host come from here alone
            monkeypatch.setattr(Session, "_run", lambda *_: pytest.fail("activations went to the host"))
        found[device] = bench.capture(bench.taps, samples)
    for tap, moments in found["cuda"].items():
        gram = moments.gram()
        assert (gram.device.type, gram.dtype) == ("cuda", torch.float64)
        torch.testing.assert_close(gram.cpu(), found["cpu"][tap].gram(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_cuda_computes_in_full_float32_and_hands_tensors_over_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA build of onnxruntime")
    x, w = tiny.weight(64, 2048), tiny.weight(2048, 64, seed=1)
    model = tiny.model("g (float[n, 2048] x) => (float[n, 64] y) { y = MatMul(x, W) }", {"W": w}).SerializeToString()
    exact = x.astype(np.float64) @ w.astype(np.float64)
    device = resolve_device("cuda")
    found = Session(model, device).run_tensors({"x": x}, ["y"])["y"]
    assert found.device.type == "cuda"
    rounding = np.linalg.norm(found.cpu().numpy() - exact) / np.linalg.norm(exact)
    assert rounding < 1e-5  # 10 bits of TensorFloat-32 would give some 3e-4
    assert Session(model, device).note == ""
    shapes = "s = Shape(x) n = Gather(s, zero) m = Mul(n, n) y = ConstantOfShape(m)"
    text = f"g (float[n, 2048] x) => (float[k] y) {{ {shapes} }}"
    arithmetic = tiny.model(text, {"zero": np.array([0])}).SerializeToString()
    assert Session(arithmetic, device).note == ""
    # There is no CUDA kernel for Unique.
    falling = tiny.model("g (float[n, 2048] x) => (float[k] y) { y = Unique(x) }").SerializeToString()
    with pytest.raises(DeviceError, match="1 Unique"):
        Session(falling, device)
    assert "1 Unique" in Session(falling, resolve_device("cuda", allow_cpu_fallback=True)).note
