"""What a quantized file tells of its quantizer: its grid, the options that write it, whether weights came through."""

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import numpy_helper

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Reshape, WeightForm
from onnx_optshift.integrations import quantizer_grid
from onnx_optshift.integrations.quantizer_grid import REPRODUCED, main, read_grids
from onnx_optshift.quantize.rtn import Grid, round_initializer

INPUTS, OUTPUTS = 96, 40
BODIES = {
    "MatMul": "g (float[b,96] x) => (float[b,40] y) { y = MatMul(x, w) }",
    "Gemm": "g (float[b,96] x) => (float[b,40] y) { y = Gemm<transB=1>(x, w) }",
}


def saved(path, op_type, matrix):
    """A model of one layer with the matrix `[inputs, outputs]`, stored as the operator has it."""
    stored = matrix if op_type == "MatMul" else np.ascontiguousarray(matrix.T)
    onnx.save(tiny_models.model(BODIES[op_type], {"w": stored}, opset=21, ir_version=10), path)
    return str(path)


def dequantized(path, op_type, levels, scales, bits=4, zero=None, **attributes):
    """The same with a DequantizeLinear of integers, as quantizers leave it; arrays as they are stored."""
    kind = {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[bits]
    model = tiny_models.model(BODIES[op_type], {}, opset=25 if bits == 2 else 21, ir_version=13 if bits == 2 else 10)
    model.graph.initializer.append(onnx.helper.make_tensor("w_i4", kind, levels.shape, levels.astype(np.int8).ravel()))
    model.graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), "w_scale"))
    inputs = ["w_i4", "w_scale"]
    if zero is not None:
        model.graph.initializer.append(
            onnx.helper.make_tensor("w_zero", kind, zero.shape, zero.astype(np.int8).ravel())
        )
        inputs.append("w_zero")
    node = onnx.helper.make_node("DequantizeLinear", inputs, ["w_deq"], name="deq", **attributes)
    model.graph.node[0].input[1] = "w_deq"
    model.graph.node.insert(0, node)
    onnx.save(model, path)
    return str(path)


# (axis that is reduced for a scale as the weight is stored, block, largest level) -> what is found for a MatMul, whose
# weight is stored [inputs, outputs], and for a Gemm with transB, whose weight is stored the other way round.
CASES = [
    (0, None, 7, ("output channel", "(the default)"), ("input channel", None)),
    (1, None, 7, ("input channel", None), ("output channel", "(the default)")),
    (None, None, 7, ("tensor", "--range-scope tensor"), ("tensor", "--range-scope tensor")),
    (0, None, 8, ("output channel", "--range-levels full"), ("input channel", None)),
    (0, 8, 8, ("block of 8 inputs", "--range-block 8"), ("block of 8 outputs", None)),
    (1, 8, 8, ("block of 8 outputs", None), ("block of 8 inputs", "--range-block 8")),
    (0, 8, 7, ("block of 8 inputs", "--range-block 8 --range-levels symmetric"), ("block of 8 outputs", None)),
    (None, None, 8, *[("tensor", "--range-scope tensor --range-levels full")] * 2),
    (0, 64, 8, ("block of 64 inputs", "--range-block 64"), ("input channel", None)),  # the last is shorter
    (0, None, 7.5, ("output channel", None), ("input channel", None)),
]


@pytest.mark.parametrize("op_type", BODIES)
@pytest.mark.parametrize(("axis", "block", "reach", "matmul", "gemm"), CASES)
def test_the_grid_is_read_off(tmp_path, op_type, axis, block, reach, matmul, gemm):
    matrix = tiny_models.weight(INPUTS, OUTPUTS)
    stored = matrix if op_type == "MatMul" else matrix.T
    if axis is None:
        scales, attributes = np.abs(stored).max() / reach, {}
    elif block is None:
        scales, attributes = np.abs(stored).max(axis) / reach, {"axis": 1 - axis}
    else:
        cells = np.maximum.reduceat(np.abs(np.moveaxis(stored, axis, 0)), range(0, stored.shape[axis], block))
        scales, attributes = np.moveaxis(cells, 0, axis) / reach, {"axis": axis, "block_size": block}
    spread = (
        scales
        if axis is None
        else np.expand_dims(scales, axis)
        if block is None
        else scales.repeat(block, axis).take(range(stored.shape[axis]), axis)
    )
    levels = np.clip(np.rint(stored / spread), -8, 7)
    quantized = dequantized(tmp_path / "q.onnx", op_type, levels, np.asarray(scales), **attributes)

    ((found,), missing) = read_grids(saved(tmp_path / "m.onnx", op_type, matrix), quantized)
    assert (found.scales, found.options) == (matmul if op_type == "MatMul" else gemm)
    assert found.levels == f"largest at {reach:g}"
    # To be rounded moves a weight by up to half a step of the largest level.
    assert REPRODUCED < found.difference <= 1.01 / reach
    assert not missing

    rounded = (levels * spread).astype(np.float32)
    ((again,), _) = read_grids(
        saved(tmp_path / "r.onnx", op_type, rounded if op_type == "MatMul" else rounded.T), quantized
    )
    assert again.difference <= REPRODUCED


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 16), (8, 32)])
def test_matmulnbits_of_onnx_runtime(tmp_path, bits, block):
    """Its own quantizer on weights that our grid of blocks has rounded, and on others as a control."""
    library = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer", reason="it needs onnx-ir")
    matrix = tiny_models.weight(INPUTS, OUTPUTS)
    form = WeightForm(matrix.shape).then(Reshape((1, *matrix.shape)))
    rounded = round_initializer(matrix, form, Grid(bits, "block", block, "full"))
    for array, same in ((rounded, True), (matrix, False)):
        path = saved(tmp_path / "m.onnx", "MatMul", array)
        quantizer = library.MatMulNBitsQuantizer(onnx.load(path), bits=bits, block_size=block, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
        ((found,), _) = read_grids(path, str(tmp_path / "q.onnx"))
        assert (found.scales, found.bits) == (f"block of {block} inputs", bits)
        assert found.options == f"--range-block {block}"
        assert (found.difference <= REPRODUCED) is same


def test_square_weights_stored_the_other_way_round(tmp_path):
    body = "g (float[b,40] x) => (float[b,40] y) { y = MatMul(x, w) }"
    matrix = tiny_models.weight(40, 40)
    scales = (np.abs(matrix).max(0) / 7).astype(np.float32)
    levels = np.rint(matrix / scales)
    quantized = tiny_models.model(body, {"w_scale": scales}, opset=21, ir_version=10)
    stored = levels.T.astype(np.int8).ravel()
    quantized.graph.initializer.append(onnx.helper.make_tensor("w_i4", onnx.TensorProto.INT4, levels.shape, stored))
    quantized.graph.node[0].input[1] = "w_turned"
    turn = onnx.helper.make_node("Transpose", ["w_deq"], ["w_turned"], perm=[1, 0])
    dequantize = onnx.helper.make_node("DequantizeLinear", ["w_i4", "w_scale"], ["w_deq"], axis=0)
    for node in (turn, dequantize):
        quantized.graph.node.insert(0, node)
    onnx.save(quantized, tmp_path / "q.onnx")
    for name, weight in (("m.onnx", matrix), ("r.onnx", (levels * scales).astype(np.float32))):
        onnx.save(tiny_models.model(body, {"w": weight}, opset=21, ir_version=10), tmp_path / name)
        ((found,), _) = read_grids(str(tmp_path / name), str(tmp_path / "q.onnx"))
        assert (found.scales, found.options) == ("output channel", "(the default)")
        assert (found.difference <= REPRODUCED) == (name == "r.onnx")


def test_zero_points_are_said(tmp_path):
    matrix = tiny_models.weight(INPUTS, OUTPUTS)
    scales, zero = np.ptp(matrix, 0) / 15, np.full(OUTPUTS, -1)
    levels = np.clip(np.rint(matrix / scales) - 1, -8, 7)
    quantized = dequantized(tmp_path / "q.onnx", "MatMul", levels, scales, zero=zero, axis=1)
    ((found,), _) = read_grids(saved(tmp_path / "m.onnx", "MatMul", (levels + 1) * scales.astype("f4")), quantized)
    assert (found.levels, found.options) == ("zero point", None)


def test_scales_that_do_not_fit_are_refused(tmp_path):
    """What Model Optimizer 0.47 writes for Gemm with transB and AWQ: no runtime loads it."""
    matrix = tiny_models.weight(INPUTS, OUTPUTS)
    levels = np.clip(np.rint(matrix.T * 2), -8, 7)
    scales = np.ones((OUTPUTS, 1))
    quantized = dequantized(tmp_path / "q.onnx", "Gemm", levels, scales, axis=0, block_size=128)
    with pytest.raises(InputError, match="do not fit"):
        read_grids(saved(tmp_path / "m.onnx", "Gemm", matrix), quantized)


def test_the_table(tmp_path, capsys):
    matrix = tiny_models.weight(INPUTS, OUTPUTS)
    path = saved(tmp_path / "m.onnx", "MatMul", matrix)
    quantized = dequantized(tmp_path / "q.onnx", "MatMul", np.rint(matrix * 2), np.full(OUTPUTS, 0.5), axis=1)
    assert main([path, quantized]) == 0
    said = capsys.readouterr().out
    assert "96 x 40" in said
    assert "0 of 1 integer weights are those of the float file." in said
    assert main([path, path]) == 0
    assert "not found among integers" in capsys.readouterr().out


def test_bad_usage_is_one_message(tmp_path, capsys):
    assert main([str(tmp_path / "none.onnx"), "b"]) == 2
    assert main([]) == 2
    assert "expected two files" in capsys.readouterr().err
    assert quantizer_grid.__doc__
