"""Data and training of `paper.py`: CIFAR-10 with wrong labels, SGD or SAM, shifts while it trains and after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digits_networks import CLASSES
from paper_networks import Network
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from train_cifar import PAD, Split, augment, decode, normalise

from onnx_optshift.decide.draws import balanced_batch
from onnx_optshift.torch import OptimumShift


@dataclass(frozen=True)
class Recipe:
    """What all trainings of a size have in common."""

    images: int  # that are trained on
    heldout: int  # further ones, with their true labels, that choose a tolerance
    test: int
    epochs: int
    batch: int
    rate: float  # the highest of the one cycle
    every: int  # steps from one shift to the next
    augmented: bool = False
    momentum: float = 0.9
    rho: float = 0.05  # SAM's


# "text" has as many samples of each of its classes as the factors say.
RECIPES = {
    "tiny": Recipe(images=96, heldout=32, test=64, epochs=1, batch=16, rate=0.05, every=3),
    "small": Recipe(images=3000, heldout=1000, test=5000, epochs=10, batch=64, rate=0.05, every=23),
    "long": Recipe(images=3000, heldout=1000, test=5000, epochs=30, batch=64, rate=0.05, every=23),
    "text": Recipe(images=30 * 128, heldout=8 * 128, test=20 * 128, epochs=15, batch=64, rate=0.1, every=30),
    "full": Recipe(49_000, heldout=1000, test=10_000, epochs=200, batch=128, rate=0.1, every=191, augmented=True),
}


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        kind: `"resnet"`, `"densenet"` or `"mlp"`.
        decay: Weight decay.
        noise: Share of the training labels that are wrong.
        optimizer: `"sgd"` or `"sam"`.
        during: Samples in the batch of a shift during training, in multiples of the number of classes; 0 for no shift.
        layers: `"last"`, or `"all"` linear layers, convolutions among them, that such a shift may change.
        until: Share of the steps after which there are no more such shifts.
        seed: Of the choice of images, the wrong labels, the first weights and the batches.
    """

    kind: str
    decay: float
    noise: float
    optimizer: str = "sgd"
    during: int = 0
    layers: str = "last"
    until: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """Inputs float32, images `[n, 3, 32, 32]` or rows `[n, d]`, and labels `[n]`."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, split: Split) -> Part:
        """Normalised, in channels-last memory order."""
        return cls(normalise(split.pixels).contiguous(memory_format=torch.channels_last), split.labels)


@dataclass(frozen=True)
class Data:
    """What one seed trains on, chooses by and is judged by."""

    train: Part  # with wrong labels
    heldout: Part
    test: Part
    pixels: Tensor | None = None  # uint8 [n, 32, 32, 3] of the training images, where there are any


def with_wrong(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Labels `[n]`, a share of them replaced by another class, all equally likely."""
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    changed = labels.clone()
    changed[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    return changed


class Images:
    """CIFAR-10, decoded once into `cache`."""

    classes = CLASSES

    def __init__(self, path: Path, cache: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        if not cache.exists():
            splits = {name: decode(path, name) for name in ("train", "test")}
            arrays = {f"{name}_{part}": getattr(s, part) for name, s in splits.items() for part in ("pixels", "labels")}
            started = cache.with_suffix(".part.npz")
            np.savez(started, **arrays)
            started.replace(cache)
        with np.load(cache) as file:
            found = {key: torch.from_numpy(file[key]) for key in file.files}
        self.splits = {name: Split(found[f"{name}_pixels"], found[f"{name}_labels"]) for name in ("train", "test")}

    def data(self, noise: float, seed: int) -> Data:
        """The images of a seed."""
        generator, recipe, everything = torch.Generator().manual_seed(seed), self.recipe, self.splits["train"]
        order = torch.randperm(len(everything.labels), generator=generator)
        training = everything.part(order[: recipe.images])
        training = Split(training.pixels, with_wrong(training.labels, noise, CLASSES, generator))
        heldout = everything.part(order[recipe.images : recipe.images + recipe.heldout])
        test = self.splits["test"].part(torch.arange(recipe.test))
        return Data(Part.of(training), Part.of(heldout), Part.of(test), training.pixels)


def sam_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], rho: float) -> Tensor:
    """One step with the gradient at `w + rho g / ‖g‖` instead of g, that at w; returns the loss at w.

    Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization", ICLR 2021.
    """
    optimizer.zero_grad()
    first = loss()
    first.backward()
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in moved]))
    start = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for parameter in moved:
            parameter += parameter.grad * (rho / norm.clamp(min=1e-12))
    optimizer.zero_grad()
    loss().backward()
    with torch.no_grad():
        for parameter, old in zip(moved, start, strict=True):
            parameter.copy_(old)
    optimizer.step()
    return first.detach()


@dataclass(frozen=True)
class Clock:
    """What a training took, per epoch and in seconds; CPU time stands still while a process is stopped."""

    cpu: float
    wall: float
    shifting: float  # CPU time that shifts take, beyond their steps' own; measured under SGD alone


def train(net: Network, setting: Setting, data: Data, recipe: Recipe) -> Clock:
    """Trains a new network, and leaves it in eval mode."""
    device = net.classifier.weight.device
    optimizer = torch.optim.SGD(
        net.parameters(), recipe.rate, momentum=recipe.momentum, weight_decay=setting.decay, nesterov=True
    )
    steps = recipe.images // recipe.batch
    cycle = OneCycleLR(optimizer, recipe.rate, total_steps=recipe.epochs * steps, pct_start=0.2, cycle_momentum=False)
    detach = attach(net, optimizer, data, setting, recipe) if setting.during else None
    shifts = round(setting.until * recipe.epochs * steps) // recipe.every
    generator = torch.Generator().manual_seed(setting.seed)
    augmented = recipe.augmented and data.pixels is not None
    around = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    padded = torch.from_numpy(np.pad(data.pixels.numpy(), around, mode="reflect")) if augmented else data.pixels
    updates: list[float] = []  # CPU seconds of every optimizer.step()
    taken = 0
    cpu, wall = time.process_time(), time.perf_counter()
    net.train()
    for _ in range(recipe.epochs):
        for batch in torch.randperm(recipe.images, generator=generator)[: steps * recipe.batch].split(recipe.batch):
            images = normalise(augment(padded, batch, generator)) if augmented else data.train.images[batch]
            images, labels = images.to(device), data.train.labels[batch].to(device)
            loss = lambda x=images, y=labels: F.cross_entropy(net(x), y)  # noqa: E731
            if setting.optimizer == "sam":
                sam_step(optimizer, loss, recipe.rho)
            else:
                optimizer.zero_grad()
                loss().backward()
                started = time.process_time()
                optimizer.step()
                updates.append(time.process_time() - started)
            cycle.step()
            taken += 1
            if detach and taken == shifts * recipe.every:
                detach()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    with_shift = updates[recipe.every - 1 : shifts * recipe.every : recipe.every] if detach else []
    shifting = sum(with_shift) - len(with_shift) * float(np.median(updates or [0.0]))
    net.eval()
    return Clock(cpu / recipe.epochs, wall / recipe.epochs, shifting / recipe.epochs)


def attach(
    net: Network, optimizer: torch.optim.Optimizer, data: Data, setting: Setting, recipe: Recipe
) -> Callable[[], None]:
    """Stochastic optimum shifting, each time on another class-balanced batch, until what is returned is called."""
    labels, generator = data.train.labels.numpy(), np.random.default_rng(setting.seed)
    device = net.classifier.weight.device

    def batch() -> Tensor:
        numbers = balanced_batch(labels, setting.during * net.classifier.out_features, generator)
        return data.train.images[torch.from_numpy(numbers)].to(device)

    only = None if setting.layers == "all" else lambda module, _: module is net.classifier
    return OptimumShift(net, recipe.every, batch=batch, filter_fn=only).attach(optimizer).remove
