"""Wall time of one run in 1, 2, ... processes on one host, each with one thread on a processor of its own.

    python tools/bench_distributed.py [--processes 1 2] [--samples 256] [--repeats 3] [--layers 6] [--width 384]
        [--json FILE] [-- OPTIONS of onnx_optshift]

The model is the encoder of `bench_models.py`. One process is `python -m onnx_optshift`, several are torchrun; with N of
them N processors are used, so that 1 and N differ in nothing but their number. Runs alternate. Efficiency is the time
of one process over N times that of N, the median of the ratios within one round: of the whole command with all that it
loads, and of the run's own parts, as its report has them. The default options are `--tolerance 0.02 --heldout none`:
all samples are captured and all layers move.

It insists that weights move, and that all numbers of processes write the same ones, to 1e-6 of each one's norm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from bench_models import encoder
from onnx import numpy_helper

PARTS = ("capture", "solve", "verify", "total")
DEFAULT_OPTIONS = ("--tolerance", "0.02", "--heldout", "none")
CLOSE = 1e-6


def run(count: int, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """Seconds of the command and of its parts, by name."""
    report, out = folder / "report.json", folder / f"out{count}.onnx"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = [*(several if count > 1 else []), "-m", "onnx_optshift", str(folder / "model.onnx"), str(out)]
    words += ["--calib", str(folder / "calibration.npz"), "--report", str(report), "--quiet", *options]
    processors = sorted(os.sched_getaffinity(0))[:count]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, processors),
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{count} processes: {done.stderr[-2000:]}")
    timing = json.loads(report.read_text(encoding="utf-8"))["timing"]
    return {"command": seconds, **{part: timing[part] for part in PARTS}}


def weights(path: Path) -> dict[str, np.ndarray]:
    """All initializers of a file, float64."""
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(path).graph.initializer}


def farthest(path: Path, other: Path) -> float:
    """The largest difference of a weight of two files, relative to its norm."""
    found, expected = weights(path), weights(other)
    return max(float(np.linalg.norm(found[n] - a) / (np.linalg.norm(a) or 1.0)) for n, a in expected.items())


def table(runs: dict[int, list[dict[str, float]]]) -> list[str]:
    """Medians, speed-ups and efficiencies, as Markdown."""
    one, *others = runs
    lines = [
        "| part | " + " | ".join(f"{n} process{'es' * (n > 1)}" for n in runs) + " |",
        "|---" * (len(runs) + 1) + "|",
    ]
    for part in ("command", *PARTS[::-1]):
        cells = [f"{statistics.median(r[part] for r in runs[one]):.1f} s"]
        for n in others:
            pairs = zip(runs[one], runs[n], strict=True)
            speedup = statistics.median(a[part] / b[part] if b[part] else float("nan") for a, b in pairs)
            median = statistics.median(r[part] for r in runs[n])
            cells.append(f"{median:.1f} s, {speedup:.2f}x, efficiency {speedup * one / n:.2f}")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Makes the model, runs all rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="of onnx_optshift, after --")
    args = parser.parse_args()
    if max(args.processes) > len(os.sched_getaffinity(0)):
        parser.error(f"there are {len(os.sched_getaffinity(0))} processors")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder(folder, args.samples, width=args.width, layers=args.layers, tokens=args.tokens)
        runs: dict[int, list[dict[str, float]]] = {count: [] for count in args.processes}
        for _ in range(args.repeats):
            for count, found in runs.items():
                found.append(run(count, folder, args.options or DEFAULT_OPTIONS))
                print(
                    f"{count}: " + ", ".join(f"{k} {v:.1f} s" for k, v in found[-1].items()),
                    file=sys.stderr,
                    flush=True,
                )
        first, *others = (folder / f"out{count}.onnx" for count in runs)
        far = max((farthest(path, first) for path in others), default=0.0)
        moved = farthest(first, folder / "model.onnx")
    print("\n".join(table(runs)))
    print(f"\nweights differ by {far:.1g} of their norms at most; medians of {args.repeats} alternating runs")
    if args.json:
        args.json.write_text(json.dumps({"runs": runs, "difference": far}, indent=1), encoding="utf-8")
    if not far <= CLOSE < moved:
        raise SystemExit(f"expected {CLOSE:g} at most, and more from the original's, where it is {moved:.1g}")


if __name__ == "__main__":
    main()
