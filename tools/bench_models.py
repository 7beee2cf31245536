"""The models that the benchmarks run on: seeded, written with their data into a folder of the caller's.

Weights are random, but drawn so that the inputs of the layers have the ranks that trained models show: activations keep
their size through the depth, layer normalizations have scales and offsets of their own (or their outputs would all
miss one direction), images have the spectrum of photographs, and words are as unequally frequent as in texts.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from digits_networks import GraphWriter
from numpy.typing import NDArray
from onnx import TensorProto

HEAD_WIDTH = 64
ZIPF_EXPONENT = 1.2


class Random(GraphWriter):
    """A graph whose weights are drawn as nodes are added."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def normal(self, name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> str:
        """An initializer of independent normal entries, float32."""
        values = mean + deviation * self.rng.standard_normal(shape, dtype=np.float32)
        return self.tensor(name, values.astype(np.float32))

    def linear(self, x: str, name: str, d: int, m: int, gain: float = 1.0) -> str:
        """`x W + b`, W `[d, m]`; rows of unit variance come out with variance gain²."""
        product = self.node("MatMul", [x, self.normal(f"{name}.weight", (d, m), gain / math.sqrt(d))], f"{name}.matmul")
        return self.node("Add", [product, self.normal(f"{name}.bias", (m,), 0.1)], name)

    def norm(self, x: str, name: str, width: int) -> str:
        """Layer normalization with scales and offsets as trained ones have them."""
        parameters = [self.normal(f"{name}.scale", (width,), 0.2, 1.0), self.normal(f"{name}.bias", (width,), 0.2)]
        return self.node("LayerNormalization", [x, *parameters], name, axis=-1)

    def convolution(self, x: str, name: str, channels: int, filters: int, kernel: int, stride: int = 1) -> str:
        """A square Conv with bias whose outputs have about the variance of its inputs after a ReLU."""
        deviation = math.sqrt(2 / (channels * kernel**2))
        weight = self.normal(f"{name}.weight", (filters, channels, kernel, kernel), deviation)
        inputs = [x, weight, self.normal(f"{name}.bias", (filters,), 0.1)]
        return self.node("Conv", inputs, name, strides=[stride] * 2, pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2)


def encoder(
    folder: Path, samples: int, *, width: int = 384, layers: int = 6, tokens: int = 128, vocabulary: int = 8192
) -> None:
    """A sentence encoder: `layers` blocks, MLPs four times as wide, the mean over tokens as output; words by Zipf."""
    graph = Random(0)
    heads = max(1, width // HEAD_WIDTH)
    graph.tensor("heads.shape", np.array([0, 0, heads, width // heads], np.int64))
    graph.tensor("width.shape", np.array([0, 0, width], np.int64))
    constants = {"scale": math.sqrt(heads / width), "root": 1 / math.sqrt(2), "one": 1.0, "half": 0.5}
    for name, value in constants.items():
        graph.tensor(name, np.array(value, np.float32))
    x = graph.node("Gather", [graph.normal("embed.weight", (vocabulary, width), 1.0), "ids"], "embed")
    x = graph.node("Add", [x, graph.normal("position.weight", (tokens, width), 0.3)], "embedded")
    for layer in range(layers):
        x = _block(graph, x, f"layers.{layer}", width, 1 / math.sqrt(2 * layers))
    x = graph.norm(x, "norm", width)
    graph.node("ReduceMean", [x], "embedding", axes=[1], keepdims=0)
    frequency = np.arange(1, vocabulary + 1) ** -ZIPF_EXPONENT
    ids = np.random.default_rng(1).choice(vocabulary, (samples, tokens), p=frequency / frequency.sum())
    inputs, outputs = ("ids", TensorProto.INT64, ["batch", tokens]), ("embedding", TensorProto.FLOAT, ["batch", width])
    _write(folder, graph.model("encoder", inputs, outputs), {"ids": ids})


def _block(graph: Random, x: str, name: str, width: int, gain: float) -> str:
    normed = graph.norm(x, f"{name}.norm1", width)
    parts = {}
    for part in "qkv":
        made = graph.linear(normed, f"{name}.{part}", width, width)
        split = graph.node("Reshape", [made, "heads.shape"], f"{name}.{part}.split")
        order = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        parts[part] = graph.node("Transpose", [split], f"{name}.{part}.heads", perm=order)
    scores = graph.node(
        "Mul", [graph.node("MatMul", [parts["q"], parts["k"]], f"{name}.qk"), "scale"], f"{name}.scaled"
    )
    mixed = graph.node(
        "MatMul", [graph.node("Softmax", [scores], f"{name}.shares", axis=-1), parts["v"]], f"{name}.mixed"
    )
    back = graph.node("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
    joined = graph.node("Reshape", [back, "width.shape"], f"{name}.joined")
    x = graph.node("Add", [x, graph.linear(joined, f"{name}.o", width, width, gain)], f"{name}.attended")
    up = graph.linear(graph.norm(x, f"{name}.norm2", width), f"{name}.up", width, 4 * width)
    curve = graph.node("Erf", [graph.node("Mul", [up, "root"], f"{name}.by_root")], f"{name}.erf")
    half = graph.node("Mul", [graph.node("Mul", [up, "half"], f"{name}.half"), curve], f"{name}.curved")
    active = graph.node("Add", [half, graph.node("Mul", [up, "half"], f"{name}.half2")], f"{name}.gelu")
    down = graph.linear(active, f"{name}.down", 4 * width, width, math.sqrt(2) * gain)
    return graph.node("Add", [x, down], f"{name}.out")


def residual_network(
    folder: Path, samples: int, *, widths: tuple[int, ...] = (16, 32, 64, 128), side: int = 32
) -> None:
    """ResNet-18 at a quarter of its widths, for images of CIFAR's size: normalizations are fused."""
    graph = Random(0)
    x = graph.node("Relu", [graph.convolution("image", "stem", 3, widths[0], 3)], "stem.relu")
    channels = widths[0]
    for stage, filters in enumerate(widths):
        for block in range(2):
            name, stride = f"stage{stage}.{block}", 2 if stage and not block else 1
            y = graph.node(
                "Relu", [graph.convolution(x, f"{name}.conv1", channels, filters, 3, stride)], f"{name}.relu1"
            )
            y = graph.convolution(y, f"{name}.conv2", filters, filters, 3)
            if stride > 1 or channels != filters:
                x = graph.convolution(x, f"{name}.shortcut", channels, filters, 1, stride)
            x = graph.node("Relu", [graph.node("Add", [x, y], f"{name}.sum")], f"{name}.relu2")
            channels = filters
    pooled = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pool")], "flat", axis=1)
    logits = graph.linear(pooled, "logits", channels, 10)
    inputs = ("image", TensorProto.FLOAT, ["batch", 3, side, side])
    _write(
        folder,
        graph.model("resnet", inputs, (logits, TensorProto.FLOAT, ["batch", 10])),
        {"image": photographs(samples, side)},
    )


def photographs(samples: int, side: int) -> NDArray[np.float32]:
    """Random images `[samples, 3, side, side]` whose amplitudes fall as 1/f, with correlated colours."""
    rng = np.random.default_rng(1)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    noise = np.fft.rfft2(rng.standard_normal((samples, 3, side, side))) / frequency
    images = np.fft.irfft2(noise, (side, side))
    mixing = np.array([[1.0, 0.3, 0.0], [1.0, 0.0, 0.3], [1.0, -0.3, 0.1]])
    images = np.einsum("ck,nkyx->ncyx", mixing, images)
    return (images / images.std()).astype(np.float32)


def wide_mlp(folder: Path, samples: int, *, features: int = 1024, width: int = 4096) -> None:
    """Two hidden layers of one width; inputs are correlated, and one in eight is never used, as pixels at edges."""
    graph = Random(0)
    x = graph.node("Relu", [graph.linear("x", "fc1", features, width, math.sqrt(2))], "relu1")
    x = graph.node("Relu", [graph.linear(x, "fc2", width, width, math.sqrt(2))], "relu2")
    logits = graph.linear(x, "logits", width, 10)
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((64, features)) / 8
    data = rng.standard_normal((samples, 64)) @ factors + 0.3 * rng.standard_normal((samples, features))
    data[:, ::8] = 0
    inputs, outputs = ("x", TensorProto.FLOAT, ["batch", features]), (logits, TensorProto.FLOAT, ["batch", 10])
    _write(folder, graph.model("mlp", inputs, outputs), {"x": data.astype(np.float32)})


def _write(folder: Path, model: onnx.ModelProto, data: dict[str, NDArray[np.generic]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "calibration.npz", **data)


MODELS: dict[str, Callable[..., None]] = {"encoder": encoder, "cnn": residual_network, "mlp": wide_mlp}


def main() -> None:
    """Writes `model.onnx` and `calibration.npz` of one model: NAME FOLDER SAMPLES [SIZES as JSON]."""
    name, folder, samples, *sizes = sys.argv[1:]
    MODELS[name](Path(folder), int(samples), **json.loads(sizes[0] if sizes else "{}"))


if __name__ == "__main__":
    main()
