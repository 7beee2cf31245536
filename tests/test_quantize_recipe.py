"""The comparison of quantizers: its GPTQ against the definition, and its tables on a model that is in the tree."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import quantize_recipe
import quantizers
import torch
from gptq_reference import gptq

from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_to_nearest

ROOT = Path(__file__).parents[1]
MLP = ROOT / "models" / "digits_mlp"


def layer(groups=1, width=10, outputs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, 80, width, generator=generator, dtype=torch.float64) @ mixing
    return rows.mT @ rows, torch.randn(groups, width, outputs, generator=generator, dtype=torch.float64)


def one_by_one(column, hessian, scale, top):
    """Rounds input after input; those that are left are solved for anew each time, by least squares."""
    width, fixed = len(column), np.zeros(0)
    for i in range(width):
        # min (w - column)ᵀ H (w - column) over the inputs from i on, those before being what they were rounded to.
        free = column[i:].copy()
        if i:
            free -= np.linalg.solve(hessian[i:, i:], hessian[i:, :i] @ (fixed - column[:i]))
        fixed = np.append(fixed, np.clip(np.round(free[0] / scale), -top, top) * scale)
    return fixed


@pytest.mark.parametrize(("groups", "bits"), [(1, 4), (1, 2), (2, 3)])
def test_gptq_is_rounding_with_the_rest_solved_anew(groups, bits):
    gram, matrix = layer(groups)
    found = gptq(matrix, gram, bits).numpy()
    top = 2 ** (bits - 1) - 1
    for g in range(groups):
        hessian = gram[g].numpy() + 0.01 * np.diag(gram[g].numpy()).mean() * np.eye(10)
        for j in range(matrix.shape[2]):
            column = matrix[g, :, j].numpy()
            expected = one_by_one(column, hessian, np.abs(column).max() / top, top)
            np.testing.assert_allclose(found[g, :, j], expected, atol=1e-10)


def test_gptq_beats_rounding_where_inputs_are_correlated_and_equals_it_where_not():
    gram, matrix = layer(width=30, seed=1)
    nearest = round_to_nearest(matrix, Grid(3))

    def error(quantized):
        return float(((quantized - matrix).mT @ gram @ (quantized - matrix)).diagonal(dim1=1, dim2=2).sum())

    assert error(gptq(matrix, gram, 3)) < 0.7 * error(nearest)
    torch.testing.assert_close(gptq(matrix, torch.eye(30).to(gram)[None], 3), nearest)


def test_rounding_takes_every_linear_weight_and_nothing_else(tmp_path):
    out = tmp_path / "rounded.onnx"
    quantizers.rtn(Grid(2), Selection()).run(MLP / "model.onnx", out, {})
    for before, after in zip(*(onnx.load(path).graph.initializer for path in (MLP / "model.onnx", out)), strict=True):
        array = onnx.numpy_helper.to_array(after)
        assert (before == after) == ("bias" in before.name)
        if array.ndim == 2:
            assert all(
                len(np.unique(np.abs(part))) <= 2 for part in (array if before.name != "fc2.weight" else array.T)
            )


def test_a_quantizer_that_leaves_the_model_float_is_not_counted(tmp_path):
    pytest.importorskip("onnx_ir")
    with pytest.raises(quantizers.NotApplicable, match="no MatMul"):
        quantizers.nbits("DEFAULT", 32, 100).run(MLP / "model.onnx", tmp_path / "out.onnx", {})
    with pytest.raises(quantizers.NotApplicable, match="still float"):
        quantizers._check_quantized(MLP / "model.onnx", "nothing")


def test_the_float_model_is_not_written_to(tmp_path):
    model = Path(shutil.copy(MLP / "model.onnx", tmp_path))

    def spoil(source, target, _):
        source.write_bytes(b"")
        target.write_bytes(b"quantized")

    quantizers.Quantizer("rtn", "spoils its input", 8, spoil).run(model, tmp_path / "out.onnx", {})
    assert model.read_bytes() == (MLP / "model.onnx").read_bytes()
    assert (tmp_path / "out.onnx").read_bytes() == b"quantized"


def test_readers_give_equal_batches_and_can_be_read_again():
    reader = quantizers.Reader({"x": np.arange(60)})
    assert [len(batch["x"]) for batch in reader] == [25, 25]
    assert [len(reader.get_next()["x"]), len(reader.get_next()["x"]), reader.get_next()] == [25, 25, None]
    assert [len(batch["x"]) for batch in quantizers.Reader({"x": np.arange(7)})] == [7]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quantize_recipe.py", *map(str, arguments)])
    quantize_recipe.main()


def rows(table):
    """Quantizer -> (top-1 before, after, NLL before, after, error before, after, ratio)."""
    found = re.findall(r"^\| (.+?) \| \d+ \| ([\d. |-]+) \|$", table, re.MULTILINE)
    return {name: [float(value) for value in values.replace("-", "nan").split("|")] for name, values in found}


def test_the_table_of_a_shift_without_a_gate(tmp_path, monkeypatch, capsys):
    shutil.copytree(MLP, tmp_path / "model")
    arguments = ["--layer-residual", "0", "0.02", "--quantizers", "rtn", "dynamic", "--bits", "4", "2"]
    run(monkeypatch, tmp_path / "model" / "model.onnx", *arguments)
    exact, shifted = (rows(part) for part in capsys.readouterr().out.split("###")[1:])
    assert set(shifted) == {"float", "RTN int4 per channel", "RTN int2 per channel", "ORT dynamic"}
    # 0.02 in every layer: the outputs move by a few per cent, and int2 gains far more than that.
    assert 0.01 < shifted["float"][5] < 0.2
    assert shifted["RTN int2 per channel"][6] < 0.7
    assert shifted["RTN int2 per channel"][1] > shifted["RTN int2 per channel"][0] + 5
    # Without room there is next to no gain.
    assert exact["float"][5] < 1e-3
    assert exact["RTN int2 per channel"][6] > 0.8


def test_nothing_to_compare_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, MLP / "model.onnx")
    assert "--tolerance or --layer-residual" in capsys.readouterr().err
