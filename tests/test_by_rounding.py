"""Weights for a quantizer, by the whole pass: on its grid, narrow for it, or as they were."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import onnx_optshift
from onnx_optshift.decide import by_rounding, recapture
from onnx_optshift.geometry import MatrixRows, Tap
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.run.on_grid import placed
from onnx_optshift.solve.grid_rounding import LEAST_RIDGE
from onnx_optshift.stats.moments import InputMoments

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


def output_error(model, folder):
    """Relative error of the first output on data that no run has seen."""
    feeds = {name: array for name, array in np.load(folder / "heldout.npz").items() if name != "labels"}
    reference, found = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for m in (onnx.load(folder / "model.onnx"), model)
    )
    return np.linalg.norm(found - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize(("name", "most"), [("digits_transformer", 0.6), ("digits_mlp", 0.9), ("noisy_mlp", 0.8)])
def test_layers_that_make_up_for_those_before_are_closer_where_nothing_was_seen(name, most):
    folder = ROOT / "models" / name
    errors, reports = {}, {}
    for how in ("none", "auto"):
        settings = {"objective": "range", "tolerance": "auto", "quantization_bits": 3, "recapture": how}
        result = onnx_optshift.shift(folder / "model.onnx", folder / "calibration.npz", **settings)
        assert off_grid(result.model, Grid(3), folder) < 1e-6
        errors[how], reports[how] = output_error(result.model, folder), result.report
    assert errors["auto"] < most * errors["none"]
    (chosen,) = [trial.what for trial in reports["auto"].heldout_result.tried if trial.chosen]
    assert chosen == by_rounding.IN_ORDER
    # Negative control: the other run did not try it.
    assert by_rounding.IN_ORDER not in {trial.what for trial in reports["none"].heldout_result.tried}


def test_held_out_data_chooses_between_the_two(monkeypatch):
    def harmful(bench, layers, samples, starts):
        candidate = placed(layers, starts, snap=True)
        name = next(iter(candidate.arrays))
        worse = replace(candidate.solved[name], array=-candidate.arrays[name])
        return replace(candidate, solved={**candidate.solved, name: worse})

    expected = shifted(recapture="none").model
    monkeypatch.setattr(by_rounding, "rounded_in_order", harmful)
    result = shifted()
    tried = {trial.what: trial for trial in result.report.heldout_result.tried}
    assert not tried[by_rounding.IN_ORDER].chosen
    assert tried[by_rounding.SNAPPED].chosen
    assert result.model.SerializeToString() == expected.SerializeToString()


def test_what_a_layer_is_rounded_towards_is_the_ridge_regression_of_the_original_outputs():
    rng = np.random.default_rng(0)
    original = rng.standard_normal((200, 12))
    moved = original @ (np.eye(12) + 0.1 * rng.standard_normal((12, 12)))
    matrix = rng.standard_normal((12, 5))
    tap = Tap("x", MatrixRows(), 1, 12)
    moments = InputMoments(1, 12)
    moments.update(torch.from_numpy(moved)[None])
    pair = (moments, torch.from_numpy(moved.T @ original)[None])
    weight = SimpleNamespace(uses=(SimpleNamespace(tap=tap),), d=12, dtype="float32")
    problem = recapture._corrected(weight, torch.from_numpy(matrix)[None], {tap: pair})
    # The same as least squares with rows sqrt(ridge) I and targets sqrt(ridge) V below the others.
    root = np.sqrt(LEAST_RIDGE * np.square(moved).sum() / 12)
    rows, target = np.vstack([moved, root * np.eye(12)]), np.vstack([original @ matrix, root * matrix])
    expected, *_ = np.linalg.lstsq(rows, target, rcond=None)
    np.testing.assert_allclose(problem.matrix[0].numpy(), expected, rtol=1e-9, atol=1e-9)
    moments.update(torch.full((1, 1, 12), torch.inf, dtype=torch.float64))  # an overflow tells of no problem
    assert recapture._corrected(weight, torch.from_numpy(matrix)[None], {tap: pair}) is None
    # Negative control: that is another weight, and closer to the original's outputs.
    assert np.linalg.norm(moved @ expected - original @ matrix) < 0.5 * np.linalg.norm((moved - original) @ matrix)
