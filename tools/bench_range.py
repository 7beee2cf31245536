"""Time of the range objective for d x d weights, as a multiple of one eigendecomposition of the same d.

    python tools/bench_range.py 512 1024 --tolerance 0.03 --repeats 3

Both are measured in turn in one process, on rows with a decaying spectrum; medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from onnx_optshift.solve import quant_range
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments

ROUNDING_UNIT = 2.0**-24


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Wall time of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Reads the command line and prints a line per width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", type=int, nargs="+", metavar="D")
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'d = m':>6} {'eigh':>9} {'objective':>10} {'ratio':>6} {'iterations':>11} {'range':>6}")
    for width in arguments.widths:
        generator = torch.Generator().manual_seed(width)
        decay = torch.logspace(0, -3, width, dtype=torch.float64)
        rows = torch.randn(2 * width, width, generator=generator, dtype=torch.float64) * decay
        matrix = torch.randn(1, width, width, generator=generator, dtype=torch.float64)
        moments = InputMoments(1, width)
        moments.update(rows[None])
        gram, spectrum = moments.gram(), factor(moments)
        times: dict[str, list[float]] = {"eigh": [], "objective": []}
        for _ in range(arguments.repeats):
            times["eigh"].append(seconds(lambda gram=gram: torch.linalg.eigh(gram))[0])
            taken, shift = seconds(
                lambda spectrum=spectrum, matrix=matrix: quant_range.solve(
                    spectrum, matrix, arguments.tolerance, ROUNDING_UNIT
                )
            )
            times["objective"].append(taken)
        eigh, objective = (statistics.median(times[name]) for name in ("eigh", "objective"))
        print(
            f"{width:6} {eigh:8.2f}s {objective:9.2f}s {objective / eigh:6.1f} {shift.iterations:11} "
            f"{shift.range_after / shift.range_before:6.3f}"
        )


if __name__ == "__main__":
    main()
