"""Copies that stay on one smooth piece: equal at the centre, linear where every kink is frozen, and only there."""

import numpy as np
import onnxruntime
import pytest
import tiny_models
from onnx import TensorProto, helper, numpy_helper, parser

from onnx_optshift.errors import InputError
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.smooth_piece import CENTER, smooth_piece_model

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 6)).astype(np.float32)
W1, W2 = tiny_models.weight(6, 8, seed=1), tiny_models.weight(8, 3, seed=2)

# Each computes r from h [N, 8]; all are piecewise linear.
KINKS = {
    "Relu": "r = Relu(h)",
    "LeakyRelu": "r = LeakyRelu<alpha = 0.1>(h)",
    "PRelu": "r = PRelu(h, slope)",
    "Abs": "r = Abs(h)",
    "Clip": "r = Clip(h, low, high)",
    "Max": "r = Max(h, other)",
    "Min": "r = Min(other, h)",
    "MaxPool": (
        "image = Reshape(h, image_shape) pooled = MaxPool<kernel_shape = [2], strides = [1], pads = [0, 1]>(image) "
        "r = Reshape(pooled, flat_shape)"
    ),
    "GlobalMaxPool": (
        "image = Reshape(h, channel_shape) pooled = GlobalMaxPool(image) wide = Expand(pooled, wide_shape) "
        "r = Reshape(wide, flat_shape)"
    ),
    "two in a row": "a = Relu(h) b = Clip(a, low, high) r = Abs(b)",
}
CONSTANTS = {
    "slope": np.array([0.2, -0.3, 0.5, 2.0, 0.1, 0.0, 1.0, -1.0], np.float32),
    "low": np.array(-0.5, np.float32),
    "high": np.array(0.7, np.float32),
    "other": RNG.normal(size=8).astype(np.float32),
    "image_shape": np.array([0, 1, 8]),
    "channel_shape": np.array([0, 2, 4]),
    "wide_shape": np.array([1, 1, 4]),
    "flat_shape": np.array([0, 8]),
}


def model(kink, opset=17):
    text = f"g (float[N,6] x) => (float[N,3] y) {{ h = MatMul(x, W1) {kink} y = MatMul(r, W2) }}"
    used = {name: array for name, array in CONSTANTS.items() if name in kink}
    return tiny_models.model(text, {"W1": W1, "W2": W2, **used}, opset=opset)


def runner(proto):
    smooth = onnxruntime.InferenceSession(smooth_piece_model(ModelFile.load(proto), ["W1"]))
    return lambda moved, center=W1: smooth.run(None, {"x": X, "W1": moved, f"W1{CENTER}": center})[0]


def original(proto, moved):
    copy = type(proto)()
    copy.CopyFrom(proto)
    next(t for t in copy.graph.initializer if t.name == "W1").CopyFrom(numpy_helper.from_array(moved, "W1"))
    return onnxruntime.InferenceSession(copy.SerializeToString()).run(None, {"x": X})[0]


@pytest.mark.parametrize("name", KINKS)
def test_equal_at_any_centre_and_linear_around_it(name):
    proto = model(KINKS[name])
    run = runner(proto)
    step = tiny_models.weight(6, 8, seed=9)
    np.testing.assert_allclose(run(W1), original(proto, W1), atol=1e-6)
    # One copy serves every centre: its weights are inputs too.
    np.testing.assert_allclose(run(W1 + step, W1 + step), original(proto, W1 + step), atol=1e-6)
    # float32: six products of about 1, each off by half a unit in the last place.
    np.testing.assert_allclose(run(W1 + step) + run(W1 - step), 2 * run(W1), atol=2e-5)
    bent = original(proto, W1 + step) + original(proto, W1 - step) - 2 * original(proto, W1)
    assert np.abs(bent).max() > 0.1, "the original has kinks here, or this proves nothing"


@pytest.mark.parametrize("name", KINKS)
def test_slopes_are_the_original_s(name):
    proto = model(KINKS[name])
    run = runner(proto)
    step = 1e-3 * tiny_models.weight(6, 8, seed=9)
    close = min(1.0, float(np.abs(X @ W1).min()))
    assert close > 0
    moved = original(proto, W1 + step) - original(proto, W1 - step)
    np.testing.assert_allclose(run(W1 + step) - run(W1 - step), moved, atol=2e-3 * np.abs(moved).max())


def test_smooth_curvature_stays():
    proto = model("r = Tanh(h)")
    run = runner(proto)
    step = tiny_models.weight(6, 8, seed=9)
    np.testing.assert_allclose(run(W1 + step), original(proto, W1 + step), atol=1e-6)


def test_what_lies_before_every_weight_is_computed_once():
    text = "g (float[N,6] x) => (float[N,3] y) { a = Relu(x) h = MatMul(a, W1) r = Relu(h) y = MatMul(r, W2) }"
    proto = tiny_models.model(text, {"W1": W1, "W2": W2})
    copy = type(proto).FromString(smooth_piece_model(ModelFile.load(proto), ["W1"]))
    outputs = [name for node in copy.graph.node for name in node.output]
    assert f"h{CENTER}" in outputs
    assert f"a{CENTER}" not in outputs


def test_values_that_a_branch_takes_from_outside_are_renamed_in_it():
    relu = parser.parse_graph("then () => (float[N,8] t) { t = Relu(h) }")
    other = parser.parse_graph("else () => (float[N,8] e) { e = Identity(h) }")
    proto = model("r = Relu(h)")
    del proto.graph.node[1]
    branch = helper.make_node("If", ["yes"], ["r"], then_branch=relu, else_branch=other)
    proto.graph.node.insert(1, branch)
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    run = runner(proto)
    other_center = tiny_models.weight(6, 8, seed=4)
    # The branch's own kink is not frozen, but what the copy takes in is the centre's.
    np.testing.assert_allclose(run(W1, other_center), original(proto, W1), atol=1e-6)


def test_an_unknown_weight_is_named():
    with pytest.raises(InputError, match="no initializer 'W3'"):
        smooth_piece_model(ModelFile.load(model("r = Relu(h)")), ["W3"])
