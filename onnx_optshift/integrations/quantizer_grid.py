"""The grid of any quantizer, read off a file that it wrote: which options name it, and whether weights came through it.

    python -m onnx_optshift.integrations.quantizer_grid FLOAT.onnx QUANTIZED.onnx

Quantize the original once: the table says which scales and levels the quantizer took, layer by layer, and which options
of the pass write that grid. Quantize the shifted file: each difference should be that of float rounding. Read are the
integer weights of DequantizeLinear and of ONNX Runtime's MatMulNBits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_optshift.errors import InputError, OptShiftError
from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.graph.weights import Weight
from onnx_optshift.integrations.integer_weights import integer_weights

Array = NDArray[Any]
# A scale in float32, times 8 levels, is this far from the float64 product at most: 8 * 2^-24.
REPRODUCED = 5e-7


@dataclass(frozen=True)
class Quantized:
    """What a quantizer made of one weight V `[g, d, m]`.

    Attributes:
        weight: The weight of the float file.
        bits: Of its integers.
        scales: What shares a scale, in words.
        levels: Which levels the largest weight of each cell (what shares a scale) was given, in words.
        difference: Largest difference from the float file's weight, relative to its largest entry.
        options: Of the pass, that write this grid; None where there are none.
    """

    weight: Weight
    bits: int
    scales: str
    levels: str
    difference: float
    options: str | None


def read_grids(original: str, quantized: str) -> tuple[list[Quantized], list[Weight]]:
    """What became of each weight, and the weights that were not found among integer weights.

    Args:
        original: Path of the float model that was quantized.
        quantized: Path of what the quantizer wrote. Its tensors' names begin with those of the float file.

    Raises:
        InputError: A file is no model, or scales do not fit their weight.
    """
    model = ModelFile.load(original)
    weights = {weight.name: weight for weight in discover(model, Selection())[0]}
    found: dict[str, Quantized] = {}
    for name, bits, levels, scales, zero in integer_weights(ModelFile.load(quantized)):
        owners = [weight for weight in weights.values() if name.startswith(weight.name)]
        owner = max(owners, key=lambda weight: len(weight.name), default=None)
        if owner is not None and levels.size == math.prod(owner.shape):
            content = model.initializer(owner.name)
            ways = [(levels, scales, zero), (levels.T, scales.T, zero.T)]  # stored either way round
            fitting = (_compared(owner, content, bits, *way) for way in ways if way[0].shape == content.shape)
            closest = min(fitting, key=lambda one: one.difference, default=None)
            if closest is not None:
                found.setdefault(owner.name, closest)
    return list(found.values()), [weight for name, weight in weights.items() if name not in found]


def _compared(weight: Weight, original: Array, bits: int, levels: Array, scales: Array, zero: Array) -> Quantized:
    sides = (weight.form.to_matrix(side).astype(np.float64) for side in (original, scales, zero, levels))
    values, scale, shift, whole = sides
    largest = max(float(np.abs(values).max(initial=0)), np.finfo(np.float64).tiny)
    difference = float(np.abs((whole - shift) * scale - values).max(initial=0)) / largest
    inputs, outputs = _run(scale, 1), _run(scale, 2)
    cells = np.abs(values / np.where(scale == 0, 1, scale))
    for axis, run in ((1, inputs), (2, outputs)):
        cells = np.maximum.reduceat(cells, range(0, cells.shape[axis], run), axis)
    half = 2 ** (bits - 1)
    reach = float(np.median(cells))
    steady = bool((np.abs(cells - reach) < 1e-3 * half).mean() > 0.9)  # cells of zeros apart
    kind = "zero point" if shift.any() else f"largest at {reach:.4g}" if steady else "largest clipped"
    exact = round(reach, 2) if steady and not shift.any() else 0
    names, options = _scales(inputs, outputs, weight.d, weight.m), None
    written = {"output channel": "", "tensor": "--range-scope tensor"}.get(names)
    if outputs == 1 and inputs < weight.d:
        written = f"--range-block {inputs}"
    if written is not None and exact in {half - 1, half}:
        usual = (exact == half) == written.startswith("--range-block")
        more = "" if usual else f" --range-levels {'full' if exact == half else 'symmetric'}"
        options = f"{written}{more}".strip() or "(the default)"
    return Quantized(weight, bits, names, kind, difference, options)


def _run(scale: Array, axis: int) -> int:
    """Steps along an axis after which scales may change: the whole axis where they never do."""
    changes = np.flatnonzero((np.diff(scale, axis=axis) != 0).any(tuple({0, 1, 2} - {axis}))) + 1
    return math.gcd(*changes.tolist()) if changes.size else scale.shape[axis]


def _scales(inputs: int, outputs: int, d: int, m: int) -> str:
    if inputs == d:
        return "tensor" if outputs == m and m > 1 else "output channel"
    if outputs == 1:
        return f"block of {inputs} inputs"
    return "input channel" if outputs == m else f"block of {outputs} outputs"


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    if len(argv) != 2:
        print("expected two files: FLOAT.onnx QUANTIZED.onnx.", file=sys.stderr)
        return InputError.exit_code
    try:
        found, missing = read_grids(*argv)
    except OptShiftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    lines = [("layer", "d x m", "bits", "a scale for", "levels", "difference", "options")]
    for q in found:
        size, options = f"{q.weight.d} x {q.weight.m}", q.options or "none writes this grid"
        lines.append((q.weight.name, size, str(q.bits), q.scales, q.levels, f"{q.difference:.1e}", options))
    lines += [(w.name, f"{w.d} x {w.m}", "", "", "not found among integers", "", "") for w in missing]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    same = sum(q.difference <= REPRODUCED for q in found)
    print(f"{same} of {len(found)} integer weights are those of the float file.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
