"""A real task of many classes for `paper.py`: which module of Python's standard library a snippet comes from.

Classes are the largest modules of the Python that runs this, tests left out; samples are pieces of their text, cut one
after the other; inputs are counts of the triples of bytes in a piece, hashed to `BUCKETS`, square-rooted and centred.
Another version of Python has another text.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from paper_training import Data, Part, Recipe, with_wrong

MODULES, LENGTH, BUCKETS = 128, 400, 1024
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def largest_modules(count: int) -> list[Path]:
    """Files of the standard library, the largest first."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: (-path.stat().st_size, path))[:count]


def counts(text: str) -> NDArray[np.float32]:
    """Roots of the counts of a text's triples of characters, by bucket."""
    data = text.encode()
    found = [zlib.crc32(data[k : k + 3]) % BUCKETS for k in range(len(data) - 2)]
    return np.sqrt(np.bincount(found, minlength=BUCKETS)).astype(np.float32)


class Snippets:
    """As many pieces of every module as a recipe asks for."""

    classes = MODULES

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.each = (recipe.images + recipe.heldout + recipe.test) // MODULES
        pieces = []
        for path in largest_modules(MODULES):
            text = path.read_text(encoding="utf-8", errors="replace")
            cut = [text[start : start + LENGTH] for start in range(0, len(text) - LENGTH + 1, LENGTH)]
            if len(cut) < self.each:
                raise SystemExit(f"paper: {path} has {len(cut)} pieces of {LENGTH} characters, not {self.each}.")
            pieces.append(torch.from_numpy(np.stack([counts(piece) for piece in cut])))
        mean = torch.cat(pieces).mean(dim=0)
        self.pieces = [some - mean for some in pieces]

    def data(self, noise: float, seed: int) -> Data:
        """The pieces of a seed, the same number of every class in each part."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [some[torch.randperm(len(some), generator=generator)[: self.each]] for some in self.pieces]
        rows = torch.stack(drawn, dim=1).flatten(0, 1)
        labels = torch.arange(MODULES).repeat(self.each)
        first, second = self.recipe.images, self.recipe.images + self.recipe.heldout
        wrong = with_wrong(labels[:first], noise, MODULES, generator)
        parts = (rows[first:second], labels[first:second]), (rows[second:], labels[second:])
        return Data(Part(rows[:first], wrong), *(Part(*part) for part in parts))
