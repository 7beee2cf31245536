"""Runs that keep what they do, and die: what the tests of checkpoints share."""

from __future__ import annotations

import numpy as np
import tiny_models as tiny

import onnx_optshift
from onnx_optshift.run import checkpoint_folder
from onnx_optshift.run.bench import Bench

# 4 samples a batch: 12 batches fit and 3 judge; the rows of the wider layer become a Gram matrix in the middle of it.
# The last inputs are always 0: freedom for an exact shift.
DATA = {"x": tiny.weight(60, 24, seed=1) * (np.arange(24) < 15), "labels": np.arange(60) % 3}
DATA["x"] = DATA["x"].astype(np.float32)
WAYS = {
    "exact": {},
    "tolerance": {"tolerance": 0.05},
    "on a grid": {"tolerance": "auto", "objective": "range", "quantization_bits": 4},
    "stochastic": {"stochastic": 12, "heldout": "none"},
    "curvature": {"objective": "curvature", "tolerance": 0.05},
}


class Killed(BaseException):
    """As if the process had died here: nobody catches it."""


def run(model, folder=None, data=DATA, *, batch_size=4, **options):
    """The bytes of the shifted model, and the report."""
    result = onnx_optshift.shift(model, data, batch_size=batch_size, checkpoint=folder, **options)
    return result.path.read_bytes(), result.report


def killed_after(monkeypatch, saves, model, folder, **options):
    """A run that dies after so many saves; whether it came to that."""
    save, count = checkpoint_folder.Folder._save, 0

    def dying(self, name, entry):
        nonlocal count
        save(self, name, entry)
        count += 1
        if count == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.Folder, "_save", dying)
        try:
            run(model, folder, **options)
        except Killed:
            return True
    return False


def entries(folder, kind=""):
    return sorted(folder.glob(f"*/{kind}*.safetensors"))


def captures(monkeypatch):
    """Counts batches that are really run for statistics."""
    seen, capture = [], Bench.capture

    def counting(self, taps, samples, stage, spanning, begun):
        seen.append((len(samples), begun.done))
        return capture(self, taps, samples, stage, spanning, begun)

    monkeypatch.setattr(Bench, "capture", counting)
    return seen


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
