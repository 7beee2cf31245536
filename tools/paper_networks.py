"""The networks of `paper.py`: a residual and a densely connected one, as small as a CPU wants them or full size.

ResNet: He, Zhang, Ren and Sun, CVPR 2016; DenseNet: Huang, Liu, van der Maaten and Weinberger, CVPR 2017. `full` gives
the forms of ResNet-18 and DenseNet-121 that are usual for images of 32 x 32: a 3x3 stem and no pooling after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from train_cifar import Block, conv_norm

COLOURS = 3


class Network(nn.Module):
    """A body that turns images into features `[n, d]`, and a linear classifier."""

    def __init__(self, body: nn.Sequential, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]`."""
        return self.classifier(self.body(x))


def resnet(*, stem: int, stem_stride: int, widths: tuple[int, ...], blocks: int, first_stride: int) -> nn.Sequential:
    """Residual blocks; each stage halves the side, the first one by `first_stride`."""
    layers: list[nn.Module] = [conv_norm(COLOURS, stem, stride=stem_stride), nn.ReLU()]
    inputs = stem
    for stage, outputs in enumerate(widths):
        for k in range(blocks):
            layers.append(Block(inputs, outputs, 1 if k else 2 if stage else first_stride))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def norm_conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """BatchNorm, ReLU, convolution: DenseNet's order."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv)


class DenseLayer(nn.Module):
    """Appends `growth` channels to those that it was given; a 1x1 convolution before makes the 3x3 one cheap."""

    def __init__(self, inputs: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        inner = bottleneck * growth
        self.grow = nn.Sequential(norm_conv(inputs, inner, 1), norm_conv(inner, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `[n, inputs + growth, h, w]`."""
        return torch.cat([x, self.grow(x)], dim=1)


def densenet(*, stem: int, stem_stride: int, growth: int, layers: tuple[int, ...], bottleneck: int) -> nn.Sequential:
    """Dense blocks; between them half of the channels, at half the side."""
    parts: list[nn.Module] = [nn.Conv2d(COLOURS, stem, 3, stem_stride, padding=1, bias=False)]
    channels = stem
    for number, count in enumerate(layers):
        if number:
            parts += [norm_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(count):
            parts.append(DenseLayer(channels, growth, bottleneck))
            channels += growth
    return nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(inputs: int, *widths: int) -> nn.Sequential:
    """Linear layers, each with a ReLU."""
    pairs = [(nn.Linear(*sides), nn.ReLU()) for sides in itertools.pairwise((inputs, *widths))]
    return nn.Sequential(*itertools.chain(*pairs))


@dataclass(frozen=True)
class Form:
    """How a body is built, and the width d of its features."""

    build: Callable[[], nn.Sequential]
    features: int


FORMS = {
    ("tiny", "resnet"): Form(partial(resnet, stem=8, stem_stride=4, widths=(16,), blocks=1, first_stride=2), 16),
    ("tiny", "densenet"): Form(partial(densenet, stem=4, stem_stride=4, growth=4, layers=(1, 2), bottleneck=1), 12),
    ("small", "resnet"): Form(
        partial(resnet, stem=16, stem_stride=2, widths=(32, 64, 128), blocks=1, first_stride=2), 128
    ),
    ("small", "densenet"): Form(
        partial(densenet, stem=24, stem_stride=4, growth=16, layers=(3, 4, 4), bottleneck=2), 114
    ),
    ("text", "mlp"): Form(partial(mlp, 1024, 512, 512), 512),
    ("full", "resnet"): Form(
        partial(resnet, stem=64, stem_stride=1, widths=(64, 128, 256, 512), blocks=2, first_stride=1), 512
    ),
    ("full", "densenet"): Form(
        partial(densenet, stem=64, stem_stride=1, growth=32, layers=(6, 12, 24, 16), bottleneck=4), 1024
    ),
}


def network(size: str, kind: str, classes: int) -> Network:
    """A new network with random weights, in channels-last memory order."""
    form = FORMS["small" if size == "long" else size, kind]
    return Network(form.build(), form.features, classes).to(memory_format=torch.channels_last)
