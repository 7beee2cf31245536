"""From costs that are measured here to a model of 7B parameters and a million samples on GPUs: passes, bytes, hours.

    python tools/bench_extrapolation.py [--samples 1000000] [--gpus 1 64] [--write]

Operations are counted from the shapes of the model. What each costs beyond them is measured in this process, as a
multiple of the time of plain matrix products of about the same size, and how often a run goes over its data is counted
in two. Speeds and sizes of the GPU are published figures. The hours are at its full published speed: divide them by the
share of it that products reach.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_models
import numpy as np
import torch
from performance_page import put

import onnx_optshift
from onnx_optshift.capture.session import Session
from onnx_optshift.solve.objective import Norm
from onnx_optshift.solve.problem import ROUNDING_UNIT, Problem
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments

WIDTH, ROWS, REPEATS = 768, 4096, 4
TOLERANCE, SAMPLES = 0.02, (1024, 2048)
# Layers of large models are not solved one after the other unless that is asked for.
OPTIONS: dict[str, Any] = {"tolerance": TOLERANCE, "heldout": "none", "recapture": "none", "device": "cpu"}


@dataclass(frozen=True)
class Gpu:
    """Published figures of one GPU, dense and without TensorFloat-32."""

    name: str = "NVIDIA H100 SXM"
    source: str = "NVIDIA H100 Tensor Core GPU datasheet"
    single: float = 67e12  # float32 operations a second
    double: float = 67e12  # float64, by tensor cores
    memory: float = 80e9  # bytes
    link: float = 450e9  # bytes a second in each direction


@dataclass(frozen=True)
class Shape:
    """The linear layers of LLaMA-2-7B (arXiv 2307.09288), for samples of some tokens each."""

    blocks: int = 32
    width: int = 4096
    hidden: int = 11008
    vocabulary: int = 32000
    tokens: int = 512

    @property
    def inputs(self) -> list[int]:
        """Widths of the distinct inputs of all blocks: q, k and v share one, gate and up another."""
        return self.blocks * [self.width, self.width, self.width, self.hidden]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """D x m of all weights in blocks."""
        d, h = self.width, self.hidden
        return self.blocks * [(d, d), (d, d), (d, d), (d, d), (d, h), (d, h), (h, d)]

    @property
    def parameters(self) -> int:
        """Entries that a token is multiplied with."""
        return sum(d * m for d, m in self.matrices) + self.vocabulary * self.width


def seconds(work: Callable[[], object]) -> float:
    """Of the quickest of a few calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measured() -> dict[str, float]:
    """Costs in operations of plain float64 products, per n d² (Gram), d³ (eigh) and d² m (a solution); and passes."""
    rows = torch.randn(1, ROWS, WIDTH, dtype=torch.float64)
    square = torch.randn(1, WIDTH, WIDTH, dtype=torch.float64)
    rate = 2 * WIDTH**3 / seconds(lambda: square @ square)
    moments = InputMoments(1, WIDTH)
    moments.update(rows)
    gram, spectrum = moments.gram(), factor(moments)

    def solve() -> None:
        problem = Problem(spectrum, square, ROUNDING_UNIT["float32"])
        problem.residual(Norm().solve(problem, TOLERANCE).matrix)

    return {
        "gram": seconds(lambda: moments.update(rows)) * rate / (ROWS * WIDTH**2),
        "eigh": seconds(lambda: torch.linalg.eigh(gram)) * rate / WIDTH**3,
        "solution": seconds(solve) * rate / WIDTH**3,
        "passes": passes(),
        "rate": rate,
    }


def passes() -> float:
    """How often a run with a tolerance sends each further sample through a model, capture and proof included.

    Settings are tried on a fixed number of samples at most: that part is left out by the difference of two runs.
    """
    inner, counts = Session._run, [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        bench_models.encoder(Path(folder), SAMPLES[-1], width=64, layers=2, tokens=16, vocabulary=500)
        files = [str(Path(folder) / name) for name in ("model.onnx", "calibration.npz")]
        for k, samples in enumerate(SAMPLES):

            def counting(self: Session, feeds: Mapping[str, Any], names: list[str], k: int = k) -> list[Any]:
                counts[k] += len(np.asarray(feeds["ids"]))
                return inner(self, feeds, names)

            Session._run = counting  # type: ignore[method-assign]
            try:
                onnx_optshift.shift(*files, max_samples=samples, **OPTIONS)
            finally:
                Session._run = inner  # type: ignore[method-assign]
    return (counts[1] - counts[0]) / (SAMPLES[1] - SAMPLES[0])


def table(costs: Mapping[str, float], samples: int, gpus: list[int], gpu: Gpu, shape: Shape) -> str:
    """What a run takes, step by step, and what of that was measured."""
    tokens = samples * shape.tokens
    squares = sum(d**2 for d in shape.inputs)
    forward = 2.0 * shape.parameters * tokens
    gram = costs["gram"] * squares * tokens
    eigh = costs["eigh"] * sum(d**3 for d in shape.inputs)
    solution = costs["solution"] * sum(d**2 * m for d, m in shape.matrices)
    moments, weights = 8 * squares, 4 * shape.parameters
    # A factorization is as large as the moments that it is made from, and both are held.
    waves = max(1, -(-2 * moments // int(0.8 * gpu.memory - weights)))
    more = costs["passes"] - 1 + waves
    passed = f"forward: {waves} passes to capture, {costs['passes'] - 1:.1f} to judge and prove"
    # What, how many operations, the GPU's speed for them, and how many GPUs can share it.
    steps: list[tuple[str, float, float, int]] = [
        (passed, more * forward, gpu.single, samples),
        ("Gram matrices", gram, gpu.double, samples),
        ("eigh, one for each input", eigh, gpu.double, len(shape.inputs)),
        ("solutions", solution, gpu.double, len(shape.matrices)),
    ]
    hours = {count: [work / rate / min(count, most) / 3600 for _, work, rate, most in steps] for count in gpus}
    sent = {count: moments / gpu.link / 3600 if count > 1 else 0.0 for count in gpus}
    head = ["step", "count", *(f"{count} GPU{'s' * (count > 1)}" for count in gpus)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for k, (what, work, _, _) in enumerate(steps):
        cells = " | ".join(_time(hours[count][k]) for count in gpus)
        lines.append(f"| {what} | {work:.1e} operations | {cells} |")
    cells = " | ".join(_time(sent[count]) for count in gpus)
    lines.append(f"| moments to their owners | {moments / 1e9:.0f} GB from each GPU | {cells} |")
    totals = " | ".join(f"**{sum(hours[count]) + sent[count]:.1f} h**" for count in gpus)
    lines += [f"| **all** | | {totals} |", ""]
    lines += [
        f"For {samples:,} samples of {shape.tokens} tokens. Held: {moments / 1e9:.0f} GB of moments in float64 and as "
        f"much of factorizations, beside {weights / 1e9:.0f} GB of weights in float32; in 80 % of a GPU's memory that "
        f"makes {waves} wave{'s' * (waves > 1)}.",
        "",
        f"Measured here, on the CPU ({costs['rate'] / 1e9:.0f} Gflop/s in float64 products): Gram {costs['gram']:.2f} "
        f"operations of products per n d² (1 is the least, as G is symmetric), `eigh` {costs['eigh']:.0f} per d³, "
        f"a solution with its residual {costs['solution']:.1f} per d² m; passes over the data {costs['passes']:.1f}.",
        "",
        f"Published ({gpu.source}), not measured: {gpu.name}, {gpu.single / 1e12:.0f} Tflop/s in float32 and "
        f"{gpu.double / 1e12:.0f} in float64, {gpu.memory / 1e9:.0f} GB, {gpu.link / 1e9:.0f} GB/s between GPUs. That "
        "the multiples are the same on a GPU is assumed.",
    ]
    return "\n".join(lines)


def _time(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 1 else f"{3600 * hours:.1f} s"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--write", action="store_true", help="the table into docs/")
    args = parser.parse_args()
    text = table(measured(), args.samples, args.gpus, Gpu(), Shape())
    print(text)
    if args.write:
        put("extrapolation", text)


if __name__ == "__main__":
    main()
