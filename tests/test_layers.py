"""All layers together: the spectrum that the report shows, and shifts that round worse than the original weight."""

from pathlib import Path

import numpy as np
import pytest

from onnx_optshift import optimize
from onnx_optshift.calibration.load import load
from onnx_optshift.data import input_specs
from onnx_optshift.layers import Layers, allowed_error
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.settings import Settings
from onnx_optshift.solve.shift import Outcome
from onnx_optshift.workbench import open_model, open_workbench

MODELS = Path(__file__).parent.parent / "models"
FOUR, EIGHT = Grid(4), Grid(8)
RESIDUAL = 0.1


@pytest.fixture(scope="module")
def parts():
    settings = Settings(device="cpu")
    model, weights, _ = open_model(MODELS / "noisy_mlp" / "model.onnx", settings)
    bench = open_workbench(model, weights, settings)
    samples = load([MODELS / "noisy_mlp" / "calibration.npz"], input_specs(model))
    return bench, bench.collect(samples)


def layers(parts, *grids):
    bench, statistics = parts
    return Layers(bench.weights, statistics, bench.model.initializer, objective="range", grids=grids)


def worse(found, solved, grid):
    """Layers whose outputs are farther off than before once the weights are rounded."""
    return {
        name
        for name, one in solved.items()
        if one.array is not None
        and any(
            after > before for _, before, after in found.quantization_errors(found.weights[name], one.array, [grid])
        )
    }


def test_a_layer_that_rounds_worse_gets_a_smaller_residual(parts):
    free, held = layers(parts), layers(parts, FOUR)
    without, solved = free.candidate(RESIDUAL).solved, held.candidate(RESIDUAL).solved
    hurt = worse(free, without, FOUR)
    assert hurt  # what the grids are there against
    assert worse(held, solved, FOUR) == set()
    assert all(solved[name].residual < 0.8 * RESIDUAL for name in hurt)
    assert all(solved[name].residual == without[name].residual for name in solved.keys() - hurt)


def test_many_bits_leave_nothing_to_gain(parts):
    held = layers(parts, EIGHT)
    solved = held.solve(held.weights["fc1.weight"], 3 * RESIDUAL)
    assert solved.array is None
    assert solved.shift.outcome is Outcome.ROUNDS_WORSE


def test_more_bits_beside_few_do_not_stand_in_the_way(parts):
    alone, beside = layers(parts, FOUR), layers(parts, FOUR, EIGHT)
    for name, weight in alone.weights.items():
        one, two = alone.solve(weight, RESIDUAL), beside.solve(weight, RESIDUAL)
        assert (one.array == two.array).all(), name
    assert worse(beside, beside.candidate(RESIDUAL).solved, EIGHT) == set(beside.weights)


def test_what_an_error_may_grow_to():
    assert allowed_error(0.01, 0.05, FOUR, 4) == 0.01
    assert allowed_error(0.01, 0.05, FOUR, 3) == 0.01
    assert allowed_error(0.01, 0.05, EIGHT, 8) == 0.01
    assert allowed_error(0.01, 0.05, EIGHT, 4) == pytest.approx(0.06)


def test_the_summary_says_what_the_gate_refused(tmp_path):
    folder = MODELS / "noisy_mlp"
    settings = Settings(device="cpu", objective="range", tolerance="auto", quantization_bits=(8, 4))
    result = optimize.run(
        folder / "model.onnx", tmp_path / "o.onnx", [folder / "calibration.npz"], [folder / "heldout.npz"], settings
    )
    assert all(layer.status != "shifted" for layer in result.report.layers)
    assert "held-out data rejected every shift (at 8 bits" in result.report.summary


def test_singular_values_are_those_of_the_rows(parts):
    held = layers(parts)
    with np.load(MODELS / "noisy_mlp" / "calibration.npz") as data:
        rows = data["pixels"].astype(np.float64)
    expected = np.linalg.svd(rows, compute_uv=False)
    found = held.singular_values(held.weights["fc1.weight"], 64)
    assert len(found) == 64
    assert np.allclose(found, expected / expected[0], atol=1e-7)
    assert found[-1] == 0  # pixels that are never lit
    few = held.singular_values(held.weights["fc1.weight"], 8)
    assert few == tuple(found[round(place)] for place in np.linspace(0, 63, 8))
