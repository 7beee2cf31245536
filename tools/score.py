"""Top-1 accuracy and NLL of models on labelled data that no run has seen, side by side as a table.

    python tools/score.py heldout.npz original.onnx shifted.onnx [...]

The NLL is taken from probabilities or from logits, whichever the first output holds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import onnxruntime

from onnx_optshift.decide.loss import choose_loss

BATCH = 64


def score(model: Path, data: dict[str, np.ndarray], labels: np.ndarray) -> tuple[float, float, float]:
    """Top-1 accuracy, mean NLL, and the standard error of that mean."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    losses, right = [], []
    loss = None
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        results = session.run(names, {name: array[part] for name, array in data.items()})
        outputs = dict(zip(names, results, strict=True))
        count = len(labels[part])
        loss = loss or choose_loss(outputs, labels, count)
        batch_losses, batch_right = loss.per_sample(outputs, outputs, labels[part], count)
        losses.append(batch_losses)
        right.append(batch_right)
    all_losses = np.concatenate(losses)
    return (
        float(np.concatenate(right).mean()),
        float(all_losses.mean()),
        float(all_losses.std() / math.sqrt(len(labels))),
    )


def main() -> None:
    """Reads the command line and prints one line per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help=".npz with the model's inputs by name, and labels")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--labels", default="labels")
    arguments = parser.parse_args()
    with np.load(arguments.data, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    labels = data.pop(arguments.labels)
    print(f"{'model':40} {'top-1':>8} {'NLL':>8} {'s.e.':>7}")
    for model in arguments.models:
        top1, nll, error = score(model, data, labels)
        print(f"{model.name:40} {100 * top1:7.2f}% {nll:8.4f} {error:7.4f}")


if __name__ == "__main__":
    main()
