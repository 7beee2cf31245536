"""Calibration data goes both ways between this package and ONNX Runtime's quantizers, and files keep what they need."""

import copy
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from score import Judge, read_arrays

import onnx_optshift
from onnx_optshift.integrations.onnxruntime import calibration_reader

quantization = pytest.importorskip("onnxruntime.quantization", reason="its quantizers need onnx-ir")
MODELS = Path(__file__).parents[1] / "models"
MLP, TRANSFORMER = MODELS / "digits_mlp", MODELS / "digits_transformer"
PIXELS = read_arrays(MLP / "calibration.npz")["pixels"]
FILE = str(MLP / "calibration.npz")
GRID = {"objective": "range", "tolerance": "auto", "quantization_bits": 4, "range_block": 32, "device": "cpu"}


class Rows(quantization.CalibrationDataReader):
    """A reader as ONNX Runtime's users write them."""

    def __init__(self, rows):
        self._left = iter(rows)

    def get_next(self):
        row = next(self._left, None)
        return None if row is None else {"pixels": row[None]}


def rows_of(reader):
    return [batch["pixels"] for batch in reader]


def test_a_reader_gives_every_sample_once_without_labels():
    reader = calibration_reader(MLP / "model.onnx", FILE)
    assert isinstance(reader, quantization.CalibrationDataReader)
    assert len(reader) == len(PIXELS)
    first = reader.get_next()
    assert list(first) == ["pixels"]
    rest = rows_of(reader)
    assert reader.get_next() is None
    np.testing.assert_array_equal(np.concatenate([first["pixels"], *rest]), PIXELS)
    reader.rewind()
    np.testing.assert_array_equal(reader.get_next()["pixels"], PIXELS[:1])


def test_data_is_looked_for_beside_the_model_and_may_be_arrays():
    beside = rows_of(calibration_reader(MLP / "model.onnx", max_samples=7))
    given = rows_of(calibration_reader(onnx.load(MLP / "model.onnx"), {"pixels": PIXELS[:7]}))
    np.testing.assert_array_equal(np.concatenate(beside), PIXELS[:7])
    np.testing.assert_array_equal(np.concatenate(given), PIXELS[:7])
    with pytest.raises(onnx_optshift.InputError, match="no calibration data"):
        calibration_reader(onnx.load(MLP / "model.onnx"))


def test_batches_ranges_and_copies():
    reader = calibration_reader(MLP / "model.onnx", FILE, batch_size=32, max_samples=100)
    assert len(reader) == 4
    assert [len(rows) for rows in rows_of(reader)] == [32, 32, 32, 4]
    reader.set_range(1, 3)
    reader.get_next()
    copied = copy.deepcopy(reader)  # as ONNX Runtime's SmoothQuant and GPTQ do
    np.testing.assert_array_equal(np.concatenate(rows_of(reader)), PIXELS[64:96])
    np.testing.assert_array_equal(np.concatenate(rows_of(copied)), PIXELS[:100])


@pytest.mark.parametrize("method", ["MinMax", "Entropy"])
def test_static_quantization_makes_the_same_of_our_reader(tmp_path, method):
    files = []
    for name, reader in (
        ("ours", calibration_reader(MLP / "model.onnx", FILE, max_samples=50)),
        ("theirs", Rows(PIXELS[:50])),
        ("fewer", Rows(PIXELS[:3])),  # negative control: the data does make a difference
    ):
        files.append(tmp_path / f"{name}.onnx")
        calibrator = getattr(quantization.CalibrationMethod, method)
        quantization.quantize_static(MLP / "model.onnx", files[-1], reader, calibrate_method=calibrator)
    ours, theirs, fewer = (path.read_bytes() for path in files)
    assert ours == theirs
    assert ours != fewer


def test_strided_calibration_uses_the_range_of_our_reader(tmp_path):
    reader = calibration_reader(MLP / "model.onnx", FILE, max_samples=30)
    target = tmp_path / "strided.onnx"
    quantization.quantize_static(
        MLP / "model.onnx", target, reader, extra_options={"CalibStridedMinMax": 10, "CalibTensorRangeSymmetric": True}
    )
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(target).graph.node}


def test_a_reader_of_onnxruntime_is_calibration_data():
    theirs = onnx_optshift.shift(MLP / "model.onnx", Rows(PIXELS[:200]), device="cpu")
    reader = calibration_reader(MLP / "model.onnx", FILE, max_samples=200)
    ours = onnx_optshift.shift(MLP / "model.onnx", reader, device="cpu")
    assert theirs.report.calibration.samples == 200
    assert theirs.model == ours.model
    assert theirs.model != onnx.load(MLP / "model.onnx")


def warns(caplog, path, target):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        quantization.quantize_static(path, target, Rows(PIXELS[:20]))
    return "pre-processing" in caplog.text


def test_preprocessing_before_and_after(tmp_path, caplog):
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = MLP / "model.onnx"
    before, shifted, late = (tmp_path / f"{name}.onnx" for name in ("before", "shifted", "late"))
    quant_pre_process(model, before)
    onnx_optshift.shift(before, FILE, device="cpu").save(shifted)
    # Everything but weights is as the pre-processing left it, its mark in the metadata too.
    old, new = onnx.load(before), onnx.load(shifted)
    assert [p.key for p in new.metadata_props] == [p.key for p in old.metadata_props] != []
    assert list(new.graph.node) == list(old.graph.node)
    assert list(new.graph.initializer) != list(old.graph.initializer)
    assert not warns(caplog, shifted, tmp_path / "int8.onnx")
    assert warns(caplog, model, tmp_path / "int8.onnx")  # negative control: what was not pre-processed
    onnx_optshift.shift(model, FILE, device="cpu").save(tmp_path / "first.onnx")
    quant_pre_process(tmp_path / "first.onnx", late)
    assert not warns(caplog, late, tmp_path / "int8.onnx")
    weights = [{t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer} for p in (shifted, late)]
    for name in ("fc1.weight", "fc2.weight"):
        np.testing.assert_array_equal(weights[0][name], weights[1][name])


def test_matmulnbits_in_our_blocks_comes_out_closer_at_every_accuracy_level(tmp_path):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    original = onnx.load(TRANSFORMER / "model.onnx")
    shifted = onnx_optshift.shift(TRANSFORMER / "model.onnx", str(TRANSFORMER / "calibration.npz"), **GRID).model
    judge = Judge(TRANSFORMER / "model.onnx", read_arrays(TRANSFORMER / "heldout.npz"))
    for level in (0, 4):
        errors = []
        for model in (original, shifted):
            copied = onnx.ModelProto.FromString(model.SerializeToString())
            quantizer = MatMulNBitsQuantizer(copied, bits=4, block_size=32, is_symmetric=True, accuracy_level=level)
            quantizer.process()
            quantizer.model.save_model_to_file(str(tmp_path / "int4.onnx"))
            errors.append(judge.score(tmp_path / "int4.onnx").error)
        assert errors[1] < 0.6 * errors[0]
