"""Shifted weights through the 4-bit quantizers of other packages: the grid that the recipes name is reproduced.

Each needs an environment of its own: `nvidia-modelopt[onnx]` and `nncf` pin other versions of onnx than the tests do.
"""

import warnings

import numpy as np
import onnx
import pytest
import tiny_models

import onnx_optshift
from onnx_optshift.errors import InputError
from onnx_optshift.integrations.quantizer_grid import REPRODUCED, read_grids

# Their imports and calls warn of much; what counts is the file that they write.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

D, M = 160, 48  # more inputs than a block of 128, and no multiple of it
BODIES = {
    "MatMul": f"g (float[b,{D}] x) => (float[b,{M}] y) {{ y = MatMul(x, w) }}",
    "Gemm": f"g (float[b,{D}] x) => (float[b,{M}] y) {{ y = Gemm(x, w) }}",
    "Gemm, transB": f"g (float[b,{D}] x) => (float[b,{M}] y) {{ y = Gemm<transB=1>(x, w) }}",
}


@pytest.fixture(name="case")
def fixture_case(tmp_path):
    """Makes (path of a model of one layer, path of its data)."""

    def make(kind):
        weight = tiny_models.weight(D, M)
        stored = np.ascontiguousarray(weight.T) if "transB" in kind else weight
        onnx.save(tiny_models.model(BODIES[kind], {"w": stored}, opset=21, ir_version=10), tmp_path / "model.onnx")
        rows = tiny_models.weight(800, 96, seed=1) @ tiny_models.weight(96, D, seed=2)
        rows = rows / 10 + 0.3 * tiny_models.weight(800, D, seed=3)
        np.savez(tmp_path / "calibration.npz", x=rows.astype(np.float32))
        return tmp_path / "model.onnx", tmp_path / "calibration.npz"

    return make


def shifted(path, data, **choices):
    target = path.with_name("shifted.onnx")
    result = onnx_optshift.shift(path, data, objective="range", tolerance="auto", quantization_bits=4, **choices)
    return result.save(target)


def modelopt(path, data, method, **options):
    """Model Optimizer takes the same .npz: names of the inputs, samples along axis 0."""
    library = pytest.importorskip("modelopt.onnx.quantization", reason="nvidia-modelopt[onnx] is not installed")
    target = path.with_name("quantized.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.quantize(
            str(path),
            quantize_mode="int4",
            calibration_method=method,
            calibration_data=dict(np.load(data)),
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(target),
            log_level="ERROR",
            **options,
        )
    return read_grids(str(path), str(target))


@pytest.mark.parametrize("method", ["rtn_dq", "awq_clip"])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_model_optimizer_per_channel(case, kind, method):
    path, data = case(kind)
    ((plain,), _) = modelopt(path, data, method, block_size=-1)
    assert plain.difference > REPRODUCED
    ((found,), _) = modelopt(shifted(path, data), data, method, block_size=-1)
    assert (found.scales, found.options) == ("output channel", "(the default)")
    assert found.difference <= REPRODUCED


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_model_optimizer_in_the_blocks_that_it_takes_by_itself(case, kind):
    path, data = case(kind)
    for grid, same in (({"range_block": 128, "range_levels": "symmetric"}, True), ({"range_block": 128}, False)):
        ((found,), _) = modelopt(shifted(path, data, **grid), data, "rtn_dq")
        assert (found.scales, found.options) == ("block of 128 inputs", "--range-block 128 --range-levels symmetric")
        assert (found.difference <= REPRODUCED) is same


def test_model_optimizer_takes_other_axes_for_transposed_weights(case):
    """Round-to-nearest scales the stored weight's first axis, whatever transB says; with AWQ no runtime loads it."""
    path, data = case("Gemm, transB")
    ((found,), _) = modelopt(shifted(path, data), data, "rtn_dq", block_size=-1)
    assert (found.scales, found.options) == ("input channel", None)
    assert found.difference > REPRODUCED
    with pytest.raises((InputError, ValueError)):
        modelopt(path, data, "awq_clip")


@pytest.mark.parametrize(("group", "grid"), [(32, {"range_block": 32}), (-1, {"range_levels": "full"})])
@pytest.mark.parametrize("kind", BODIES)
def test_nncf(case, kind, group, grid):
    library = pytest.importorskip("nncf", reason="nncf is not installed")
    path, data = case(kind)
    for source, same in ((path, False), (shifted(path, data, **grid), True)):
        mode = library.CompressWeightsMode.INT4_SYM
        model = library.compress_weights(onnx.load(source), mode=mode, group_size=group, ratio=1.0, all_layers=True)
        onnx.save(model, path.with_name("quantized.onnx"))
        if "transB" in kind and group > 0:  # its groups lie along axis 0 of the stored weight, which has outputs there
            with pytest.raises(InputError, match="do not fit"):
                read_grids(str(source), str(path.with_name("quantized.onnx")))
            continue
        ((found,), _) = read_grids(str(source), str(path.with_name("quantized.onnx")))
        assert found.options == ("--range-block 32" if group > 0 else "--range-levels full")
        assert (found.difference <= REPRODUCED) is same
