"""Rows that the model ignores: found by trying, left out of statistics, and outputs compared elsewhere."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_optshift
from onnx_optshift.errors import InputError

WIDTH, LENGTH = 12, 6


def model(*, masks=True, pooled=True):
    """Token features through a linear layer; pooled over the positions that a mask keeps, or over all."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((WIDTH, 5)).astype(np.float32), "w")
    axes = numpy_helper.from_array(np.array([1]), "axes")
    last = numpy_helper.from_array(np.array([2]), "last")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"]),
        helper.make_node("Mul", ["h", "m3"], ["kept"]) if masks else helper.make_node("Add", ["h", "m3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axes"], ["y"], keepdims=0)
        if pooled
        else helper.make_node("ReduceMean", ["kept"], ["mean"], axes=[1], keepdims=1),
    ]
    if not pooled:
        nodes.append(helper.make_node("Add", ["h", "mean"], ["y"]))
    shape = ["b", 5] if pooled else ["b", LENGTH, 5]
    graph = helper.make_graph(
        nodes,
        "masked",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", LENGTH, WIDTH]),
            helper.make_tensor_value_info("kind", TensorProto.INT64, ["b", LENGTH]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", LENGTH]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight, axes, last],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data(samples=40, rank=4):
    """Real tokens lie in few directions, padding in all of them; `kind` is 0 and 1 and masks nothing."""
    rng = np.random.default_rng(1)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH, samples)[:, None]).astype(np.int64)
    real = rng.standard_normal((samples, LENGTH, rank)) @ rng.standard_normal((rank, WIDTH))
    x = np.where(mask[..., None] == 1, real, rng.standard_normal((samples, LENGTH, WIDTH)))
    kind = (np.arange(LENGTH) % 2 == rng.integers(0, 2, samples)[:, None]).astype(np.int64)
    return {"x": x.astype(np.float32), "kind": kind, "attention_mask": mask}


def layer(result):
    (found,) = [layer for layer in result.report.layers if layer.weight == "w"]
    return found


@pytest.mark.parametrize("pooled", [True, False])
def test_masked_rows_cost_no_freedom(pooled):
    found = onnx_optshift.shift(model(pooled=pooled), data(), heldout="none")
    assert layer(found).rank == 4
    assert layer(found).rows == data()["attention_mask"].sum()
    assert found.report.verification.passed
    assert any("'attention_mask'" in note for note in found.report.decisions)
    # Outputs at the positions that count are the same, by an independent look.
    before, after = (numpy_helper.to_array(m.graph.initializer[0]) for m in (model(pooled=pooled), found.model))
    x, mask = data()["x"], data()["attention_mask"] == 1
    assert float(np.abs(after - before).max()) > 0.05
    np.testing.assert_allclose(x[mask] @ after, x[mask] @ before, atol=1e-4)
    assert np.abs(x[~mask] @ (after - before)).max() > 0.1  # negative control: elsewhere they are not
    whole = onnx_optshift.shift(model(pooled=pooled), data(), heldout="none", row_mask="none")
    assert layer(whole).rank == WIDTH
    assert WIDTH < layer(whole).rows <= mask.size  # once they span, no more are captured


def test_an_input_of_zeros_and_ones_that_masks_nothing_is_not_used():
    found = onnx_optshift.shift(model(masks=False), data(), heldout="none")
    assert layer(found).rank == WIDTH
    assert not any("left out" in note for note in found.report.decisions)


@pytest.mark.parametrize(
    ("name", "words"),
    [("kind", "outputs change"), ("x", "not \\[batch, positions\\]"), ("mask", "no input of the model")],
)
def test_what_is_named_must_mask(name, words):
    with pytest.raises(InputError, match=words):
        onnx_optshift.shift(model(), data(), heldout="none", row_mask=name)


def test_where_positions_are_treated_apart_a_mask_must_be_named():
    apart = model(pooled=False)
    apart.graph.node[-1].input[1] = "h"  # no position sees another: any input of 0 and 1 would pass
    assert layer(onnx_optshift.shift(apart, data(), heldout="none")).rank == WIDTH
    assert layer(onnx_optshift.shift(apart, data(), heldout="none", row_mask="attention_mask")).rank == 4


def test_a_mask_may_be_named():
    found = onnx_optshift.shift(model(), data(), heldout="none", row_mask="attention_mask")
    assert layer(found).rank == 4


def test_the_written_model_is_checked():
    onnx.checker.check_model(model())
