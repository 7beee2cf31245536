"""Peak memory of whole runs against the number of samples, and under limits: predicted, measured, held or refused.

    python tools/bench_peaks.py [--magika DIR] [--write]

The peak is the process's largest resident size, interpreter and libraries included; predicted is what the run announced
before it began. Models are those of `bench_models.py`, smaller ones, with data read from a file. Limits are shares of
the memory that the run takes without one, beyond what the bare process has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench_memory import measure
from performance_page import make_model, picture, put
from plots import loglog, slope

LIMIT_GB, TIMEOUT = 16.0, 600.0
# A token model with wide outputs, which are kept and compared; a network of 10,000 rows; and magika, where it is.
SHIFTED = ("--tolerance", "0.02", "--heldout", "none", "--recapture", "none")
CASES = {
    "encoder": ((100, 1000, 10000), {"width": 64, "layers": 2, "tokens": 16, "vocabulary": 1000}, SHIFTED),
    "mlp": ((1000, 10000), {"features": 256, "width": 512}, SHIFTED),
    "magika": ((160, 1600), {}, ()),
}
# What is run under limits: statistics of many layers, which a pass for each part of them saves.
LIMITED, LIMITED_SAMPLES = {"width": 192, "layers": 6, "tokens": 16, "vocabulary": 1000}, 64
# Shares of what a run takes beyond its bare process; some more than all, as that is not the same to the byte each time.
LIMITS = (1.05, 0.7, 0.5, 0.2)


@dataclass(frozen=True)
class Passed:
    """One finished run of the pass."""

    peak: int  # bytes
    predicted: int  # bytes
    seconds: dict[str, float]  # by stage
    failure: str = ""

    @property
    def megabytes(self) -> tuple[float, float]:
        """Measured and predicted."""
        return self.peak / 2**20, self.predicted / 2**20


def run_pass(model: Path, calibration: Path, samples: int, *options: str) -> Passed:
    """Runs `python -m onnx_optshift` in a process of its own; `failure` is its message where it refused."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = [str(model), str(Path(folder) / "out.onnx"), "--calib", str(calibration), "--report", str(report)]
        command = [sys.executable, "-m", "onnx_optshift", *words, "--max-samples", str(samples), *options]
        run = measure(command, LIMIT_GB, TIMEOUT)
        if run.failure:
            return Passed(run.peak, 0, {"whole": run.seconds}, run.detail or run.failure)
        found = json.loads(report.read_text(encoding="utf-8"))
    return Passed(run.peak, found["predicted_memory_bytes"], found["timing"] | {"whole": run.seconds})


def growth(name: str, model: Path, calibration: Path) -> list[tuple[int, Passed]]:
    """Runs on more and more samples."""
    counts, _, options = CASES[name]
    return [(count, run_pass(model, calibration, count, *options)) for count in counts]


def limited(place: Path) -> list[str]:
    """The table of limits: each is kept, or refused before anything runs."""
    make_model("encoder", place, LIMITED_SAMPLES, LIMITED)
    model, data, samples = place / "model.onnx", place / "calibration.npz", LIMITED_SAMPLES
    free = run_pass(model, data, samples, *SHIFTED)
    refused = run_pass(model, data, samples, *SHIFTED, "--max-memory", "1M").failure
    used = int(refused.partition("(process ")[2].split()[0])  # MiB
    measured, predicted = free.megabytes
    sizes = ", ".join(f"{name} {size:,}" for name, size in LIMITED.items())
    lines = [f"Under limits, an encoder ({sizes}) on {samples} sequences. The bare process is {used} MiB of it.", ""]
    lines += ["| `--max-memory` | predicted | measured | whole process |", "|---|---|---|---|"]
    lines.append(f"| none | {predicted:.0f} MiB | {measured:.0f} MiB | {free.seconds['whole']:.1f} s |")
    for share in LIMITS:
        limit = round(used + share * (predicted - used))
        found = run_pass(model, data, samples, *SHIFTED, "--max-memory", f"{limit}M")
        now, planned = found.megabytes
        held = f"{planned:.0f} MiB | {now:.0f} MiB, {'held' if now <= limit else 'not held'}"
        if found.failure and "predicted peak" not in found.failure:
            raise SystemExit(f"--max-memory {limit}M: {found.failure}")
        said = "refused before anything ran | " if found.failure else held
        lines.append(f"| {limit} MiB | {said} | {found.seconds['whole']:.1f} s |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--magika", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "magika")
    parser.add_argument("--write", action="store_true", help="tables and picture into docs/")
    args = parser.parse_args()
    lines = ["| model | samples | predicted | measured | to the row above |", "|---|---|---|---|---|"]
    curves: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models or CASES:
            counts, sizes, _ = CASES[name]
            place = args.magika if name == "magika" else Path(folder) / name
            if name != "magika":
                make_model(name, place, counts[-1], sizes)
            elif not (place / "model.onnx").exists():
                print(f"magika: skipped: no model.onnx in {place}", file=sys.stderr)
                continue
            model, data = place / "model.onnx", place / "calibration.npz"
            runs = growth(name, model, data)
            for k, (count, found) in enumerate(runs):
                if found.failure:
                    raise SystemExit(f"{name}, {count} samples: {found.failure}")
                ratio = f"{found.peak / runs[k - 1][1].peak:.3f}x" if k else ""
                measured, predicted = found.megabytes
                lines.append(f"| {name} | {count:,} | {predicted:.0f} MiB | {measured:.0f} MiB | {ratio} |")
            curves[name] = [(count, found.megabytes[0]) for count, found in runs]
        limits = limited(Path(folder) / "limited") if not args.models else []
    text = "\n".join([*lines, "", *limits])
    print(text)
    if args.write:
        put("peaks", text)
        slopes = {name: slope(curve) for name, curve in curves.items()}
        picture("peaks", loglog("Peak memory against samples", ("samples", "peak, MiB"), curves, slopes))


if __name__ == "__main__":
    main()
