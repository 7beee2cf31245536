"""`shift_` in place: the weights that the pass finds, the least norm there is, and nothing by halves."""

import copy
import warnings

import pytest
import torch
from onnx import numpy_helper
from reference import exact_shift
from torch import nn
from torch_cases import classifier, images, relative, same, weights

import onnx_optshift
from onnx_optshift.errors import InputError, ToleranceError
from onnx_optshift.torch import ShiftConfig, shift_

# What a float32 weight is rounded to: half a unit in the last place.
UNIT = 2.0**-24


def by_the_pass(model, data, path, **choices):
    """A model's parameters after export and the pass, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporters
        names = {"input_names": ["images"], "output_names": ["scores"]}
        axes = {"images": {0: "batch"}}
        torch.onnx.export(copy.deepcopy(model), (data[:2],), str(path), dynamo=False, dynamic_axes=axes, **names)
    result = onnx_optshift.shift(path, {"images": data.numpy()}, heldout="none", **choices)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}


def statuses(result):
    return {layer.name: layer.status for layer in result.layers}


def test_it_finds_the_weights_that_the_pass_finds(tmp_path):
    model, data, _ = classifier()
    before = weights(model)
    expected = by_the_pass(model, data, tmp_path / "model.onnx")
    result = shift_(model, data.split(7))
    assert statuses(result) == {
        "stem.weight": "shifted",
        "grouped.weight": "unchanged",
        "hidden.weight": "shifted",
        "head.weight": "shifted",
    }
    for layer in result.layers:
        assert relative(model.get_parameter(layer.name), expected[layer.name]) < 1e-6, layer.name
    # Negative control: the pass has moved what is compared, by far more than that.
    for layer in result.shifted:
        assert relative(before[layer.name], expected[layer.name]) > 1e-2
    assert not same(before, weights(model))


def test_within_a_tolerance_of_each_layer_it_finds_what_the_solver_finds(tmp_path):
    """The pass takes one residual for all layers; given the one that it took, the weights are the same."""
    model, data, _ = classifier()
    path = tmp_path / "model.onnx"
    by_the_pass(model, data, path)
    found = onnx_optshift.shift(
        path, {"images": data.numpy()}, heldout="none", tolerance=0.05, row_weighting="none", recapture="none"
    )
    residual = next(layer.tolerance for layer in found.report.layers if layer.status == "shifted")
    result = shift_(model, [data], ShiftConfig(tolerance=residual, tolerance_of="layers", row_weighting="none"))
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.model.graph.initializer}
    assert len(result.shifted) == 4
    for layer in result.shifted:
        assert relative(model.get_parameter(layer.name), expected[layer.name]) < 1e-5, layer.name


def test_outputs_stay_and_no_smaller_weight_has_them():
    model, data, _ = classifier()
    original = copy.deepcopy(model)
    outputs = model(data)
    inputs = {}
    for name in ("hidden", "head"):
        layer = original.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    original(data)
    result = shift_(model, [data])
    # Each layer's outputs move by some units; the head's sums of 48 and four layers before it make less than 100.
    assert relative(model(data), outputs) < 100 * UNIT
    assert result.deviation < 100 * UNIT
    for name, rows in inputs.items():
        before = original.get_submodule(name).weight.detach().double().numpy()
        (expected,) = exact_shift(rows.double().numpy()[None], before.T[None])
        assert relative(model.get_submodule(name).weight, expected.T) < 1e-6


def test_figures_are_those_of_the_weights():
    model, data, _ = classifier()
    before = weights(model)
    for layer in shift_(model, [data]).layers:
        old, new = before[layer.name].double(), model.get_parameter(layer.name).detach().double()
        assert layer.norm_before == pytest.approx(float(old.norm()), rel=1e-6)
        assert layer.norm_after == pytest.approx(float(new.norm()), rel=1e-6)
        assert layer.range_after == pytest.approx(float(new.abs().max()), rel=1e-6)
        assert layer.norm_after <= layer.norm_before
        assert layer.rank <= layer.d
        assert layer.rows in {30, 30 * 16}
        assert layer.measured_residual < 4 * UNIT


def test_a_second_time_there_is_nothing_to_gain():
    model, data, _ = classifier()
    assert shift_(model, [data]).shifted
    before = weights(model)
    assert not shift_(model, [data]).shifted
    assert same(before, weights(model))


def test_rows_are_taken_only_while_they_leave_a_layer_freedom():
    """The stem's patches never span all directions, so the pass goes on for it alone; nothing else changes by that."""
    model, _, _ = classifier()
    data = images(400)
    whole = copy.deepcopy(model)
    rows = {layer.name: layer.rows for layer in shift_(model, data.split(40)).layers}
    shift_(whole, [data])
    assert rows["stem.weight"] == 400 * 16
    assert rows["grouped.weight"] < 400 * 16
    assert all(relative(value, weights(whole)[name]) < 1e-6 for name, value in weights(model).items())


@pytest.mark.parametrize("objective", ["norm", "range"])
def test_a_tolerance_is_that_of_the_models_outputs(objective):
    model, data, _ = classifier()
    outputs = model(data)
    result = shift_(model, data.split(8), ShiftConfig(tolerance=0.02, objective=objective))
    assert result.shifted
    moved = relative(model(data), outputs)
    assert 0.5 * 0.02 < moved <= 0.02
    assert result.deviation == pytest.approx(moved, rel=1e-3)


def test_the_stochastic_form_is_exact_on_a_batch_of_all_classes():
    model, data, labels = classifier()
    original = copy.deepcopy(model)
    result = shift_(model, [(data, labels)], ShiftConfig(stochastic=10))
    assert {layer.rows for layer in result.layers} == {10, 160}
    moved = (model(data) - original(data)).norm(dim=1) / original(data).norm(dim=1)
    kept = moved < 1e-5
    assert kept.sum() == 10
    assert sorted(labels[kept].tolist()) == sorted([0, 1, 2, 3, 4] * 2)
    assert result.deviation > 1e-3  # over all samples
    with pytest.raises(InputError, match="5 classes"):
        shift_(model, [(data, labels)], ShiftConfig(stochastic=4))


def test_its_mode_its_statistics_and_gradients_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 3))
    model[1].eval()
    data = torch.randn(8, 6)
    state = copy.deepcopy(dict(model[1].named_buffers()))
    model(data).sum().backward()
    gradient = model[0].weight.grad.clone()
    assert shift_(model, [data]).shifted
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model[1].named_buffers())
    assert torch.equal(gradient, model[0].weight.grad)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Failing(nn.Module):
    def forward(self, _):
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], InputError, "no batch"),
        (iter(()), InputError, "no batch"),
        (images(), InputError, r"For a single batch give \[batch\]"),
        ([(images(), 1, 2)], InputError, "forward requires 1"),
        ([images()[:, :1]], InputError, "Check the model's inputs"),
        ([images(), images()[0, 0, 0]], InputError, "Check the model's inputs"),
    ],
)
def test_what_cannot_be_used_leaves_the_model_as_it_was(data, error, words):
    model, _, _ = classifier()
    before = weights(model)
    with pytest.raises(error, match=words):
        shift_(model.train(), data)
    assert same(before, weights(model))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failure_in_the_middle_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 20), Failing()).train()
    before = weights(model)
    with pytest.raises(RuntimeError, match="no such thing"):
        shift_(model, [torch.randn(3, 6)])
    assert same(before, weights(model))
    assert model.training


def test_inputs_that_are_not_finite_move_nothing():
    model, data, _ = classifier()
    before = weights(model)
    data[3, 0, 0, 0] = torch.nan
    result = shift_(model, [data])
    assert set(statuses(result).values()) == {"skipped"}
    assert all("NaN" in layer.reason for layer in result.layers)
    assert same(before, weights(model))


def test_a_weight_that_is_used_elsewhere_is_noticed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(x) + torch.ones(12) @ self.layer.weight

    torch.manual_seed(0)
    model = Twice()
    before = weights(model)
    with pytest.raises(ToleranceError, match="outside its own module"):
        shift_(model, [torch.randn(4, 12)])
    assert same(before, weights(model))


@pytest.mark.parametrize(
    "choices",
    [
        {"tolerance": "auto"},
        {"tolerance": -1},
        {"objective": "curvature"},
        {"tolerance_of": "model"},
        {"stochastic": 0},
        {"stochastic": 8, "tolerance": 0.1},
        {"row_weighting": "some"},
        {"range_block": 32},
        {"verify": 1},
    ],
)
def test_choices_that_mean_nothing_are_refused(choices):
    with pytest.raises(InputError):
        ShiftConfig(**choices)


def test_filter_fn_chooses():
    model, data, _ = classifier()
    result = shift_(model, [data], filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "head")
    assert [layer.name for layer in result.shifted] == ["hidden.weight"]
    assert statuses(result)["head.weight"] == "skipped"
    with pytest.raises(InputError, match="left out by filter_fn"):
        shift_(model, [data], filter_fn=lambda *_: False)


def test_importing_it_loads_no_runtime_and_the_package_does_not_load_torch():
    import subprocess
    import sys

    code = (
        "import sys, onnx_optshift; print('torch' in sys.modules); import onnx_optshift.torch; "
        "print(onnx_optshift.torch.shift_.__module__, 'onnxruntime' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "onnx_optshift.torch.shifting", "False"]
