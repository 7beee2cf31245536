"""Shift, distillation, or both: a student that learnt wrong labels by heart, on scikit-learn's digits. Prints a table.

    python tools/distillation.py [--noise 0.2 0.4] [--seeds 5] [--epochs 150]

A student (64-64-32-10) and a teacher (64-256-256-10, with dropout, weight decay and an early end, so that it learns
few wrong labels) are trained on 600 digits of which a share has wrong labels; 400 more, with as many wrong labels,
judge; the last 797 with right labels are the test. Of each way that has a tolerance or residual the one of least
cross-entropy on what judges is taken, among the same grid, or none of them:

- shift: `shift_` of all layers within a residual of the student's own outputs
- distilled: `distill_` of the last layer towards the teacher's logits, the nearest weight (`least="change"`)
- ball around the teacher: the same by the smallest weight (`least="norm"`): shift and distillation in one solution
- distilled, then shift; shift, then distilled: one after the other

The mean over seeds of the accuracy on the test, with its standard deviation, and of the cross-entropy.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from onnx_optshift.torch import ShiftConfig, distill_, shift_

TRAIN, JUDGE = 600, 400
TEACHER_EPOCHS = 40
GRID = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
Data = tuple[Tensor, Tensor]


def data(noise: float, seed: int) -> tuple[Data, Data, Data]:
    """Images `[n, 64]` and labels to train on, to judge by, and to test on; the first two with wrong labels."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    labels = digits.target[order].copy()
    seen = TRAIN + JUDGE
    wrong = rng.random(seen) < noise
    labels[:seen][wrong] = (labels[:seen][wrong] + rng.integers(1, 10, wrong.sum())) % 10
    parts = [slice(0, TRAIN), slice(TRAIN, seen), slice(seen, None)]
    train, judge, test = ((images[part], torch.tensor(labels[part])) for part in parts)
    return train, judge, test


def trained(
    widths: Iterable[int], some: Data, epochs: int, *, decay: float = 0.0, dropout: float = 0.0
) -> nn.Sequential:
    """A network of linear layers and ReLU, after so many epochs of AdamW in batches of 50; in eval mode."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers[:-2])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=decay)
    images, labels = some
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, some: Data) -> tuple[float, float]:
    """Accuracy in per cent and cross-entropy."""
    outputs = model(some[0])
    accuracy = 100 * float((outputs.argmax(1) == some[1]).double().mean())
    return accuracy, float(nn.functional.cross_entropy(outputs, some[1]))


def best(model: nn.Module, judge: Data, change: Callable[[nn.Module, float], object]) -> nn.Module:
    """The model changed by the figure of the grid that serves what judges best, or as it is."""
    tried = [copy.deepcopy(model)]
    for figure in GRID:
        changed = copy.deepcopy(model)
        change(changed, figure)
        tried.append(changed)
    return min(tried, key=lambda some: score(some, judge)[1])


def ways(noise: float, seed: int, epochs: int) -> dict[str, tuple[float, float]]:
    """Test scores by way."""
    train, judge, test = data(noise, seed)
    torch.manual_seed(seed)
    teacher = trained((64, 256, 256, 10), train, TEACHER_EPOCHS, decay=1.0, dropout=0.5)
    student = trained((64, 64, 32, 10), train, epochs)
    last = str(len(student) - 1)
    images = [train[0]]

    def shift(model: nn.Module, residual: float) -> None:
        shift_(model, images, ShiftConfig(tolerance=residual, tolerance_of="layers", verify=False))

    def towards(least: str) -> Callable[[nn.Module, float], object]:
        return lambda model, tolerance: distill_(model, teacher, images, last, tolerance=tolerance, least=least)

    distilled, shifted = best(student, judge, towards("change")), best(student, judge, shift)
    found = {
        "student": student,
        "teacher": teacher,
        "shift": shifted,
        "distilled": distilled,
        "ball around the teacher": best(student, judge, towards("norm")),
        "distilled, then shift": best(distilled, judge, shift),
        "shift, then distilled": best(shifted, judge, towards("change")),
    }
    return {name: score(model, test) for name, model in found.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = []
    for noise in options.noise:
        runs = [ways(noise, seed, options.epochs) for seed in range(options.seeds)]
        columns.append({name: [run[name] for run in runs] for name in runs[0]})
    heads = " | ".join(f"{noise:.0%} wrong: accuracy | cross-entropy" for noise in options.noise)
    print(f"| | {heads} |\n" + "|---" * (1 + 2 * len(columns)) + "|")
    for name in columns[0]:
        cells = []
        for column in columns:
            accuracies, losses = zip(*column[name], strict=True)
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            cells.append(f"{statistics.mean(accuracies):.1f} ± {spread:.1f} % | {statistics.mean(losses):.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
