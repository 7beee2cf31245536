"""A transformer encoder of the usual make, exported by torch in both ways, with ids, masks and token types as data."""

import importlib.util
import warnings
from collections import UserDict

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import onnx_optshift
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.write.patch import write_beside

WORDS, WIDTH, HEADS, INNER, LAYERS, LONGEST = 97, 32, 4, 64, 2, 24
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Of each layer: query, key, value and output of the attention, and two of the feed-forward network.
LINEAR = 6 * LAYERS
NEEDED = {"legacy": "onnx", "dynamo": "onnxscript"}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, state, bias):
        batch, length, _ = state.shape
        query, key, value = (
            layer(state).view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + bias, -1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, WIDTH)
        state = self.first(state + self.output(mixed))
        return self.second(state + self.down(nn.functional.gelu(self.up(state))))


class Encoder(nn.Module):
    """BERT's parts: embeddings of words, places and types, attention with a mask, the mean over tokens that count."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.types, self.norm = nn.Embedding(2, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids, attention_mask, token_type_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        state = self.norm(self.words(input_ids) + self.places(places) + self.types(token_type_ids))
        counts = attention_mask.to(state.dtype)
        bias = (1 - counts[:, None, None]) * torch.finfo(state.dtype).min
        for layer in self.layers:
            state = layer(state, bias)
        pooled = (state * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        return nn.functional.normalize(pooled, dim=-1)


def sentences(count, seed):
    """Ids with a beginning and an end, padded with zeros to one length, and the second half of another type."""
    rng = np.random.default_rng(seed)
    arrays = {name: np.zeros((count, LONGEST), np.int64) for name in INPUTS}
    for row, length in enumerate(rng.integers(6, LONGEST + 1, count)):
        # Few words, in a pattern: their states leave directions free, as those of a language do.
        arrays["input_ids"][row, :length] = [1, *rng.integers(3, 15, length - 2), 2]
        arrays["attention_mask"][row, :length] = 1
        arrays["token_type_ids"][row, length // 2 : length] = 1
    return arrays


@pytest.fixture(name="exported", scope="module", params=NEEDED)
def fixture_exported(request, tmp_path_factory):
    """(path of the model, path of its calibration data)."""
    if importlib.util.find_spec(NEEDED[request.param]) is None:
        pytest.skip(f"the exporter {request.param} of torch needs {NEEDED[request.param]}, which is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = Encoder().eval()
    data = sentences(120, seed=0)
    first = tuple(torch.from_numpy(data[name][:2]) for name in INPUTS)
    if request.param == "dynamo":
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", min=2, max=LONGEST)}
        options = {"dynamo": True, "dynamic_shapes": dict.fromkeys(INPUTS, free), "verbose": False}
    else:
        axes = {name: {0: "batch", 1: "sequence"} for name in INPUTS}
        options = {"dynamo": False, "dynamic_axes": axes, "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporters
        names = {"input_names": list(INPUTS), "output_names": ["pooled"]}
        torch.onnx.export(network, first, str(folder / "model.onnx"), **names, **options)
    np.savez(folder / "calibration.npz", **data)
    with torch.no_grad():
        expected = network(*(torch.from_numpy(data[name]) for name in INPUTS)).numpy()
    assert np.allclose(run(folder / "model.onnx", data), expected, atol=1e-5)
    return folder / "model.onnx", folder / "calibration.npz"


def run(path, arrays):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


def rounded(path, grid):
    model = ModelFile.load(path)
    weights, _ = discover(model, Selection())
    arrays = {w.name: round_initializer(model.initializer(w.name), w.form, grid) for w in weights}
    with write_beside(model, arrays, path.with_suffix(".rounded.onnx")) as written:
        written.commit()
    return path.with_suffix(".rounded.onnx")


def neighbours(vectors):
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(1)


def test_every_linear_layer_is_found(exported):
    weights, skips = discover(ModelFile.load(exported[0]), Selection())
    assert len(weights) == LINEAR
    assert sorted({(w.d, w.m) for w in weights}) == [(WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)]
    assert not [skip for skip in skips if skip.op_type in {"MatMul", "Gemm"}]


def test_what_a_tokenizer_gives_is_data(exported):
    """It is a dict by another name, often of 32-bit integers."""
    path, calibration = exported
    tokens = UserDict({name: array.astype(np.int32) for name, array in np.load(calibration).items()})
    found, same = (onnx_optshift.inspect(path, data).calibration for data in (tokens, calibration))
    assert found.fingerprint == same.fingerprint


def test_an_exact_shift_keeps_the_answers(exported, tmp_path):
    path, calibration = exported
    result = onnx_optshift.shift(path, calibration)
    assert result.report.verification.passed
    assert any("'attention_mask'" in line for line in result.report.decisions)
    assert sum(layer.status == "shifted" for layer in result.report.layers) > 0
    data = dict(np.load(calibration))
    before, after = run(path, data), run(result.save(tmp_path / "shifted.onnx"), data)
    # Unit vectors, one float32 rounding each of some thousand sums: far below what a nearest neighbour asks for.
    assert np.abs(before - after).max() < 1e-4
    assert (neighbours(before) == neighbours(after)).all()


def test_padding_is_free_to_hold_anything(exported, tmp_path):
    """The shifted model ignores what stands at masked positions, as the original does; at others it does not."""
    path, calibration = exported
    shifted = onnx_optshift.shift(path, calibration).save(tmp_path / "shifted.onnx")
    data = dict(np.load(calibration))
    other = {**data, "input_ids": np.where(data["attention_mask"] == 1, data["input_ids"], 50)}
    assert np.allclose(run(shifted, other), run(shifted, data), atol=1e-5)
    changed = {**data, "input_ids": np.where(data["attention_mask"] == 1, 50, data["input_ids"])}
    assert not np.allclose(run(shifted, changed), run(shifted, data), atol=1e-2)


def test_four_bits_of_few_sentences(exported, tmp_path):
    """Rounded to nearest, the shifted model is nearer to the original on sentences that it has not seen."""
    path, calibration = exported
    unseen = sentences(100, seed=1)
    reference = run(path, unseen)
    grid = Grid(3)
    plain = run(rounded(path, grid), unseen)
    result = onnx_optshift.shift(path, calibration, objective="range", tolerance="auto", quantization_bits=3)
    ours = run(rounded(result.save(tmp_path / "narrow.onnx"), grid), unseen)
    assert np.linalg.norm(ours - reference) < 0.8 * np.linalg.norm(plain - reference)
