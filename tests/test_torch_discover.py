"""Which weights of a module can be solved for, how each is read as rows @ V, and why the others are left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch_cases import relative

from onnx_optshift.capture.session import as_tensor
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.stats.rows import to_rows
from onnx_optshift.torch import shift_
from onnx_optshift.torch.arrays import as_array
from onnx_optshift.torch.discover import discover

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear of sequences": (nn.Linear(6, 4, bias=False), (5, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (5, 4, 12)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), bias=False), (5, 4, 7, 8)),
    "conv2d same": (nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(1, 2)), (5, 4, 7, 8)),
    "conv2d valid": (nn.Conv2d(4, 6, 3, padding="valid", groups=2), (5, 4, 7, 8)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4), (5, 4, 7, 8)),
    "conv2d of one image": (nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "conv3d": (nn.Conv3d(2, 4, 2, stride=2), (5, 2, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (5, 4, 6)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (5, 4, 6, 5)),
}


def read(module):
    """(tap, V `[g, d, m]`) of the only weight of a module."""
    found = discover(module)
    (weight,) = found.weights
    return weight, as_matrix(as_array(found.parameters[weight.name]), weight.form)


@pytest.mark.parametrize("case", [name for name in LAYERS if "transposed" not in name])
def test_rows_times_v_are_the_modules_outputs(case):
    module, shape = LAYERS[case]
    x = torch.randn(shape)
    weight, matrix = read(module)
    rows = to_rows(x[None] if case.endswith("one image") else x, weight.uses[0].tap).double()
    outputs = module(x).detach().double() - (0 if module.bias is None else _as_bias(module, module(x).ndim))
    axis = 0 if case.endswith("one image") else 1
    if isinstance(module, nn.Linear):
        expected = outputs.reshape(1, -1, weight.m)
    else:
        channels_last = outputs.movedim(axis, -1).reshape(-1, weight.groups, weight.m)
        expected = channels_last.transpose(0, 1)
    assert relative(rows @ matrix, expected) < 1e-6


def _as_bias(module, axes):
    bias = module.bias.detach().double()
    return bias if isinstance(module, nn.Linear) else bias.reshape(-1, *(1,) * (len(module.kernel_size)))


@pytest.mark.parametrize("case", LAYERS)
def test_every_kind_is_shifted_with_its_outputs_kept(case):
    module, shape = LAYERS[case]
    torch.manual_seed(1)
    module = copy.deepcopy(module)
    # Channels, or features, in pairs that cancel: half of the directions are met by no row.
    x = torch.randn(shape)
    axis = -1 if isinstance(module, nn.Linear) else len(shape) - 1 - len(module.kernel_size)
    half = x.narrow(axis, 0, shape[axis] // 2)
    x = torch.cat([half, -half], axis)
    if getattr(module, "groups", 1) == 2:
        x = torch.cat([half, half], axis)[:, [0, 0, 1, 1]]
    if getattr(module, "groups", 1) == 4:
        x = torch.randn(shape)[..., :1].expand(shape).contiguous()  # stripes: the columns of each patch are equal
    before, outputs = module.weight.detach().clone(), module(x)
    result = shift_(module, [x])
    assert [layer.status for layer in result.layers] == ["shifted"]
    assert module.weight.norm() < 0.99 * before.norm()
    assert relative(module(x), outputs) < 1e-6


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4))


def tied(first, second):
    second.weight = first.weight
    return nn.ModuleList([first, second])


SKIPPED = {
    "embedding": (nn.Embedding(5, 4), "looked up"),
    "lstm": (nn.LSTM(4, 3), "computed inside"),
    "attention": (nn.MultiheadAttention(8, 2), "inside a MultiheadAttention|computed inside"),
    "parametrized": (parametrizations.weight_norm(nn.Linear(4, 3)), "computed from other parameters"),
    "own forward": (Own(4, 3), "a forward of its own"),
    "padding mode": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
    "unknown": (Odd(), "Odd is not handled"),
    "bilinear": (nn.Bilinear(3, 4, 5), "Bilinear is not handled"),
    "lazy": (nn.LazyLinear(3), "no values yet"),
    "meta": (nn.Linear(4, 3, device="meta"), "no values yet"),
    "complex": (nn.Linear(4, 3, dtype=torch.complex64), "complex64"),
    "tied to an embedding": (tied(nn.Embedding(5, 4), nn.Linear(4, 5)), "share it: its rows are looked up"),
    "tied in other groups": (tied(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=2)), "in different ways"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_left_alone_says_why(case):
    import re

    module, words = SKIPPED[case]
    found = discover(module)
    assert not found.weights
    assert found.skips
    assert all(re.search(words, skip.reason) for skip in found.skips), [skip.reason for skip in found.skips]


class Tensorish(torch.Tensor):
    """As quantized weights come: a tensor of another class."""


def test_tensors_of_other_classes_are_left_alone():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tensorish))
    (skip,) = discover(layer).skips
    assert "Tensorish" in skip.reason


def test_a_shared_weight_is_one_problem_of_all_its_rows():
    torch.manual_seed(0)
    module = tied(nn.Linear(12, 12), nn.Linear(12, 12))
    model = nn.Sequential(module[0], nn.Tanh(), module[1])
    data = torch.randn(4, 12)
    outputs, before = model(data), model[0].weight.detach().clone()
    result = shift_(model, [data])
    (layer,) = result.layers
    assert layer.uses == ("0", "2")
    assert layer.rows == 8
    assert layer.rank == 8
    assert model[0].weight is model[2].weight
    assert relative(model(data), outputs) < 1e-5
    assert model[0].weight.norm() < before.norm()
    # Negative control: solved for the rows of one use alone, the other's outputs move.
    basis = torch.linalg.qr(data.double().T)[0]
    alone = before.double() @ basis @ basis.T
    model[0].weight.data.copy_(alone)
    assert relative(model(data), outputs) > 1e-2


def test_a_module_called_twice_counts_both_calls():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    (found,) = shift_(model, [torch.randn(3, 8)]).layers
    assert found.rows == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_come_back_as_they_were(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, dtype=dtype)
    assert torch.equal(as_tensor(as_array(layer.weight)), layer.weight)
    data = torch.randn(5, 32, dtype=dtype)
    outputs = layer(data).double()
    result = shift_(layer, [data])
    assert result.shifted
    assert layer.weight.dtype == dtype
    # Some roundings of the weight and of the sum: a few units of the dtype.
    assert relative(layer(data).double(), outputs) < 8 * torch.finfo(dtype).eps


def test_the_encoders_fast_path_does_not_hide_its_layers():
    """In eval mode torch runs the whole layer in one function, unless hooks are in place."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    data = torch.randn(1, 5, 8)
    outputs = model(data)
    result = shift_(model, [data])
    assert {layer.name for layer in result.shifted} == {"linear1.weight", "linear2.weight"}
    assert relative(model(data), outputs) < 1e-5
