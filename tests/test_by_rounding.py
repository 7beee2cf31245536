"""Weights for a quantizer, by the whole pass: on its grid, narrow for it, or as they were."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_optshift
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_initializer

ROOT = Path(__file__).parents[1]
MLP = ROOT / "models" / "digits_mlp"


def shifted(folder=MLP, **choices):
    settings = {"objective": "range", "tolerance": "auto", "quantization_bits": 4} | choices
    return onnx_optshift.shift(
        folder / "model.onnx", folder / "calibration.npz", heldout=folder / "heldout.npz", **settings
    )


def off_grid(model, grid, folder=MLP):
    """Largest difference between the weights and what round-to-nearest makes of them, as a share of the largest."""
    source = ModelFile.load(model)
    weights, _ = discover(ModelFile.load(folder / "model.onnx"), Selection())
    found = 0.0
    for weight in weights:
        content = source.initializer(weight.name)
        rounded = round_initializer(content, weight.form, grid)
        found = max(found, float(np.abs(rounded - content).max() / np.abs(content).max()))
    return found


@pytest.mark.parametrize(
    ("choices", "grid"),
    [
        ({"quantization_bits": 3}, Grid(3)),
        ({"quantization_bits": 4, "range_block": 16}, Grid(4, "block", 16, "full")),
        ({"quantization_bits": 4, "range_scope": "tensor"}, Grid(4, "tensor")),
        ({"quantization_bits": 4, "range_levels": "full"}, Grid(4, "channel", None, "full")),
        ({"quantization_bits": 3, "range_block": 16, "range_levels": "symmetric"}, Grid(3, "block", 16)),
    ],
)
def test_round_to_nearest_reproduces_the_file(choices, grid):
    result = shifted(**choices)
    assert off_grid(result.model, grid) < 1e-6
    assert off_grid(onnx.load(MLP / "model.onnx"), grid) > 0.01  # negative control
    (score,) = result.report.heldout_result.quantized
    assert score.after < 0.6 * score.before
    assert all(row.error_after < row.error_before for row in result.report.quantization)
    assert {output.bound_kind for output in result.report.verification.outputs} == {"measured"}
    # The trial that stands in the report is the file's own: run both, compare.
    assert result.report.heldout_result.tried[-1].chosen


def test_narrow_floats_where_no_grid_is_wanted():
    narrow, snapped = shifted(snap=False), shifted()
    assert off_grid(narrow.model, Grid(4)) > 0.01
    (by_float,), (by_grid,) = (result.report.heldout_result.quantized for result in (narrow, snapped))
    assert by_grid.after < by_float.after < by_float.before


def test_several_widths_are_served_by_narrow_floats():
    result = shifted(quantization_bits=(8, 4))
    assert off_grid(result.model, Grid(4)) > 0.01
    for score in result.report.heldout_result.quantized:
        assert score.after <= score.before * (1 + 1e-4)


def test_a_tolerance_that_the_grid_would_break_keeps_narrow_floats_and_says_so():
    result = shifted(tolerance=0.004)
    assert off_grid(result.model, Grid(4)) > 0.01
    assert max(output.rel for output in result.report.verification.outputs) <= 0.004
    assert any("only made narrow" in note for note in result.report.decisions)
    wide = shifted(tolerance=0.1)
    assert off_grid(wide.model, Grid(4)) < 1e-6
    assert max(output.rel for output in wide.report.verification.outputs) <= 0.1


def test_exact_stays_exact():
    result = shifted(tolerance=0.0)
    assert off_grid(result.model, Grid(4)) > 0.01
    assert max((output.rel for output in result.report.verification.outputs), default=0.0) < 1e-5
    assert result.report.verification.passed


def test_layers_report_residuals_of_their_own():
    result = shifted(snap=False)
    allowed = [layer.tolerance for layer in result.report.layers if layer.status == "shifted"]
    assert len(set(allowed)) > 1


def test_matmulnbits_of_onnxruntime_reproduces_the_file(tmp_path):
    """Its own symmetric 4-bit blocks, unpacked: the weights are those of the file."""
    library = pytest.importorskip(
        "onnxruntime.quantization.matmul_nbits_quantizer", reason="this onnxruntime has no MatMulNBitsQuantizer"
    )
    folder = ROOT / "models" / "digits_transformer"
    for model, most in (
        (shifted(folder, range_block=32).model, 1e-6),
        (onnx.load(folder / "model.onnx"), None),  # negative control
    ):
        config = library.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True)
        quantizer = library.MatMulNBitsQuantizer(
            onnx.ModelProto.FromString(model.SerializeToString()), algo_config=config
        )
        quantizer.process()
        arrays = {t.name: numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}
        before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        nodes = [node for node in quantizer.model.model.graph.node if node.op_type == "MatMulNBits"]
        assert len(nodes) >= 6
        worst = 0.0
        for node in nodes:
            packed, scales = (arrays[name] for name in node.input[1:3])
            d = next(a.i for a in node.attribute if a.name == "K")
            m = next(a.i for a in node.attribute if a.name == "N")
            levels = np.stack([packed & 15, packed >> 4], -1).reshape(m, -1, 32).astype(np.float64) - 8
            weight = (levels * scales.reshape(m, -1, 1)).reshape(m, -1)[:, :d].T
            name = node.input[1].split("_Q4")[0].removesuffix("_MatMul")
            source = before[name] if name in before else before[next(n for n in before if node.input[1].startswith(n))]
            worst = max(worst, float(np.abs(weight - source).max() / np.abs(source).max()))
        assert worst < most if most else worst > 0.01
