"""Time of an exact run against its floor, a naive script, and another package's calibrated pass over the weights.

    python tools/bench.py [MODEL ...] [--repeats 5] [--threads N] [--magika DIR] [--json FILE] [--write]
    python tools/bench.py encoder --profile            what eats the time, by purpose and kind of work

MODEL is one or more of magika, encoder, cnn, mlp; all where none is named. The floor is in `bench_floor.py`, the models
are made by `bench_models.py`, the naive script is that of `bench_memory.py`. The peer is GPTQ of ONNX Runtime's
`MatMulNBitsQuantizer` where the weights are MatMuls, and its static quantization (MinMax) for convolutions.

Every run is a process of its own, and runs of all columns alternate. A ratio is the median of the ratios within one
round. The naive script and the peer are left out of further rounds once they have taken `--others` seconds in all;
one that takes longer than `--timeout` counts as a lower bound. `--write` puts table and picture into docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Nothing heavy: the children's peaks are measured, and Linux carries a parent's over to them.
from bench_memory import Run, measure
from performance_page import make_model, picture, put
from plots import stacked_bars

TOOLS = Path(__file__).parent
MAGIKA = TOOLS.parents[1] / "shared" / "data" / "magika"
SAMPLES = {"magika": 400, "encoder": 64, "cnn": 128, "mlp": 512}
WORDS = {
    "magika": "magika: one-hot MatMul, Conv, Dense",
    "encoder": "encoder: 6 layers, 384 wide, 128 tokens",
    "cnn": "cnn: ResNet-18 at a quarter of its widths",
    "mlp": "mlp: 1,024 to 4,096 to 4,096 to 10",
}
PEERS = {"cnn": "minmax"}  # GPTQ takes MatMul alone
LIMIT_GB = 16.0
FLOOR, OURS = ("pass", "gram", "factor"), ("capture", "solve", "verify")


@dataclass
class Column:
    """Finished runs of one kind, in the order of the rounds."""

    runs: list[Run] = field(default_factory=list)
    details: list[dict[str, float]] = field(default_factory=list)  # what each run measured itself, in seconds

    @property
    def seconds(self) -> list[float]:
        """Wall time of each process."""
        return [run.seconds for run in self.runs]


@dataclass
class Row:
    """All runs on one model."""

    name: str
    samples: int
    floor: Column = field(default_factory=Column)
    ours: Column = field(default_factory=Column)
    naive: Column = field(default_factory=Column)
    peer: Column = field(default_factory=Column)

    def part(self, column: str, *names: str) -> list[float]:
        """Sums of parts that the runs of a column measured themselves."""
        return [sum(detail[name] for name in names) for detail in getattr(self, column).details]


def run_peer(kind: str, model: Path, calibration: Path, out: Path, samples: int) -> None:
    """One pass of another package over the weights of a file."""
    import numpy as np
    from quantizers import nbits, static

    quantizer = nbits("GPTQ", 32, samples) if kind == "gptq" else static("MinMax", samples)
    with np.load(calibration) as file:
        quantizer.run(model, out, {name: file[name] for name in file.files if name != "labels"})


def rounds(name: str, model: Path, calibration: Path, args: argparse.Namespace) -> Row:
    """All rounds on one model."""
    row = Row(name, args.samples or SAMPLES[name])
    samples = ["--samples", str(row.samples)]
    with tempfile.TemporaryDirectory() as folder:
        out, report, floor = (Path(folder) / file for file in ("out.onnx", "report.json", "floor.json"))
        files = [str(model), str(calibration)]
        ours = ["-m", "onnx_optshift", str(model), str(out), "--calib", str(calibration), "--report", str(report)]
        commands = {
            "floor": [str(TOOLS / "bench_floor.py"), *files, *samples, "--json", str(floor)],
            "ours": [*ours, "--max-samples", str(row.samples)],
            "naive": [str(TOOLS / "bench_memory.py"), *files, *samples, "--naive-out", str(out)],
            "peer": [__file__, *files, str(out), *samples, "--run-peer", PEERS.get(name, "gptq")],
        }
        for _ in range(args.repeats):
            for kind, command in commands.items():
                column: Column = getattr(row, kind)
                others = kind in {"naive", "peer"}
                if others and (sum(column.seconds) > args.others or any(run.failure for run in column.runs)):
                    continue
                run = measure([sys.executable, *command], LIMIT_GB, args.timeout if others else 3600.0)
                column.runs.append(run)
                print(f"  {name} {kind}: {run.seconds:.1f} s {run.failure} {run.detail}", file=sys.stderr, flush=True)
                if run.failure and not others:
                    raise SystemExit(f"{name} {kind}: {run.failure}: {run.detail}")
                if kind == "floor":
                    column.details.append(json.loads(floor.read_text(encoding="utf-8")))
                if kind == "ours":
                    column.details.append(json.loads(report.read_text(encoding="utf-8"))["timing"])
                    out.unlink()
    return row


def ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=False))


def other(column: Column, ours: Column) -> str:
    """A cell: a whole process of something else, as a multiple of ours."""
    if not column.runs:
        return "not run"
    (last,) = column.runs[-1:]
    if last.failure.startswith("exit"):
        return f"failed: {last.detail[:80]}"
    times, count = ratio(column.seconds, ours.seconds), len(column.runs)
    if last.failure:
        return f"over {times:.1f}x (stopped at {last.seconds:.0f} s)" if last.failure == "timeout" else last.failure
    return f"{times:.2f}x ({statistics.median(column.seconds):.1f} s, {count} run{'s' * (count > 1)})"


def cells(row: Row) -> list[str]:
    """One line of the table."""
    floor = row.part("floor", *FLOOR)
    parts = [statistics.median(row.part("floor", part)) for part in FLOOR]
    ours = [statistics.median(row.part("ours", part)) for part in OURS]
    return [
        f"{WORDS[row.name]}; {row.samples} samples",
        f"{statistics.median(floor):.2f} s ({' + '.join(f'{part:.2f}' for part in parts)})",
        f"{ours[0]:.2f} + {ours[1]:.2f} s",
        f"**{ratio(row.part('ours', 'capture', 'solve'), floor):.2f}x**",
        f"{ours[2]:.2f} s, {ratio(row.part('ours', 'verify'), row.part('floor', 'pass')):.1f} passes",
        f"{ratio(row.part('ours', *OURS), floor):.2f}x",
        f"{statistics.median(row.ours.seconds):.1f} s",
        other(row.naive, row.ours),
        other(row.peer, row.ours),
    ]


HEAD = (
    "model and data", "floor: pass + Gram + factor", "capture + solve", "to the floor", "verify", "with verify",
    "whole process", "naive script, to ours", "peer, to ours",
)  # fmt: skip


def table(rows: Sequence[Row], threads: int) -> str:
    """The markdown table, with what it was measured on."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(f"| {' | '.join(cells(row))} |" for row in rows)]
    count = min(len(row.ours.runs) for row in rows)
    ways = sorted({way for row in rows for detail in row.floor.details for way in detail["ways"]})
    made = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, medians of {count} rounds."
    return "\n".join([
        *lines,
        "",
        f"Measured on {made} Products of the floor, whichever was fastest: {', '.join(ways)}.",
    ])


def chart(rows: Sequence[Row]) -> str:
    """Floor and run of each model, as multiples of the floor."""
    bars = []
    for row in rows:
        floor = statistics.median(row.part("floor", *FLOOR))
        shares = [statistics.median(row.part("floor", part)) / floor for part in FLOOR]
        ours = [statistics.median(row.part("ours", part)) / floor for part in OURS]
        bars += [(f"{row.name}, floor", [*shares, 0, 0, 0]), (f"{row.name}, this pass", [0, 0, 0, *ours])]
    parts = ["plain pass", "Gram", "factor", "capture", "solve", "verify"]
    return stacked_bars("An exact run against its floor", "Time, as a multiple of the floor", parts, bars)


def cases(names: Sequence[str], magika: Path, folder: Path, samples: int | None) -> list[tuple[str, Path, Path]]:
    """Model and data of every name; those that are made are made now. A line for one that is not there."""
    found = []
    for name in names:
        place = magika if name == "magika" else folder / name
        if name != "magika":
            make_model(name, place, samples or SAMPLES[name])
        elif not (place / "model.onnx").exists():
            print(f"magika: skipped: no model.onnx in {place}; name its folder with --magika", file=sys.stderr)
            continue
        found.append((name, place / "model.onnx", place / "calibration.npz"))
    return found


def use_threads(count: int | None) -> int:
    """Keeps this process, and those that it starts, to some cores and as many threads."""
    cores = sorted(os.sched_getaffinity(0))[: count or None]
    os.sched_setaffinity(0, cores)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(len(cores))
    return len(cores)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of " + ", ".join(SAMPLES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, help="for every model (default: a number of its own)")
    parser.add_argument("--threads", type=int, help="cores and threads of each process (default: all)")
    parser.add_argument("--magika", type=Path, default=MAGIKA, metavar="DIR", help="model.onnx and calibration.npz")
    parser.add_argument(
        "--others", type=float, default=10.0, help="seconds after which naive and peer are not repeated"
    )
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds of one naive or peer run")
    parser.add_argument("--profile", action="store_true", help="say where the time of one run goes, and nothing else")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    parser.add_argument("--write", action="store_true", help="table and picture into docs/")
    parser.add_argument("--run-peer", choices=("gptq", "minmax"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_peer:
        model, calibration, out = map(Path, args.models)
        run_peer(args.run_peer, model, calibration, out, args.samples)
        return
    if unknown := set(args.models) - set(SAMPLES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SAMPLES)}")
    threads = use_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = cases(args.models or list(SAMPLES), args.magika, Path(folder), args.samples)
        if args.profile:
            for name, model, calibration in found:
                samples = str(args.samples or SAMPLES[name])
                print(f"{name}, {samples} samples, {threads} threads; the floor:", flush=True)
                floor = [str(TOOLS / "bench_floor.py"), str(model), str(calibration), "--samples", samples]
                whole = [str(TOOLS / "bench_profile.py"), str(model), "--calib", str(calibration)]
                subprocess.run([sys.executable, *floor], check=True)
                subprocess.run([sys.executable, *whole, "--max-samples", samples], check=True)
            return
        rows = [rounds(name, model, calibration, args) for name, model, calibration in found]
    text = table(rows, threads)
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"threads": threads, "rows": [asdict(row) for row in rows]}, indent=1))
    if args.write:
        put("floor", text)
        picture("floor", chart(rows))


if __name__ == "__main__":
    main()
