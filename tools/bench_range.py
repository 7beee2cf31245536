"""Time of the range objective for d x m weights, as a multiple of one eigendecomposition of the same d.

    python tools/bench_range.py 256 512 1024 --tolerance 0.03 --repeats 3 --threads 1

All ways are measured in turn in one process, on rows with a decaying spectrum; medians are printed. They are the range
objective at three gaps (the share of the range that may lie above the optimum: 0.1 for the start of a rounding, 0.005
for a solution of its own), and MagR (Zhang et al. 2024, arXiv 2406.00800; 150 steps, one α for all columns) with the α
that ends at the same residual. `range` is the mean range of the columns after, relative to before; `residual` that of
the whole weight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from compare_rounding import STEPS, magr
from torch import Tensor

from onnx_optshift.solve import grid_rounding, quant_range
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.quant_range import Narrowest
from onnx_optshift.solve.spectrum import Coordinates, factor, relative_residual
from onnx_optshift.stats.moments import InputMoments

ROUNDING_UNIT = 2.0**-24
GAPS = (quant_range.GAP, 0.01, grid_rounding.START_GAP)

Result = TypeVar("Result")


def seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def gauss_moments(width: int, decades: float, generator: torch.Generator) -> InputMoments:
    """Moments of 2d Gaussian rows of which the inputs differ in size by so many decades."""
    scale = torch.logspace(0, -decades, width, dtype=torch.float64)
    moments = InputMoments(1, width)
    moments.update(torch.randn(1, 2 * width, width, generator=generator, dtype=torch.float64) * scale)
    return moments


def equal_magr(
    matrix: Tensor, gram: Tensor, wanted: float, residual: Callable[[Tensor], float]
) -> Callable[[], Tensor]:
    """MagR with the α whose result has the wanted residual, found by bisection."""
    low, high = -12.0, 12.0
    while high - low > 0.02:
        middle = (low + high) / 2
        far = residual(magr(matrix, gram, 10**middle, Granularity())) > wanted
        low, high = (low, middle) if far else (middle, high)
    return partial(magr, matrix, gram, 10**low, Granularity())


def main() -> None:
    """Reads the command line and prints some lines per width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=int, nargs="+", metavar="D", help="inputs of the layer")
    parser.add_argument("--columns", type=int, metavar="M", help="outputs of the layer; D when not given")
    parser.add_argument("--decades", type=float, default=3, help="over which the inputs' sizes spread (default 3)")
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; as many as it takes by itself when not given")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} thread(s), {arguments.decades:g} decades, tolerance {arguments.tolerance:g}")
    print(f"{'d':>5} {'m':>5} {'way':>9} {'seconds':>8} {'x eigh':>7} {'iterations':>10} {'range':>6} {'residual':>8}")
    for width in arguments.widths:
        columns = arguments.columns or width
        generator = torch.Generator().manual_seed(width)
        moments = gauss_moments(width, arguments.decades, generator)
        matrix = torch.randn(1, width, columns, generator=generator, dtype=torch.float64)
        gram, spectrum = moments.gram(), factor(moments)
        coordinates = Coordinates.of(spectrum, matrix, ROUNDING_UNIT)
        residual = partial(relative_residual, spectrum, matrix)
        ways: dict[str, Callable[[], object]] = {"eigh": partial(torch.linalg.eigh, gram)}
        for gap in GAPS:
            ways[f"gap {gap:g}"] = partial(
                quant_range.narrowest, coordinates, arguments.tolerance, Granularity(), gap=gap
            )
        ways["MagR"] = equal_magr(matrix, gram, arguments.tolerance, residual)
        times: dict[str, list[float]] = {way: [] for way in ways}
        found: dict[str, object] = {}
        for _ in range(arguments.repeats):
            for way, work in ways.items():
                taken, found[way] = seconds(work)
                times[way].append(taken)
        eigh = statistics.median(times["eigh"])
        for way, result in found.items():
            if way == "eigh":
                continue
            steps = result.iterations if isinstance(result, Narrowest) else STEPS
            weight = result.matrix if isinstance(result, Narrowest) else result
            assert isinstance(weight, Tensor)
            share = float(weight.abs().amax(1).mean() / matrix.abs().amax(1).mean())
            taken = statistics.median(times[way])
            print(
                f"{width:5} {columns:5} {way:>9} {taken:8.2f} {taken / eigh:7.1f} {steps:10} {share:6.3f} "
                f"{residual(weight):8.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
