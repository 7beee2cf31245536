"""Small torch networks and data that leave directions free, and what is known of them by slow ways."""

import numpy as np
import torch
from torch import nn


class Classifier(nn.Module):
    """Convolutions with a stride, padding and groups, then linear layers wide enough to have freedom."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.norm = nn.GroupNorm(2, 8)
        self.hidden = nn.Linear(8 * 16, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, images):
        features = torch.relu(self.grouped(torch.relu(self.stem(images))))
        return self.head(torch.relu(self.hidden(self.norm(features).flatten(1))))


def images(count=30, seed=0):
    """Images `[count, 2, 8, 8]` whose second channel repeats the first: no patch reaches half of all directions."""
    one = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.cat([one, -2 * one], 1)


def trained(model, data, labels, steps=10, **choices):
    """A model after some steps of SGD, with decay off: what no row reaches stays as it was drawn."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, **choices)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data), labels).backward()
        optimizer.step()
    return model


def classifier(seed=0):
    """A trained `Classifier`, its images and labels."""
    torch.manual_seed(seed)
    data = images()
    labels = torch.arange(len(data)) % 5
    return trained(Classifier(), data, labels), data, labels


def weights(model):
    """All parameters, copied."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(before, after):
    """Whether all parameters are equal bit for bit."""
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def relative(value, reference):
    """‖value - reference‖ / ‖reference‖."""
    value, reference = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, float) for x in (value, reference))
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)
