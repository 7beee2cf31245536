"""All layers together: the spectrum that the report shows, and shifts that round worse than the original weight."""

from pathlib import Path

import numpy as np
import pytest

from onnx_optshift.commands import shift
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.run.candidate import SPECTRUM_POINTS
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.objective import Range, make_objective
from onnx_optshift.solve.shift import Outcome

FOLDER = Path(__file__).parent.parent / "models" / "noisy_mlp"
FOUR, EIGHT = Grid(4), Grid(8)
RESIDUAL = 0.1


@pytest.fixture(scope="module")
def parts():
    prepared = prepare(FOLDER / "model.onnx", Settings(device="cpu"), [FOLDER / "calibration.npz"])
    store = prepared.bench.statistics(prepared.data.calibration)
    return prepared.bench, store


class Unjudged(Range):
    """The range, whatever rounding makes of it."""

    def objection(self, *_):
        return None


def layers(parts, objective, *grids):
    bench, store = parts
    return Layers(bench.weights, store, bench.model.initializer, objective, grids=grids)


def worse(found, solved, grid):
    """Layers whose outputs are farther off than before once the weights are rounded."""
    return {name for name, one in solved.items() if one.moved and one.rounding[grid] > found.facts[name].rounding[grid]}


def test_a_layer_that_rounds_worse_gets_a_smaller_residual(parts):
    free = layers(parts, Unjudged(Granularity("channel"), [FOUR]), FOUR)
    held = layers(parts, make_objective("range", [4]), FOUR)
    without, solved = free.candidate(RESIDUAL).solved, held.candidate(RESIDUAL).solved
    hurt = worse(free, without, FOUR)
    assert hurt  # what the grids are there against
    assert worse(held, solved, FOUR) == set()
    assert all(solved[name].residual < 0.8 * RESIDUAL for name in hurt)
    assert all(solved[name].residual == without[name].residual for name in solved.keys() - hurt)


def test_many_bits_leave_nothing_to_gain(parts):
    held = layers(parts, make_objective("range", [8]), EIGHT)
    solved = held.solve(held.weights["fc1.weight"], 3 * RESIDUAL)
    assert solved.array is None
    assert solved.shift.outcome is Outcome.ROUNDS_WORSE


def test_more_bits_beside_few_do_not_stand_in_the_way(parts):
    alone = layers(parts, make_objective("range", [4]), FOUR)
    beside = layers(parts, make_objective("range", [4, 8]), FOUR, EIGHT)
    for name, weight in alone.weights.items():
        one, two = alone.solve(weight, RESIDUAL), beside.solve(weight, RESIDUAL)
        assert (one.array == two.array).all(), name
    assert worse(beside, beside.candidate(RESIDUAL).solved, EIGHT) == set(beside.weights)


def test_what_is_held_is_not_solved_again_and_what_is_not_is(parts, monkeypatch):
    found = layers(parts, make_objective("norm"))
    held = found.candidate(RESIDUAL)
    assert found.candidate(RESIDUAL) is held
    assert found.candidate(RESIDUAL / 2) is not held
    solved = []
    monkeypatch.setattr(Layers, "solve", lambda self, weight, tolerance: solved.append(weight.name))
    del held
    found.candidate(RESIDUAL)
    assert solved == list(found.weights)


def test_where_every_residual_rounds_worse_the_summary_says_so(tmp_path):
    settings = Settings(device="cpu", objective="range", tolerance="auto", quantization_bits=(8, 4))
    result = shift.run(
        FOLDER / "model.onnx", tmp_path / "o.onnx", [FOLDER / "calibration.npz"], [FOLDER / "heldout.npz"], settings
    )
    assert all(layer.status != "shifted" for layer in result.report.layers)
    assert result.report.summary.startswith("Nothing to gain: 3 layers that would be farther off once quantized.")


def test_singular_values_are_those_of_the_rows(parts):
    found = layers(parts, make_objective("norm")).survey()["fc1.weight"].spectrum
    with np.load(FOLDER / "calibration.npz") as data:
        rows = data["pixels"].astype(np.float64)
    expected = np.linalg.svd(rows, compute_uv=False)
    places = np.linspace(0, 63, SPECTRUM_POINTS).round().astype(int)
    assert np.allclose(found, expected[places] / expected[0], atol=1e-7)
    assert found[-1] == 0  # pixels that are never lit
