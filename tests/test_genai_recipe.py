"""The comparison in GenAI: what it takes for granted of ONNX Runtime's quantizer, and its figures."""

import shutil
from pathlib import Path

import genai_recipe
import numpy as np
import onnx
import pytest

TRANSFORMER = Path(__file__).parents[1] / "models" / "digits_transformer" / "model.onnx"


def quantized(target, level):
    library = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer", reason="it needs onnx-ir")
    quantizer = library.MatMulNBitsQuantizer(
        onnx.load(TRANSFORMER), bits=4, block_size=32, is_symmetric=True, accuracy_level=level
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))
    return onnx.load(target)


def attributes(model):
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]


def test_the_accuracy_level_is_an_attribute_of_the_nodes_alone(tmp_path):
    before = quantized(tmp_path / "model.onnx", 0)
    genai_recipe.at_level(tmp_path / "model.onnx", 4)
    written, expected = onnx.load(tmp_path / "model-level4.onnx"), quantized(tmp_path / "four.onnx", 4)
    assert attributes(written) == attributes(expected) != attributes(before)
    assert list(written.graph.initializer) == list(expected.graph.initializer)


def test_a_float_model_has_no_accuracy_level(tmp_path):
    shutil.copy(TRANSFORMER, tmp_path)
    genai_recipe.at_level(tmp_path / "model.onnx", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_probabilities_add_up_to_one_however_large_the_logits():
    rows = np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32)
    found = np.exp(genai_recipe.log_softmax(rows))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(found[1], 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(found[0, 0] / found[0, 1], np.e, rtol=1e-3)
