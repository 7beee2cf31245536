"""Rows weighed by their own outputs: against numpy, and on layers whose few large rows own the plain norm."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import onnx_optshift
from onnx_optshift.geometry import MatrixRows, PatchRows, Tap
from onnx_optshift.quantize.rtn import Grid, round_to_nearest
from onnx_optshift.solve import quant_range
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.row_weights import FLOOR, RowRule, Rows
from onnx_optshift.stats.rows import observe, to_rows

WIDTH, OUTPUTS = 32, 24


def massive(samples=2000, share=0.03, seed=0):
    """Rows of which a few, like separator tokens, have outputs 30 times as large, in directions of their own."""
    rng = np.random.default_rng(seed)
    matrix = np.random.default_rng(7).standard_t(4, (WIDTH, OUTPUTS))
    rows = rng.standard_normal((samples, WIDTH)) * np.geomspace(1, 0.01, WIDTH)
    special = rng.random(samples) < share
    large = np.random.default_rng(8).standard_normal((2, WIDTH))
    rows[special] = rng.standard_normal((special.sum(), 2)) @ large
    typical = np.median(np.linalg.norm(rows[~special] @ matrix, axis=1))
    rows[special] *= 30 * typical / np.linalg.norm(rows[special] @ matrix, axis=1, keepdims=True)
    return rows, matrix, special


def weights_of(rows, matrix):
    energies = (np.asarray(rows) @ matrix) ** 2
    energies = energies.reshape(len(rows), -1).sum(1)
    return 1 / np.maximum(energies / np.median(energies), FLOOR)


def rule_of(rows, matrix):
    energies = torch.from_numpy(((rows @ matrix) ** 2).sum(1))
    return RowRule.of([torch.from_numpy(matrix)[None].float()], [Rows(energies).median])


def test_weighted_moments_are_those_of_weighted_rows():
    rows, matrix, _ = massive(samples=501)
    tap = Tap("x", MatrixRows(), 1, WIDTH, weighed="w")
    moments = InputMoments(1, WIDTH)
    for part in np.array_split(rows, 7):  # a row's weight depends on nothing but the row
        observe(moments, tap, torch.from_numpy(part), rule_of(rows, matrix))
    weighted = rows * np.sqrt(weights_of(rows, matrix))[:, None]
    np.testing.assert_allclose(moments.gram()[0], weighted.T @ weighted, rtol=1e-4, atol=1e-4)
    assert moments.rows == len(rows)
    plain = InputMoments(1, WIDTH)
    observe(plain, tap, torch.from_numpy(rows))
    assert float((plain.gram() - moments.gram()).abs().max()) > 1  # negative control


def test_layers_that_share_a_rule_are_heard_alike_however_wide_they_are():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 12))
    matrices = [rng.standard_normal((12, width)) * size for width, size in ((5, 100.0), (40, 0.01))]
    energies = [((rows @ matrix) ** 2).sum(1) for matrix in matrices]
    medians = [float(np.median(energy)) for energy in energies]
    rule = RowRule.of([torch.from_numpy(matrix)[None].float() for matrix in matrices], medians)
    assert rule.root.shape == (1, 12, 12)
    found = rule(torch.from_numpy(rows)[None]).numpy()
    shares = np.mean([energy / median for energy, median in zip(energies, medians, strict=True)], axis=0)
    np.testing.assert_allclose(found, 1 / np.maximum(shares, FLOOR), rtol=1e-5)
    assert not np.allclose(found, 1 / (energies[0] / medians[0]), rtol=0.1)  # negative control: both are heard


def test_patches_of_all_groups_at_one_position_have_one_weight():
    rng = np.random.default_rng(0)
    form = PatchRows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), group=2)
    tap = Tap("x", form, 2, 2 * 9, weighed="w")
    images = torch.from_numpy(rng.standard_normal((3, 4, 6, 6)))
    matrix = torch.from_numpy(rng.standard_normal((2, 18, 5)))
    rows = to_rows(images, tap)
    energies = (rows @ matrix).square().sum((0, 2))
    moments = InputMoments(2, 18)
    observe(moments, tap, images, RowRule.of([matrix.float()], [float(energies.median())]))
    root = (1 / (energies / energies.median()).clamp_min(FLOOR)).sqrt()[:, None]
    torch.testing.assert_close(moments.gram(), (rows * root).mT @ (rows * root), rtol=1e-4, atol=1e-4)


def test_rows_near_zero_do_not_own_the_norm():
    rows, matrix, _ = massive()
    rows[:50] *= 1e-6
    weights = rule_of(rows, matrix)(torch.from_numpy(rows)[None]).numpy()
    assert weights.max() <= 1 / FLOOR * (1 + 1e-6)
    assert np.all(weights[:50] == pytest.approx(1 / FLOOR))


def test_the_share_of_the_largest_rows():
    rows, matrix, special = massive()
    energies = ((rows @ matrix) ** 2).sum(1)
    share = Rows(torch.from_numpy(energies)).top_share
    assert share == pytest.approx(np.sort(energies)[-20:].sum() / energies.sum())
    assert share > 0.3
    assert Rows(torch.from_numpy(energies[~special])).top_share < 0.1


@pytest.mark.parametrize("residual", [0.05, 0.06])
def test_ordinary_rows_are_served_where_the_plain_norm_harms_them(residual):
    rows, matrix, special = massive()
    spectra = {}
    for name, weights in (("plain", np.ones(len(rows))), ("relative", weights_of(rows, matrix))):
        moments = InputMoments(1, WIDTH)
        moments.update(torch.from_numpy(rows * np.sqrt(weights)[:, None])[None])
        spectra[name] = factor(moments)
    ordinary = rows[~special]
    errors = {}
    for name, spectrum in spectra.items():
        narrow = quant_range.solve(spectrum, torch.from_numpy(matrix)[None], residual, 2.0**-24).matrix
        moved = round_to_nearest(narrow, Grid(4))[0].numpy() - matrix
        errors[name] = np.linalg.norm(ordinary @ moved) / np.linalg.norm(ordinary @ matrix)
    rounded = round_to_nearest(torch.from_numpy(matrix)[None], Grid(4))[0].numpy() - matrix
    untouched = np.linalg.norm(ordinary @ rounded) / np.linalg.norm(ordinary @ matrix)
    assert errors["plain"] > 1.5 * untouched
    assert errors["relative"] < untouched


def model():
    """A linear layer, and its outputs normalized row by row, as attention blocks do."""
    matrix = massive()[1].astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("LpNormalization", ["h"], ["y"], axis=-1, p=2),
        ],
        "massive",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", OUTPUTS])],
        [numpy_helper.from_array(matrix, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_whole_pass_narrows_for_all_rows():
    calibration, heldout = (massive(seed=seed)[0].astype(np.float32) for seed in (0, 1))
    errors = {}
    for weighting in ("relative", "none"):
        found = onnx_optshift.shift(
            model(),
            {"x": calibration},
            heldout={"x": heldout},
            objective="range",
            tolerance="auto",
            quantization_bits=3,
            row_weighting=weighting,
        )
        (score,) = found.report.heldout_result.quantized
        errors[weighting] = score.after / score.before
    assert errors["relative"] < 0.8
    assert errors["none"] > 1.05 * errors["relative"]
