"""What `OptimumShift` costs: time of a training step with and without it, side by side.

    python tools/bench_training.py [--models mlp resnet] [--every 1 10 100] [--repeats 7] [--threads 1]

Two copies of a network train in turns on the same random batches: one plain, one with `OptimumShift` attached. Printed
are medians of the processor time of a plain step, of a step that is not followed by a shift, and of one that is (hooks,
statistics, solving); and the overhead per step for each k, in per cent of a plain one: `(due - plain) / (k plain)`.
Other steps are not counted: nothing is in place there but the hook that counts steps, and what they differ by is noise.

`mlp`: 784-512-512-10. `resnet`: the residual network of `train_cifar.py` on 32 x 32 images. Batches of 128, whose rows
are shifted by. "head": the last linear layer alone; "all": every layer. Layers without freedom rest, as by default;
with `recheck=1` they do not, and one in ten shifts of the default costs as much.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from train_cifar import ResNet

from onnx_optshift.torch import OptimumShift

BATCH = 128
# Steps from one shift to the next while times are taken.
EVERY = 3
# (layers, tolerance, recheck)
CASES = (("head", 0.0, 10), ("all", 0.0, 10), ("all", 0.0, 1), ("all", 0.05, 10))


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (mlp, (1, 28, 28), "5"),
    "resnet": (ResNet, (3, 32, 32), "classifier"),
}


def step_seconds(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Processor time of one training step, which other work on the machine does not lengthen much."""
    start = time.process_time()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.process_time() - start


def measure(name: str, *, head_only: bool, tolerance: float, recheck: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of a plain step, of one with nothing due, and of one that is due."""
    make, shape, head = MODELS[name]
    torch.manual_seed(0)
    models = [make().train()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in models]
    chosen = (lambda _, path: path == head) if head_only else None
    shift = OptimumShift(models[1], every=EVERY, tolerance=tolerance, filter_fn=chosen, recheck=recheck)
    times: dict[str, list[float]] = {"plain": [], "other": [], "due": []}
    with shift.attach(optimizers[1]):
        for number in range(EVERY * (repeats + 1)):
            images, labels = torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))
            kinds = ["plain", "due" if shift.armed else "other"]
            # By turns the first: whoever comes second finds a warm cache.
            for which in (0, 1) if number % 4 < 2 else (1, 0):
                seconds = step_seconds(models[which], optimizers[which], images, labels)
                if number >= EVERY:  # the first round warms up
                    times[kinds[which]].append(seconds)
    found = [statistics.median(times[kind]) for kind in ("plain", "other", "due")]
    return found[0], found[1], found[2]


def main() -> None:
    """Measures and prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--every", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = " | ".join(f"every={k}" for k in options.every)
    print(f"| network, layers, tolerance | plain step | not due | due | {heads} |")
    print("|---" * (4 + len(options.every)) + "|")
    for name in options.models:
        for layers, tolerance, recheck in CASES:
            plain, other, due = measure(
                name, head_only=layers == "head", tolerance=tolerance, recheck=recheck, repeats=options.repeats
            )
            shares = [(due - plain) / (k * plain) for k in options.every]
            cells = " | ".join(f"{share:+.1%}" for share in shares)
            case = f"{name}, {layers}, {tolerance:g}" + ", recheck=1" * (recheck == 1)
            print(f"| {case} | {1e3 * plain:.1f} ms | {1e3 * other:.1f} ms | {1e3 * due:.1f} ms | {cells} |")


if __name__ == "__main__":
    main()
