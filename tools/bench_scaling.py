"""How time and memory of a run grow with samples, with the width of layers, and with their number.

    python tools/bench_scaling.py [--repeats 3] [--write]

Encoders of `bench_models.py` (sequences of 32 tokens, MLPs four times as wide) run with `--tolerance 0.02`, so that
every sample is captured, solved for and proved, and with `--recapture none`, which is what large models get. One of the
three numbers grows at a time. Slopes are those of lines through the logarithms of medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from bench_peaks import Passed, run_pass
from performance_page import make_model, picture, put
from plots import loglog, slope

BASE = {"samples": 128, "width": 128, "layers": 2}
SWEEPS = {"samples": (64, 256, 1024), "width": (64, 128, 256), "layers": (2, 4, 8)}
STAGES = ("capture", "solve", "verify", "peak")
UNITS = {"peak": "MiB"}
OPTIONS = ("--tolerance", "0.02", "--heldout", "none", "--recapture", "none")
TOKENS = 32


def sweep(variable: str, folder: Path, repeats: int) -> dict[int, list[Passed]]:
    """Runs on models that differ in one number."""
    found: dict[int, list[Passed]] = {}
    for value in SWEEPS[variable]:
        sizes = BASE | {variable: value}
        place = folder / f"{variable}-{value}"
        shape = {"width": sizes["width"], "layers": sizes["layers"], "tokens": TOKENS, "vocabulary": 1000}
        make_model("encoder", place, sizes["samples"], shape)
        model, data = place / "model.onnx", place / "calibration.npz"
        found[value] = [run_pass(model, data, sizes["samples"], *OPTIONS) for _ in range(repeats)]
        if failed := [run.failure for run in found[value] if run.failure]:
            raise SystemExit(f"{variable} {value}: {failed[0]}")
        print(f"  {variable} {value}: {found[value][-1].seconds}", file=sys.stderr, flush=True)
    return found


def figure(runs: list[Passed], stage: str) -> float:
    """Median of a stage's seconds, or of the peak in MiB."""
    return statistics.median(run.megabytes[0] if stage == "peak" else run.seconds[stage] for run in runs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variables", nargs="*", help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="tables and pictures into docs/")
    args = parser.parse_args()
    if unknown := set(args.variables) - set(SWEEPS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SWEEPS)}")
    lines = ["| number | values | capture | solve | verify | peak |", "|---" * 6 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for variable in args.variables or SWEEPS:
            found = sweep(variable, Path(folder), args.repeats)
            curves = {s: [(float(v), figure(runs, s)) for v, runs in found.items()] for s in STAGES}
            slopes = {stage: slope(curve) for stage, curve in curves.items()}
            cells = [
                f"{curve[0][1]:.3g} to {curve[-1][1]:.3g} {UNITS.get(stage, 's')}, slope {slopes[stage]:.2f}"
                for stage, curve in curves.items()
            ]
            lines.append(f"| {variable} | {', '.join(map(str, found))} | {' | '.join(cells)} |")
            if args.write:
                times = {stage: curves[stage] for stage in STAGES[:-1]}
                picture(variable, loglog(f"Time against {variable}", (variable, "seconds"), times, slopes))
    lines += ["", "Others than the one that grows: " + ", ".join(f"{k} {v}" for k, v in BASE.items()) + "."]
    lines.append(f"Medians of {args.repeats} runs.")
    print("\n".join(lines))
    if args.write:
        put("scaling", "\n".join(lines))


if __name__ == "__main__":
    main()
