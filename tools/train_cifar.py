"""Trains a small residual network on CIFAR-10 on the CPU and writes it as ONNX, with its data.

    python tools/train_cifar.py --data cifar10_jpeg.npz --out DIR [--minutes 12 | --epochs N] [--seed 0]

DIR gets `model.onnx` (input `images` float32 [batch, 3, 32, 32], normalised; output `logits`), `calibration.npz`
(600 images the network was trained on), `heldout.npz` (4,000 images of the training set that it was not trained on)
and `test.npz` (the 10,000 test images), each with `images`, not augmented, and `labels`. BatchNorm is folded into the
convolutions, and the graph is written by hand, node by node, so that nothing of an exporter is in it.

The data file is CIFAR-10 (A. Krizhevsky, 2009) as JPEG bytes: `train_jpeg` uint8 is all files end to end, file i is
`train_jpeg[train_offsets[i]:train_offsets[i + 1]]`; `train_labels` are its classes; the same for `test_`.

`--minutes` is turned into a number of epochs by measuring a few steps first, so the result depends on the machine.
`--epochs` repeats a run: the same epochs, seed, torch version, processor and thread count give the same weights.
Training runs in bfloat16 where torch allows it, folding and inference in float64 and float32.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from digits_networks import GraphWriter
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASSES, SIDE, PAD = 10, 32, 4
CALIBRATION_SAMPLES, HELDOUT_SAMPLES = 600, 4000
WIDTHS, BLOCKS = (16, 32, 64), 2  # channels of each stage, residual blocks per stage
BATCH, PEAK_RATE, WEIGHT_DECAY = 128, 0.2, 5e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels in [0, 1], per channel
OPSET, IR_VERSION = 17, 8
LOGIT_TOLERANCE = 1e-3  # torch and ONNX Runtime sum in another order; logits are about 10


@dataclass(frozen=True)
class Split:
    """Pixels uint8 `[n, 32, 32, 3]` and labels int64 `[n]`."""

    pixels: Tensor
    labels: Tensor

    def part(self, indices: Tensor) -> Split:
        """The samples at `indices [k]`."""
        return Split(self.pixels[indices], self.labels[indices])


class ConvNorm(nn.Module):
    """A convolution followed by BatchNorm, until `fold` makes it one convolution with a bias."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `[n, outputs, h, w]` of `x [n, inputs, h * stride, w * stride]`."""
        return self.norm(self.conv(x))

    def fold(self) -> None:
        """W' = W·γ/√(σ²+ε) and b' = β - μ·γ/√(σ²+ε), with the running statistics μ and σ²."""
        self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut around them, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(inputs, outputs, stride=stride), ConvNorm(outputs, outputs)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, kernel=1, stride=stride) if reshapes else None

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `[n, outputs, h, w]`."""
        around = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + around)

    def write(self, graph: GraphWriter, x: str, name: str) -> str:
        """Conv, Relu, Conv, Add, Relu; returns the last one's output."""
        y = graph.node("Relu", [graph.conv(x, f"{name}.conv1", self.conv1.conv)], f"{name}.relu1")
        y = graph.conv(y, f"{name}.conv2", self.conv2.conv)
        around = x if self.shortcut is None else graph.conv(x, f"{name}.shortcut", self.shortcut.conv)
        return graph.node("Relu", [graph.node("Add", [y, around], f"{name}.add")], f"{name}.relu2")


class ResNet(nn.Module):
    """A 3x3 stem, one stage of residual blocks per width (each halving the side but the first), pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, WIDTHS[0])
        self.blocks = nn.ModuleDict()
        inputs = WIDTHS[0]
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
        for layer in [m for m in folded.modules() if isinstance(m, ConvNorm)]:
            layer.fold()
        return folded.float()

    def write(self, graph: GraphWriter, x: str, output: str) -> None:
        """Writes the folded network; the last node is named after the output."""
        x = graph.node("Relu", [graph.conv(x, "stem", self.stem.conv)], "stem.relu")
        for name, block in self.blocks.items():
            x = block.write(graph, x, name)
        x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
        weight = graph.tensor("classifier.weight", self.classifier.weight)
        bias = graph.tensor("classifier.bias", self.classifier.bias)
        graph.node("Gemm", [x, weight, bias], output, transB=1)


def decode(path: Path, prefix: str) -> Split:
    """All images of `train` or `test` of the data file."""
    try:
        from PIL import Image  # only this tool needs it, so the package does not ask for it
    except ImportError as error:
        raise SystemExit("train_cifar: decoding the JPEG images needs Pillow, which is not installed. "
                         "Run: pip install pillow") from error  # fmt: skip
    try:
        with np.load(path, allow_pickle=False) as data:
            stream, offsets, labels = (data[f"{prefix}_{part}"] for part in ("jpeg", "offsets", "labels"))
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"train_cifar: {path} is not an .npz with {prefix}_jpeg, {prefix}_offsets and {prefix}_labels "
                         f"({error}). Pass the CIFAR-10 JPEG file with --data.") from error  # fmt: skip
    pixels = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for i in range(len(labels)):
        file = io.BytesIO(stream[offsets[i] : offsets[i + 1]].tobytes())
        pixels[i] = np.asarray(Image.open(file).convert("RGB"))
    return Split(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def normalise(pixels: Tensor) -> Tensor:
    """Float32 images `[n, 3, 32, 32]`, in channels-last memory order, of uint8 `[n, 32, 32, 3]`."""
    return ((pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def augment(padded: Tensor, batch: Tensor, generator: torch.Generator) -> Tensor:
    """A random 32x32 crop, flipped half of the time, of each of the images `batch [b]` of `padded [n, 40, 40, 3]`."""
    top, left = torch.randint(2 * PAD + 1, (2, len(batch), 1), generator=generator)
    flip = torch.randint(2, (len(batch), 1), generator=generator).bool()
    steps = torch.arange(SIDE)
    rows, columns = top + steps, left + torch.where(flip, SIDE - 1 - steps, steps)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(network: ResNet, split: Split, *, epochs: int, seed: int, max_steps: int | None = None) -> None:
    """SGD with Nesterov momentum on the cross-entropy; the learning rate makes one cycle."""
    generator = torch.Generator().manual_seed(seed)
    border = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    padded = torch.from_numpy(np.pad(split.pixels.numpy(), border, mode="reflect"))
    total = epochs * (len(padded) // BATCH)
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total, pct_start=0.25, cycle_momentum=False)
    network.train()
    done, started = 0, time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        order = torch.randperm(len(padded), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            if done == max_steps:
                return
            images = normalise(augment(padded, batch, generator))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), split.labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            done += 1
        spent = time.perf_counter() - started
        print(f"epoch {epoch:3d}/{epochs}  loss {torch.stack(losses).mean():.4f}  {spent:6.0f} s", flush=True)


def affordable_epochs(network: ResNet, split: Split, minutes: float) -> int:
    """How many epochs fit, by timing steps on a copy of the network."""
    small, steps = split.part(torch.arange(60 * BATCH)), 50
    train(copy.deepcopy(network), small, epochs=1, seed=0, max_steps=5)  # the first steps prepare kernels
    started = time.perf_counter()
    train(copy.deepcopy(network), small, epochs=1, seed=0, max_steps=steps)
    rate = steps * BATCH / (time.perf_counter() - started)
    print(f"{rate:.0f} images/s in training", flush=True)
    return max(1, int(60 * minutes * rate / len(split.labels)))


def to_onnx(folded: ResNet, properties: dict[str, str]) -> onnx.ModelProto:
    """The folded network as a checked model with a dynamic batch axis."""
    writer = GraphWriter()
    folded.write(writer, "images", "logits")
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
    graph = helper.make_graph(writer.nodes, "cifar_resnet", inputs, outputs, writer.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="train_cifar")
    helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    return model


def score(name: str, images: NDArray[np.float32], labels: NDArray[np.int64], folded: ResNet, model: bytes) -> None:
    """Prints the accuracy of ONNX Runtime and of torch; they must agree."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    chunks = np.array_split(images, max(1, len(images) // 500))
    ours = np.concatenate([session.run(["logits"], {"images": chunk})[0] for chunk in chunks])
    with torch.inference_mode():
        theirs = torch.cat([folded(torch.from_numpy(chunk)) for chunk in chunks]).numpy()
    hits, expected = (int((logits.argmax(axis=1) == labels).sum()) for logits in (ours, theirs))
    gap = float(np.abs(ours - theirs).max())
    print(f"{name:12s} {len(labels):6d} images  ONNX Runtime {hits / len(labels):.4f}  "
          f"torch {expected / len(labels):.4f}  largest logit difference {gap:.1e}")  # fmt: skip
    if gap > LOGIT_TOLERANCE or hits != expected:
        raise RuntimeError(
            f"{name}: ONNX Runtime and torch differ: {hits} and {expected} right answers, logits by {gap}"
        )


def main() -> None:
    """Trains, folds, writes and checks."""
    parser = argparse.ArgumentParser(description="Train a small residual network on CIFAR-10; write ONNX and data.")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz of JPEG bytes")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the model and the data")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=12.0, help="training time aimed at (default: %(default)s)")
    length.add_argument("--epochs", type=int, help="passes over the training images, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or (arguments.epochs is not None and arguments.epochs < 1):
        parser.error("--minutes must be above 0 and --epochs at least 1")

    torch.manual_seed(arguments.seed)
    everything, test = decode(arguments.data, "train"), decode(arguments.data, "test")
    order = torch.randperm(len(everything.labels))
    heldout, training = everything.part(order[:HELDOUT_SAMPLES]), everything.part(order[HELDOUT_SAMPLES:])
    network = ResNet().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in network.parameters())} parameters, {torch.get_num_threads()} threads", flush=True)

    epochs = arguments.epochs or affordable_epochs(network, training, arguments.minutes)
    train(network, training, epochs=epochs, seed=arguments.seed)

    folded = network.fold()
    calibration = training.part(torch.arange(CALIBRATION_SAMPLES))
    with torch.inference_mode():
        images = normalise(calibration.pixels)
        gap = float((network.eval()(images) - folded(images)).abs().max())
    if gap > LOGIT_TOLERANCE:
        raise RuntimeError(f"Folding BatchNorm moved a logit by {gap}, more than {LOGIT_TOLERANCE}.")

    properties = {"data": "CIFAR-10", "seed": str(arguments.seed), "epochs": str(epochs)}
    model = to_onnx(folded, properties | {"mean": str(MEAN), "std": str(STD)}).SerializeToString()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "model.onnx").write_bytes(model)
    for name, split in {"calibration": calibration, "heldout": heldout, "test": test}.items():
        images, labels = normalise(split.pixels).contiguous().numpy(), split.labels.numpy()
        np.savez_compressed(arguments.out / f"{name}.npz", images=images, labels=labels)
        score(name, images, labels, folded, model)


if __name__ == "__main__":
    main()
