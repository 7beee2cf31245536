"""Trains a small residual network on CIFAR-10 on the CPU and writes it as ONNX, with its data.

    python tools/train_cifar.py --data cifar10_jpeg.npz --out DIR [--minutes 12 | --epochs N] [--seed 0] [--threads N]

DIR gets `model.onnx` (input `images` float32 [batch, 3, 32, 32], normalised; output `logits`), `calibration.npz`
(600 images the network was trained on), `heldout.npz` (4,000 images of the training set it never saw) and `test.npz`
(the 10,000 test images), each with `images`, not augmented, and `labels`. BatchNorm is folded into the convolutions.

The data file is CIFAR-10 (A. Krizhevsky, 2009) as JPEG bytes: `train_jpeg` uint8 is all files end to end, file i is
`train_jpeg[train_offsets[i]:train_offsets[i + 1]]`; `train_labels` are its classes; the same for `test_`.

`--minutes` becomes a number of epochs by timing a few steps; `--epochs` repeats a run: the same epochs, seed, threads,
torch version and processor give the same weights. On a machine busy with other work `--threads 1` is several times
faster than all cores, which then wait for each other. Training runs in bfloat16, folding in float64.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from digits_networks import CLASSES, GraphWriter
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import OneCycleLR

SIDE, PAD = 32, 4
CALIBRATION_SAMPLES, HELDOUT_SAMPLES = 600, 4000
WIDTHS, BLOCKS = (16, 32, 64), 2  # channels of each stage, residual blocks per stage
BATCH, PEAK_RATE, WEIGHT_DECAY = 128, 0.2, 5e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels in [0, 1], per channel
LOGIT_TOLERANCE = 1e-3  # folding and another order of summing round differently; logits are about 10


@dataclass(frozen=True)
class Split:
    """Pixels uint8 `[n, 32, 32, 3]` and labels int64 `[n]`."""

    pixels: Tensor
    labels: Tensor

    def part(self, indices: Tensor) -> Split:
        """The samples at `indices [k]`."""
        return Split(self.pixels[indices], self.labels[indices])


def conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution followed by BatchNorm; `ResNet.fold` makes it one convolution with a bias."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut around them, a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_norm(inputs, outputs, stride=stride), conv_norm(outputs, outputs)
        self.shortcut = None if inputs == outputs else conv_norm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `[n, outputs, h, w]`."""
        around = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + around)

    def write(self, graph: GraphWriter, x: str, name: str) -> str:
        """Conv, Relu, Conv, Add, Relu; returns the last one's output."""
        y = graph.node("Relu", [graph.conv(x, f"{name}.conv1", self.conv1[0])], f"{name}.relu1")
        y = graph.conv(y, f"{name}.conv2", self.conv2[0])
        around = x if self.shortcut is None else graph.conv(x, f"{name}.shortcut", self.shortcut[0])
        return graph.node("Relu", [graph.node("Add", [y, around], f"{name}.add")], f"{name}.relu2")


class ResNet(nn.Module):
    """A 3x3 stem, one stage of residual blocks per width (each halving the side but the first), pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, WIDTHS[0])
        self.blocks, inputs = nn.ModuleDict(), WIDTHS[0]
        for stage, outputs in enumerate(WIDTHS, start=1):
            for k in range(1, BLOCKS + 1):
                self.blocks[f"stage{stage}_block{k}"] = Block(inputs, outputs, 2 if stage > 1 and k == 1 else 1)
                inputs = outputs
        self.classifier = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of `x [n, 3, 32, 32]`."""
        x = F.relu(self.stem(x))
        for block in self.blocks.values():
            x = block(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def fold(self) -> ResNet:
        """A float32 copy for inference without BatchNorm; folded in float64, so that only one rounding is added."""
        folded = copy.deepcopy(self).eval().double()
        for pair in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
            pair[0], pair[1] = fuse_conv_bn_eval(pair[0], pair[1]), nn.Identity()
        return folded.float()

    def write(self, graph: GraphWriter, x: str, output: str) -> None:
        """Writes the folded network; the last node is named after the output."""
        x = graph.node("Relu", [graph.conv(x, "stem", self.stem[0])], "stem.relu")
        for name, block in self.blocks.items():
            x = block.write(graph, x, name)
        x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
        graph.gemm(x, output, self.classifier, trans_b=True)


def decode(path: Path, prefix: str) -> Split:
    """All images of `train` or `test` of the data file."""
    try:
        from PIL import Image  # only this tool needs it, so the package does not ask for it
    except ImportError as error:
        raise SystemExit("train_cifar: decoding JPEG needs Pillow, which is missing: pip install pillow") from error
    try:
        with np.load(path, allow_pickle=False) as data:
            stream, offsets, labels = (data[f"{prefix}_{part}"] for part in ("jpeg", "offsets", "labels"))
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"train_cifar: {path} is not the .npz of JPEG bytes that --data expects: {error}") from error
    files = (io.BytesIO(stream[start:end]) for start, end in itertools.pairwise(offsets))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return Split(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def normalise(pixels: Tensor) -> Tensor:
    """Float32 images `[n, 3, 32, 32]`, in channels-last memory order, of uint8 `[n, 32, 32, 3]`."""
    return ((pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def augment(padded: Tensor, batch: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, half of them flipped, of each image `batch [b]` of `padded [n, 40, 40, 3]`: `[b, 32, 32, 3]`."""
    top, left = torch.randint(2 * PAD + 1, (2, len(batch), 1), generator=generator)
    flip = torch.randint(2, (len(batch), 1), generator=generator).bool()
    side = torch.arange(SIDE)
    rows, columns = top + side, left + torch.where(flip, SIDE - 1 - side, side)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(network: ResNet, split: Split, *, epochs: int, seed: int) -> Iterator[float]:
    """SGD with Nesterov momentum, the learning rate making one cycle; yields each epoch's mean cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    padded = torch.from_numpy(np.pad(split.pixels.numpy(), ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect"))
    steps = len(padded) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    cycle = OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps, pct_start=0.25, cycle_momentum=False)
    network.train()
    for _ in range(epochs):
        total = torch.zeros(())
        for batch in torch.randperm(len(padded), generator=generator)[: steps * BATCH].split(BATCH):
            images = normalise(augment(padded, batch, generator))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(network(images), split.labels[batch])  # which autocast runs in float32
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.detach()
        yield float(total) / steps


def affordable_epochs(network: ResNet, split: Split, minutes: float) -> int:
    """How many epochs fit, by timing steps on a copy of the network."""
    for steps in (5, 50):  # the first ones prepare kernels; only the last count
        started = time.perf_counter()
        list(train(copy.deepcopy(network), split.part(torch.arange(steps * BATCH)), epochs=1, seed=0))
    rate = steps * BATCH / (time.perf_counter() - started)  # images per second
    return max(1, int(60 * minutes * rate / len(split.labels)))


def to_onnx(folded: ResNet, properties: dict[str, str]) -> bytes:
    """The folded network as a checked, serialized model with a dynamic batch axis."""
    writer = GraphWriter()
    model = writer.network(folded, "cifar_resnet", "images", (3, SIDE, SIDE), "logits", properties=properties)
    return model.SerializeToString()


def score(name: str, images: NDArray[np.float32], labels: NDArray[np.int64], network: ResNet, model: bytes) -> None:
    """Prints the accuracy of ONNX Runtime and of torch with BatchNorm; raises RuntimeError if their logits differ."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    chunks = np.array_split(images, max(1, len(images) // 500))
    written = np.concatenate([session.run(["logits"], {"images": chunk})[0] for chunk in chunks])
    with torch.inference_mode():
        trained = torch.cat([network(torch.from_numpy(chunk)) for chunk in chunks]).numpy()
    ours, theirs = ((logits.argmax(axis=1) == labels).mean() for logits in (written, trained))
    gap = float(np.abs(written - trained).max())
    print(f"{name}: {len(labels)} images, ONNX Runtime {ours:.4f}, torch {theirs:.4f}, logits within {gap:.1e}")
    if gap > LOGIT_TOLERANCE:
        raise RuntimeError(f"{name}: the logits moved by {gap}, more than {LOGIT_TOLERANCE}; model.onnx is wrong.")


def main() -> None:
    """Trains, folds, writes and checks."""
    parser = argparse.ArgumentParser(description="Train a small residual network on CIFAR-10; write ONNX and data.")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz of JPEG bytes")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the model and the data")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=12.0, help="training time aimed at (default: %(default)s)")
    length.add_argument("--epochs", type=int, default=0, help="passes over the training images, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    everything, test = decode(arguments.data, "train"), decode(arguments.data, "test")
    order = torch.randperm(len(everything.labels))
    heldout, training = everything.part(order[:HELDOUT_SAMPLES]), everything.part(order[HELDOUT_SAMPLES:])
    network = ResNet().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in network.parameters())} parameters, {torch.get_num_threads()} threads", flush=True)

    epochs = arguments.epochs or affordable_epochs(network, training, arguments.minutes)
    started = time.perf_counter()
    for epoch, loss in enumerate(train(network, training, epochs=epochs, seed=arguments.seed), start=1):
        print(f"epoch {epoch:3d}/{epochs}  loss {loss:.4f}  {time.perf_counter() - started:6.0f} s", flush=True)

    facts = {"data": "CIFAR-10", "mean": MEAN, "std": STD, "seed": arguments.seed, "epochs": epochs}
    model = to_onnx(network.fold(), {key: str(value) for key, value in facts.items()})
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "model.onnx").write_bytes(model)
    calibration = training.part(torch.arange(CALIBRATION_SAMPLES))
    for name, split in {"calibration": calibration, "heldout": heldout, "test": test}.items():
        images, labels = normalise(split.pixels).contiguous().numpy(), split.labels.numpy()
        np.savez_compressed(arguments.out / f"{name}.npz", images=images, labels=labels)
        score(name, images, labels, network.eval(), model)


if __name__ == "__main__":
    main()
