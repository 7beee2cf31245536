"""float16, bfloat16, float32 and float64 end to end: solved in float64, rounded once, dtype kept, told as it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models as tiny
from onnx import TensorProto, helper, numpy_helper

import onnx_optshift
from onnx_optshift.errors import InputError

# Name: (ONNX number, name in model text, numpy type, half the distance from 1 to the next number).
DTYPES = {
    "float16": (TensorProto.FLOAT16, "float16", np.float16, 2.0**-11),
    "bfloat16": (TensorProto.BFLOAT16, "bfloat16", ml_dtypes.bfloat16, 2.0**-8),
    "float32": (TensorProto.FLOAT, "float", np.float32, 2.0**-24),
    "float64": (TensorProto.DOUBLE, "double", np.float64, 2.0**-53),
}
LAYERS = {"Gemm": ("Gemm(a, w, b)", (12, 5)), "MatMul": ("MatMul(a, w)", (12, 5)), "Conv": ("Conv(a, w)", (5, 3, 2, 2))}
# What ONNX Runtime has no kernel for on the CPU.
NO_KERNEL = {("Gemm", "bfloat16"), ("MatMul", "bfloat16"), ("Conv", "bfloat16"), ("Conv", "float64")}
# Rounding errors of a dozen terms, in the solver and in the runtime: for float64 they are what is left.
FLOAT64_SUMS = 12 * 2.0**-53
RANKS = {"Gemm": 9, "MatMul": 9, "Conv": 8}


def tensor(name, array, dtype):
    number, _, numpy_type, _ = DTYPES[dtype]
    return helper.make_tensor(name, number, array.shape, array.astype(numpy_type).tobytes(), raw=True)


def model(op, dtype, *, computed_in_float32=False):
    """x -> op -> Relu -> y, everything in `dtype`, or everything stored in it but computed in float32."""
    number, text, *_ = DTYPES[dtype]
    layer, shape = LAYERS[op]
    x = "[N,12]" if op != "Conv" else "[N,3,5,5]"
    y = "[N,5]" if op != "Conv" else "[N,5,4,4]"
    cast = "Cast<to=1>" if computed_in_float32 else "Identity"
    body = f"a = {cast}(x)  w = {cast}(W)  b = {cast}(B)  h = {layer}  r = Relu(h)"
    body += f"  y = Cast<to={number}>(r)" if computed_in_float32 else "  y = Identity(r)"
    tensors = {"W": tensor("W", tiny.weight(*shape), dtype), "B": tensor("B", tiny.weight(5), dtype)}
    return tiny.model(f"g ({text}{x} x) => ({text}{y} y) {{ {body} }}", tensors)


def calibration(op, samples=40):
    """Samples in which a feature is dead, one is a copy of another, and one its double; for images a dead channel."""
    x = np.random.default_rng(1).standard_normal((samples, 12) if op != "Conv" else (samples, 3, 5, 5))
    if op == "Conv":
        x[:, 1] = 0
    else:
        x[:, 3], x[:, 7], x[:, 11] = 0, x[:, 2], 2 * x[:, 0]
    return x


def weight_of(proto):
    return numpy_helper.to_array(proto.graph.initializer[0])


def run(proto, x, dtype):
    """The output in float64. numpy has no bfloat16, so it goes in and comes out as bits."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    if dtype != "bfloat16":
        return session.run(None, {"x": x.astype(DTYPES[dtype][2])})[0].astype(np.float64)
    bits = np.ascontiguousarray(x.astype(ml_dtypes.bfloat16)).view(np.uint16)
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    # Cast to float32 by a second model: this way there is no bfloat16 array in the test at all.
    back = tiny.model("g (bfloat16 x) => (float y) { y = Cast<to=1>(x) }")
    back.graph.input[0].type.tensor_type.ClearField("shape")
    back.graph.output[0].type.tensor_type.ClearField("shape")
    reader = onnxruntime.InferenceSession(back.SerializeToString(), providers=["CPUExecutionProvider"])
    output = reader.run_with_ort_values(None, {"x": binding.get_outputs()[0]})[0]
    return output.numpy().astype(np.float64)


CASES = [
    pytest.param(op, dtype, in_float32, id=f"{op}-{dtype}-{'computed in float32' if in_float32 else 'throughout'}")
    for op in LAYERS
    for dtype in DTYPES
    for in_float32 in (False, True)
    if in_float32 or (op, dtype) not in NO_KERNEL
]


@pytest.mark.parametrize(("op", "dtype", "computed_in_float32"), CASES)
def test_dtype_end_to_end(op, dtype, computed_in_float32):
    unit = DTYPES[dtype][3]
    proto = model(op, dtype, computed_in_float32=computed_in_float32)
    x = calibration(op)
    # float32 data is converted to what the model takes.
    result = onnx_optshift.shift(proto, {"x": x.astype(np.float32)}, device="cpu")
    written = onnx.load(result.path)
    (layer,) = result.report.layers
    assert (layer.status, layer.dtype, layer.rank) == ("shifted", dtype, RANKS[op])

    # Only the bytes of the weight differ, and it is still of its type.
    before, after = weight_of(proto), weight_of(written)
    assert after.dtype == before.dtype == np.dtype(DTYPES[dtype][2])
    blank = [onnx.ModelProto.FromString(m.SerializeToString()) for m in (proto, written)]
    for copy in blank:
        copy.graph.initializer[0].ClearField("raw_data")
    assert blank[0] == blank[1]

    # Told as it is: the norms and the residual of what is in the file. Rounding moves each entry by one unit at most.
    assert layer.norm_before == pytest.approx(np.linalg.norm(before.astype(np.float64)), rel=1e-6)
    assert layer.norm_after == pytest.approx(np.linalg.norm(after.astype(np.float64)), rel=unit + 1e-12)
    assert layer.norm_after < 0.9 * layer.norm_before
    assert layer.measured_residual <= 2 * max(unit, FLOAT64_SUMS)

    # The outputs on the data, as the model sees it: rounding of W, of the product and of the output.
    reference, shifted = run(proto, x, dtype), run(written, x, dtype)
    unit_of_outputs = max(unit, 2.0**-24 if computed_in_float32 else FLOAT64_SUMS)
    deviation = np.linalg.norm(shifted - reference) / np.linalg.norm(reference)
    assert deviation <= 4 * unit_of_outputs
    (output,) = result.report.verification.outputs
    assert output.rel == pytest.approx(deviation, rel=1e-3, abs=1e-12)
    # Negative control: on data that the calibration data did not show, the models differ.
    other = np.random.default_rng(2).standard_normal(x.shape)
    assert np.linalg.norm(run(written, other, dtype) - run(proto, other, dtype)) > 0.05 * np.linalg.norm(reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_run_finds_nothing_more(dtype):
    proto = model("MatMul", dtype, computed_in_float32=True)
    # One row only: rounding then puts the most back into what the row does not see.
    data = {"x": calibration("MatMul", samples=1).astype(np.float32)}
    first = onnx_optshift.shift(proto, data, device="cpu", force=True)
    second = onnx_optshift.shift(first.path, data, device="cpu", force=True)
    assert first.report.layers[0].status == "shifted"
    assert second.report.layers[0].status == "unchanged"
    assert onnx.load(second.path) == onnx.load(first.path)


@pytest.mark.parametrize(("op", "dtype"), sorted(NO_KERNEL))
def test_what_the_runtime_has_no_kernel_for_is_one_message(op, dtype):
    with pytest.raises(InputError, match=rf"ONNX Runtime cannot load the model: .*{op}"):
        onnx_optshift.shift(model(op, dtype), {"x": calibration(op).astype(np.float32)}, device="cpu")


@pytest.mark.parametrize("given", ["bfloat16", "float32", "float64"])
def test_bfloat16_inputs_take_any_float(given):
    proto = model("Gemm", "bfloat16", computed_in_float32=True)
    x = calibration("Gemm").astype(ml_dtypes.bfloat16)
    result = onnx_optshift.shift(proto, {"x": x.astype(DTYPES[given][2])}, device="cpu")
    expected = onnx_optshift.shift(proto, {"x": x}, device="cpu")
    assert np.array_equal(weight_of(onnx.load(result.path)), weight_of(onnx.load(expected.path)))


def test_float16_data_that_overflows_is_refused():
    x = calibration("Gemm")
    x[3, 4] = 1e6
    with pytest.raises(InputError, match="do not fit into float16"):
        onnx_optshift.shift(model("Gemm", "float16"), {"x": x}, device="cpu")


def test_weights_stored_in_another_type_than_computed_keep_theirs():
    text = "g (float[N,12] x) => (float[N,5] y) { w = Cast<to=1>(W)  y = MatMul(x, w) }"
    proto = tiny.model(text, {"W": tiny.weight(12, 5, dtype=np.float64)})
    result = onnx_optshift.shift(proto, {"x": calibration("MatMul").astype(np.float32)}, device="cpu")
    assert weight_of(onnx.load(result.path)).dtype == np.float64
    assert result.report.layers[0].status == "shifted"


@pytest.mark.parametrize("free", [0.005, 0.5])
def test_rounding_that_undoes_the_gain_is_not_written(free):
    """A bfloat16 weight with little to gain: rounding the solution adds back more than the solution took away."""
    x = tiny.weight(1, 64, seed=4)
    seen = np.linalg.pinv(x) @ x
    kept, gone = seen @ tiny.weight(64, 16), (np.eye(64) - seen) @ tiny.weight(64, 16, seed=9)
    array = kept + gone * free * np.linalg.norm(kept) / np.linalg.norm(gone)
    text = "g (float[N,64] x) => (float[N,16] y) { w = Cast<to=1>(W)  y = MatMul(x, w) }"
    proto = tiny.model(text, {"W": tensor("W", array, "bfloat16")})
    result = onnx_optshift.shift(proto, {"x": x}, device="cpu", force=True)
    before, after = (np.linalg.norm(weight_of(m).astype(np.float64)) for m in (proto, onnx.load(result.path)))
    assert after <= before
    (layer,) = result.report.layers
    assert layer.norm_after == pytest.approx(after, rel=1e-6)
    assert layer.status == ("shifted" if free == 0.5 else "unchanged")
