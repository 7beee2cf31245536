"""Top-1 accuracy and NLL of models on labelled data that no run has seen, side by side as a table.

    python tools/score.py heldout.npz original.onnx shifted.onnx [...]

The NLL is taken from probabilities or from logits, whichever the first model gives. The error is that of the first
output against the first model's, `‖Z' - Z‖_F / ‖Z‖_F`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from onnx_optshift.decide.loss import choose_loss

LABELS = "labels"
BATCH = 100

Arrays = dict[str, NDArray[np.generic]]


def read_arrays(path: Path) -> Arrays:
    """All arrays of a .npz file."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@dataclass(frozen=True)
class Score:
    """One model file on the test data.

    Attributes:
        top1: Share of right answers; NaN where there are none.
        nll: Mean negative log-likelihood.
        nll_error: Standard error of that mean.
        error: Relative output error against the original.
    """

    top1: float
    nll: float
    nll_error: float
    error: float


class Judge:
    """Scores model files on test data against an original.

    Args:
        original: The model that errors are relative to.
        data: Its inputs by name, and the labels.
        labels: Name of the labels.
    """

    def __init__(self, original: Path, data: Arrays, labels: str = LABELS) -> None:
        self._labels = data[labels]
        self._inputs = {name: array for name, array in data.items() if name != labels}
        self._reference = self._outputs(original)
        self._loss = choose_loss(self._reference, self._labels, len(self._labels))

    def score(self, path: Path) -> Score:
        """The score of a model file."""
        outputs = self._outputs(path)
        losses, right = self._loss.per_sample(outputs, self._reference, self._labels, len(self._labels))
        first = next(iter(self._reference))
        before, after = (values[first].astype(np.float64) for values in (self._reference, outputs))
        return Score(
            math.nan if right is None else float(right.mean()),
            float(losses.mean()),
            float(losses.std()) / math.sqrt(len(losses)),
            float(np.linalg.norm(after - before) / np.linalg.norm(before)),
        )

    def _outputs(self, path: Path) -> Arrays:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        parts = [
            session.run(names, {name: array[start : start + BATCH] for name, array in self._inputs.items()})
            for start in range(0, len(self._labels), BATCH)
        ]
        return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(names)}


def main() -> None:
    """Reads the command line and prints one line per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help=".npz with the models' inputs by name, and labels")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--labels", default=LABELS)
    arguments = parser.parse_args()
    judge = Judge(arguments.models[0], read_arrays(arguments.data), arguments.labels)
    print(f"{'model':40} {'top-1':>8} {'NLL':>8} {'s.e.':>7} {'error':>8}")
    for model in arguments.models:
        found = judge.score(model)
        print(f"{model.name:40} {100 * found.top1:7.2f}% {found.nll:8.4f} {found.nll_error:7.4f} {found.error:8.4f}")


if __name__ == "__main__":
    main()
