"""Flatness, sharpness and neural collapse before and after shifts at several tolerances and SOS, as a markdown table.

    python tools/flatness_table.py FOLDER [...] [--probes 32] [--max-samples N] [--only PATTERN]

A folder holds model.onnx and calibration.npz. Every shift is run with the gate off, so that the table shows what a
shift does and not whether it would be kept. Traces are changes along the same random directions before and after.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_optshift
from onnx_optshift.commands.diagnose import diagnose
from onnx_optshift.errors import InputError
from onnx_optshift.settings import Settings

SHIFTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("exact", {"tolerance": 0.0}),
    ("0.01", {"tolerance": 0.01}),
    ("0.1", {"tolerance": 0.1}),
    ("SOS", {"stochastic": 0}),
)
# The noise, as a share of each filter, whose sharpness is shown.
SIGMA = 0.1
COLUMNS = (
    "shift",
    "deviation",
    "norm²",
    "loss",
    "trace",
    "sharpness",
    "largest eigenvalue",
    "NC1",
    "NC2",
    "NC3",
    "NC4",
)


def rows(folder: Path, probes: int, choices: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for the original and one for each shift."""
    calibration = folder / "calibration.npz"
    first = True
    for name, chosen in SHIFTS:
        settings = {**choices, **chosen}
        try:
            result = onnx_optshift.shift(
                folder / "model.onnx", calibration, heldout="none", flatness=probes, **settings
            )
        except InputError as error:
            yield (name, str(error), *[""] * (len(COLUMNS) - 2))
            continue
        report = result.report
        found = report.to_dict()["flatness"] or {}
        if first:
            first = False
            yield (
                "none",
                "0",
                "1",
                *_figures(found, "before"),
                *_collapse(folder / "model.onnx", calibration, choices),
            )
        moved = [layer for layer in report.layers if layer.norm_before]
        ratio = sum((layer.norm_after / layer.norm_before) ** 2 for layer in moved) / max(1, len(moved))
        deviation = max((output.rel for output in report.verification.outputs), default=0.0)
        after = _collapse(result.path, calibration, choices)
        yield (name, f"{deviation:.2g}", f"{ratio:.3g}", *_figures(found, "after"), *after)


def _figures(found: dict[str, Any], side: str) -> tuple[str, ...]:
    sharp = next((row["rise"][side] for row in found["sharpness"] if row["sigma"] == SIGMA), None)
    trace = found["trace"]
    change = trace.get("change") if side == "after" else None
    error = f" ({change['value']:+.3g} ± {change['error']:.2g})" if change else ""
    return (
        f"{found[f'loss_{side}']:.4g}",
        f"{trace[side]['value']:.4g}{error}",
        f"{sharp['value']:.3g}" if sharp else "",
        _bracket(found[f"top_{side}"]),
    )


def _bracket(eigenvalue: dict[str, Any] | None) -> str:
    return f"{eigenvalue['lower']:.3g} to {eigenvalue['upper']:.3g}" if eigenvalue else ""


def _collapse(model: Path, calibration: Path, choices: dict[str, Any]) -> tuple[str, ...]:
    report = diagnose(model, [calibration], ["none"], Settings(**choices), probes=0)
    features = (report.to_dict()["collapse"] or {}).get("features")
    if not features:
        return ("", "", "", "")
    figures = (features["nc1"], features["nc2_angles"], features["nc3"], features["nc4"])
    return tuple("" if figure is None else f"{figure:.3g}" for figure in figures)


def main() -> None:
    """Reads the command line and prints a table for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--probes", type=int, default=32, help="random directions for each layer (default: 32)")
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--only", nargs="+", default=[], help="layers, as --nodes-to-include takes them")
    arguments = parser.parse_args()
    choices = {"max_samples": arguments.max_samples, "nodes_to_include": tuple(arguments.only), "device": "cpu"}
    for folder in arguments.folders:
        print(f"\n{folder.name}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for row in rows(folder, arguments.probes, choices):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
