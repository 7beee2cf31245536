"""Writes a decoder-like transformer of any size as ONNX with external data, and calibration data for it.

    python tools/make_transformer.py --out DIR [--gigabytes 2.5] [--width 2048] [--layers N] [--vocabulary 32000]

`DIR` gets `model.onnx`, `model.onnx.data` and `calibration.npz`. The weights are random, scaled so that activations
keep their size through any number of layers; the model stands for the shape and the size of a language model, not for
what one knows. Weights are drawn and written one by one: the largest of them is all that memory has to hold. The same
seed and sizes give the same files.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from digits_networks import GraphWriter
from onnx import TensorProto
from torch import nn

# The ONNX specification asks for offsets at multiples of the page size, so that tensors can be mapped.
ALIGNMENT = 4096
HEAD_WIDTH = 64
MLP_FACTOR = 4
# Words of a text follow Zipf's law: few are frequent, most are rare.
ZIPF_EXPONENT = 1.2


@dataclass(frozen=True)
class Sizes:
    """The shape of the model.

    Attributes:
        width: Features per token; a multiple of 2.
        layers: Transformer blocks.
        vocabulary: Token ids.
        tokens: Length of a sequence; fixed.
    """

    width: int
    layers: int
    vocabulary: int
    tokens: int

    @property
    def heads(self) -> int:
        """Attention heads, as near to `HEAD_WIDTH` features each as the width allows."""
        return math.gcd(self.width, max(1, self.width // HEAD_WIDTH))

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, float32."""
        block = (4 + 2 * MLP_FACTOR) * self.width**2
        return 4 * (self.layers * block + (2 * self.vocabulary + self.tokens) * self.width)


class Writer(GraphWriter):
    """A graph that grows node by node while its large weights go straight to the data file.

    Args:
        file: The data file.
        location: Its name, as the model refers to it.
        seed: Of the weights.
    """

    def __init__(self, file: BinaryIO, location: str, seed: int) -> None:
        super().__init__()
        self.file, self.location, self.rng = file, location, np.random.default_rng(seed)

    def normal(self, name: str, shape: tuple[int, ...], deviation: float) -> str:
        """An external float32 initializer of independent normal entries."""
        array = self.rng.standard_normal(shape, dtype=np.float32)
        array *= np.float32(deviation)
        offset = self.file.seek(-(-self.file.tell() // ALIGNMENT) * ALIGNMENT)
        self.file.write(array.reshape(-1).view(np.uint8).data)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", str(offset)), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        return name

    def linear(self, x: str, name: str, d: int, m: int, gain: float = 1.0) -> str:
        """`x W`, with W `[d, m]` such that rows of unit variance come out with variance `gain²`."""
        weight = self.normal(f"{name}.weight", (d, m), gain / math.sqrt(d))
        return self.node("MatMul", [x, weight], name)

    def plain_norm(self, x: str, name: str, width: int) -> str:
        """Layer normalization with unit scale."""
        return self.layer_norm(x, name, nn.LayerNorm(width))


def write(folder: Path, sizes: Sizes, seed: int) -> Path:
    """Writes model and data file; returns the model's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    width, heads, tokens = sizes.width, sizes.heads, sizes.tokens
    with (folder / f"{path.name}.data").open("wb") as file:
        writer = Writer(file, f"{path.name}.data", seed)
        writer.tensor("heads.shape", np.array([0, 0, heads, width // heads], np.int64))
        writer.tensor("width.shape", np.array([0, 0, width], np.int64))
        writer.tensor("attention.scale", np.array(1 / math.sqrt(width // heads), np.float32))
        # Added to the scores: no token sees those after it.
        writer.tensor("causal", np.triu(np.full((tokens, tokens), -1e9, np.float32), 1))
        embedded = writer.node(
            "Gather", [writer.normal("embed.weight", (sizes.vocabulary, width), 1.0), "ids"], "embed"
        )
        x = writer.node("Add", [embedded, writer.normal("position.weight", (tokens, width), 0.3)], "embedded")
        for layer in range(sizes.layers):
            x = _block(writer, x, f"layers.{layer}", sizes)
        writer.linear(writer.plain_norm(x, "norm", width), "logits", width, sizes.vocabulary)
    ids = ("ids", TensorProto.INT64, ["batch", tokens])
    logits = ("logits", TensorProto.FLOAT, ["batch", tokens, sizes.vocabulary])
    model = writer.model("transformer", ids, logits)
    path.write_bytes(model.SerializeToString())
    return path


def _block(writer: Writer, x: str, name: str, sizes: Sizes) -> str:
    """Attention and MLP, each behind a layer normalization and with a residual connection."""
    width = sizes.width
    # Every residual branch adds to the stream; this keeps the sum's variance independent of the depth.
    gain = 1 / math.sqrt(2 * sizes.layers)
    normed = writer.plain_norm(x, f"{name}.norm1", width)
    parts = {}
    for part in "qkv":
        made = writer.linear(normed, f"{name}.{part}", width, width)
        split = writer.node("Reshape", [made, "heads.shape"], f"{name}.{part}.split")
        order = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        parts[part] = writer.node("Transpose", [split], f"{name}.{part}.heads", perm=order)
    scores = writer.node("MatMul", [parts["q"], parts["k"]], f"{name}.scores")
    scaled = writer.node("Mul", [scores, "attention.scale"], f"{name}.scaled")
    masked = writer.node("Add", [scaled, "causal"], f"{name}.masked")
    shares = writer.node("Softmax", [masked], f"{name}.shares", axis=-1)
    mixed = writer.node("MatMul", [shares, parts["v"]], f"{name}.mixed")
    back = writer.node("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
    joined = writer.node("Reshape", [back, "width.shape"], f"{name}.joined")
    x = writer.node("Add", [x, writer.linear(joined, f"{name}.o", width, width, gain)], f"{name}.attended")
    normed = writer.plain_norm(x, f"{name}.norm2", width)
    up = writer.linear(normed, f"{name}.up", width, MLP_FACTOR * width)
    active = writer.node("Relu", [up], f"{name}.active")
    down = writer.linear(active, f"{name}.down", MLP_FACTOR * width, width, math.sqrt(2) * gain)
    return writer.node("Add", [x, down], f"{name}.out")


def write_calibration(folder: Path, sizes: Sizes, samples: int, seed: int) -> Path:
    """Token ids `[samples, tokens]`, frequent and rare as words of a text are."""
    frequency = np.arange(1, sizes.vocabulary + 1) ** -ZIPF_EXPONENT
    rng = np.random.default_rng([seed, 1])
    ids = rng.choice(sizes.vocabulary, (samples, sizes.tokens), p=frequency / frequency.sum())
    path = folder / "calibration.npz"
    np.savez(path, ids=ids)
    return path


def layers_for(gigabytes: float, width: int, vocabulary: int, tokens: int) -> int:
    """The fewest blocks with which the matrices reach a size [GB], at least one."""
    empty, one = (Sizes(width, layers, vocabulary, tokens).nbytes for layers in (0, 1))
    return max(1, math.ceil((gigabytes * 1e9 - empty) / (one - empty)))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gigabytes", type=float, default=2.5, help="at least this much float32, by more blocks")
    parser.add_argument("--layers", type=int, help="blocks, whatever size that gives")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=32, help="length of a sequence")
    parser.add_argument("--samples", type=int, default=64, help="sequences of calibration data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    layers = args.layers or layers_for(args.gigabytes, args.width, args.vocabulary, args.tokens)
    sizes = Sizes(args.width, layers, args.vocabulary, args.tokens)
    path = write(args.out, sizes, args.seed)
    write_calibration(args.out, sizes, args.samples, args.seed)
    print(f"{path}: {layers} blocks, {sizes.nbytes / 1e9:.2f} GB of float32, {args.samples} x {args.tokens} tokens")


if __name__ == "__main__":
    main()
