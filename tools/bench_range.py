"""Time of the range objective for d x m weights, as a multiple of one eigendecomposition of the same d.

    python tools/bench_range.py 512 1024 --tolerance 0.03 --repeats 3 --threads 1

Both are measured in turn in one process, on rows with a decaying spectrum; medians and their ratio are printed. `range`
is the mean range of the columns after, relative to before; `gap` is the share of it that may lie above the optimum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from onnx_optshift.solve import quant_range
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.quant_range import Narrowest
from onnx_optshift.solve.spectrum import Coordinates, Spectrum, factor
from onnx_optshift.stats.moments import InputMoments

ROUNDING_UNIT = 2.0**-24

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


def main() -> None:
    """Reads the command line and prints a line per width."""
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
    titles = f"{'d':>5} {'m':>5} {'eigh':>9} {'objective':>10} {'ratio':>6} {'iterations':>10} {'gap':>8} {'range':>6}"
    print(f"{torch.get_num_threads()} thread(s), {arguments.decades:g} decades, tolerance {arguments.tolerance:g}")
    print(titles)
    for width in arguments.widths:
        columns = arguments.columns or width
        generator = torch.Generator().manual_seed(width)
        moments = gauss_moments(width, arguments.decades, generator)
        matrix = torch.randn(1, width, columns, generator=generator, dtype=torch.float64)
        gram, spectrum = moments.gram(), factor(moments)

        def narrow(spectrum: Spectrum = spectrum, matrix: Tensor = matrix) -> Narrowest:
            coordinates = Coordinates.of(spectrum, matrix, ROUNDING_UNIT)
            return quant_range.narrowest(coordinates, arguments.tolerance, Granularity())

        eigh_times, times = [], []
        for _ in range(arguments.repeats):
            eigh_times.append(seconds(lambda gram=gram: torch.linalg.eigh(gram))[0])  # type: ignore[misc]
            taken, found = seconds(narrow)
            times.append(taken)
        eigh, objective = statistics.median(eigh_times), statistics.median(times)
        print(
            f"{width:5} {columns:5} {eigh:8.2f}s {objective:9.2f}s {objective / eigh:6.1f} {found.iterations:10} "
            f"{found.gap:8.1e} {1 - found.gain:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
