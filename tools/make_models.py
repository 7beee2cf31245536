"""Trains the small example models on scikit-learn's digits and writes them as ONNX, with their data and origin.

    python tools/make_models.py [NAME ...] [--out models] [--seed 0]

Each model becomes `models/<name>/{model.onnx, calibration.npz, heldout.npz, SOURCE.md}`. The graphs are written by
hand, node by node, so that each kind of linear layer appears in a known form. The same seed gives the same data and
the same architecture; the last bits of the trained weights depend on the torch version and the processor.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from digits_networks import CLASSES, OPSET, Cnn, GraphWriter, Mlp, Transformer
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

CALIBRATION_SAMPLES = 1000


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained.

    Attributes:
        about: One sentence for SOURCE.md and the model's doc_string.
        build: Makes the untrained network (a `Mlp`, `Transformer` or `Cnn`).
        input: Name of the model's input.
        shape: Shape of one sample.
        output: Name of the model's output.
        epochs: Passes over the training samples.
        weight_decay: Of AdamW.
        label_noise: Share of the training labels replaced by another class, drawn evenly.
    """

    about: str
    build: Callable[[], nn.Module]
    input: str
    shape: tuple[int, ...]
    output: str
    epochs: int
    weight_decay: float = 1e-2
    label_noise: float = 0.0


RECIPES = {
    "digits_mlp": Recipe(
        "Gemm MLP 64-128-64-10 with ReLU; fc2 stores its weight as [d, m] (transB=0), the others as [m, d] (transB=1).",
        lambda: Mlp((64, 128, 64, CLASSES), plain_layout=(2,)),
        "pixels",
        (64,),
        "logits",
        epochs=60,
    ),
    "digits_transformer": Recipe(
        "One pre-norm transformer block over the image's eight rows, width 32, two heads, MatMul + Add layers.",
        Transformer,
        "rows",
        (8, 8),
        "logits",
        epochs=120,
    ),
    "digits_cnn": Recipe(
        "Conv net: 3x3, 3x3 stride 2, 3x3 depthwise, 1x1, global average pool, Gemm, Softmax.",
        Cnn,
        "image",
        (1, 8, 8),
        "probabilities",
        epochs=80,
    ),
    "noisy_mlp": Recipe(
        "Gemm MLP 64-256-256-10 with ReLU, overfitted on purpose: a fifth of its training labels is wrong.",
        lambda: Mlp((64, 256, 256, CLASSES)),
        "pixels",
        (64,),
        "logits",
        epochs=300,
        weight_decay=0.0,
        label_noise=0.2,
    ),
}


@dataclass(frozen=True)
class Split:
    """Samples `[n, *shape]` in float32 and labels `[n]` in int64."""

    samples: NDArray[np.float32]
    labels: NDArray[np.int64]


def load_splits(recipe: Recipe, seed: int) -> tuple[Split, Split]:
    """The digits, shuffled and cut in two; the calibration labels carry the recipe's noise, the held-out ones never."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    samples = (digits.data[order] / 16).astype(np.float32).reshape(-1, *recipe.shape)
    labels = digits.target[order].astype(np.int64)
    cut = CALIBRATION_SAMPLES
    wrong = rng.permutation(cut)[: round(recipe.label_noise * cut)]
    # An offset of 1 to 9 always lands on another class, so the share of wrong labels is exact.
    labels[wrong] = (labels[wrong] + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    return Split(samples[:cut], labels[:cut]), Split(samples[cut:], labels[cut:])


def train(network: nn.Module, split: Split, recipe: Recipe) -> None:
    """AdamW on the cross-entropy, batches of 50, learning rate 3e-3 falling to 0 along a cosine."""
    samples, labels = torch.from_numpy(split.samples), torch.from_numpy(split.labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(samples[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()


def to_onnx(network: nn.Module, name: str, recipe: Recipe, seed: int) -> onnx.ModelProto:
    """The network as a checked model with a dynamic batch axis."""
    return GraphWriter().network(
        network,
        name,
        recipe.input,
        recipe.shape,
        recipe.output,
        properties={"data": "sklearn.datasets.load_digits", "seed": str(seed)},
        producer_name="make_models",
        doc_string=f"{recipe.about} Trained on scikit-learn's digits (pixel / 16).",
    )


def accuracy(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of samples whose largest score `[n, classes]` is at their label."""
    return float((scores.argmax(axis=1) == labels).mean())


SOURCE = """# {name}

{about}

- Origin: trained and written by `tools/make_models.py {name}`, seed {seed}, with torch {torch} on a CPU. Opset {opset}.
- Training: AdamW, cross-entropy, {epochs} epochs in batches of 50, learning rate 3e-3 on a cosine,
  weight decay {weight_decay:g}, {parameters} parameters.
- Data: `sklearn.datasets.load_digits`, a copy of the test set of *Optical Recognition of Handwritten Digits*
  (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49), 1,797 images of 8x8 pixels.
  Changes: pixels divided by 16, samples shuffled and split.
- Licence: the data CC BY 4.0 (UCI), distributed with scikit-learn (BSD-3-Clause); the model Apache-2.0.
- Input `{input}` float32 {shape}; output `{output}` float32 [batch, 10].
- `calibration.npz`: {n_calibration} samples, the ones the model was trained on. {noise}
- `heldout.npz`: the other {n_heldout} samples, never trained on, with their true labels.

| | accuracy |
|---|---|
| calibration | {calibration_accuracy:.4f} |
| held-out | {heldout_accuracy:.4f} |

| file | bytes | sha256 |
|---|---|---|
{files}
"""


def make(name: str, out: Path, seed: int) -> str:
    """Trains one model and writes its folder.

    Args:
        name: Key of `RECIPES`.
        out: Folder that gets the model's folder.
        seed: Of the split, the label noise, the initial weights and the batches.

    Returns:
        One line about the result.

    Raises:
        RuntimeError: If ONNX Runtime and torch disagree on the trained network.
    """
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    calibration, heldout = load_splits(recipe, seed)
    network = recipe.build()
    train(network, calibration, recipe)

    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(to_onnx(network, name, recipe, seed), folder / "model.onnx")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    reached = {}
    for part, split in (("calibration", calibration), ("heldout", heldout)):
        np.savez_compressed(folder / f"{part}.npz", **{recipe.input: split.samples, "labels": split.labels})
        with torch.no_grad():
            expected = accuracy(network(torch.from_numpy(split.samples)).numpy(), split.labels)
        (scores,) = session.run(None, {recipe.input: split.samples})
        reached[part] = accuracy(scores, split.labels)
        if abs(reached[part] - expected) * len(split.labels) > 1:  # one tie may fall either way
            raise RuntimeError(f"{name}, {part}: accuracy {reached[part]} in ONNX Runtime, {expected} in torch")

    files = [folder / file for file in ("model.onnx", "calibration.npz", "heldout.npz")]
    noise = (
        f"Its\n  `labels` are the noisy ones used for training: {recipe.label_noise:.0%} of them are wrong on purpose\n"
        "  (replaced by another class, drawn evenly)."
        if recipe.label_noise
        else "With their true labels."
    )
    (folder / "SOURCE.md").write_text(
        SOURCE.format(
            name=name,
            about=recipe.about,
            seed=seed,
            torch=torch.__version__,
            opset=OPSET,
            epochs=recipe.epochs,
            weight_decay=recipe.weight_decay,
            parameters=sum(p.numel() for p in network.parameters()),
            input=recipe.input,
            shape=str(["batch", *recipe.shape]).replace("'", ""),
            output=recipe.output,
            n_calibration=len(calibration.labels),
            n_heldout=len(heldout.labels),
            noise=noise,
            calibration_accuracy=reached["calibration"],
            heldout_accuracy=reached["heldout"],
            files="\n".join(
                f"| {f.name} | {f.stat().st_size} | {hashlib.sha256(f.read_bytes()).hexdigest()} |" for f in files
            ),
        )
    )
    size = sum(f.stat().st_size for f in folder.iterdir())
    return f"{name}: calibration {reached['calibration']:.4f}, held-out {reached['heldout']:.4f}, {size:,} bytes"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which models: {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder that gets one folder per model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - RECIPES.keys()):
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(1)  # sums split over threads add up in another order
    for name in args.names or RECIPES:
        print(make(name, args.out, args.seed), flush=True)


if __name__ == "__main__":
    main()
