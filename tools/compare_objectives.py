"""The objectives norm and curvature at equal deviation of the outputs: held-out loss, top-1, norm and Hessian trace.

    python tools/compare_objectives.py models/digits_mlp models/noisy_mlp --tolerances 0.01 0.1

A folder holds `model.onnx`, `calibration.npz` and `heldout.npz`, both with labels. All layers get one residual, found
so that the outputs on the calibration data deviate by the tolerance, within half a per cent, for either objective; so
what differs is only where the deviation went. Curvature is measured with several seeds, its figures are means over
them, and `+-` is the standard error of the paired difference over held-out samples. Prints a markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_optshift.calibration.source import Samples
from onnx_optshift.data import find_calibration
from onnx_optshift.decide.gate import Gate, Judged, paired
from onnx_optshift.decide.recapture import affordable, layer_by_layer
from onnx_optshift.diagnose.feature_curvature import feature_curvature
from onnx_optshift.diagnose.flatness import MOST_FLATNESS_SAMPLES, flatness, thinned
from onnx_optshift.diagnose.landscape import loss_of
from onnx_optshift.layers import Candidate, Layers
from onnx_optshift.settings import Settings
from onnx_optshift.workbench import Workbench, open_model, open_workbench

TOLERANCES = (0.01, 0.03, 0.1, 0.2)
CLOSE = 0.005
MOST_STEPS = 12
HEADER = ("model", "deviation", "objective", "NLL", "less norm's", "top-1", "norm²", "tr(WᵀMW)", "trace")


@dataclass(frozen=True)
class Measured:
    """One shifted model (or the original): mean figures over the seeds of its objective.

    Attributes:
        judged: On held-out data, one entry for each seed.
        norm: Mean over layers of ‖W‖²/‖V‖².
        weighted: Mean over layers of tr(WᵀMW)/tr(VᵀMV); None for the plain norm.
        trace: Of the loss's Hessian on calibration data; None where it was not asked for.
    """

    judged: Sequence[Judged]
    norm: float
    weighted: float | None
    trace: float | None

    @property
    def together(self) -> Judged:
        """Losses of each sample, mean over seeds."""
        losses = np.mean([judged.losses for judged in self.judged], axis=0)
        right = [judged.right for judged in self.judged if judged.right is not None]
        return Judged(losses, np.mean(right, axis=0) if right else None)


class Comparison:
    """One model with its data.

    Args:
        folder: Of the model.
        settings: What to shift, and how many samples.
        probes: Random directions of the Hessian trace; 0 for none.
    """

    def __init__(self, folder: Path, settings: Settings, probes: int) -> None:
        model, weights, _ = open_model(folder / "model.onnx", settings)
        self.bench: Workbench = open_workbench(model, weights, settings)
        self.samples = _data(self.bench, folder / "calibration.npz", settings)
        self.gate = Gate(self.bench, _data(self.bench, folder / "heldout.npz", Settings(labels=settings.labels)), 0.0)
        self.bench.plan(self.samples, metric=True)
        self._statistics = self.bench.collect(self.samples)
        self._probes = probes

    def layers(self, objective: str, seed: int) -> Layers:
        """The layers as the pass makes them."""
        slopes = feature_curvature(self.bench, self.samples, seed=seed) if objective == "curvature" else None
        read = self.bench.model.initializer
        return Layers(self.bench.weights, self._statistics, read, objective=objective, slopes=slopes)

    def ways(self, seeds: int) -> Iterator[tuple[str, list[Callable[[float], Candidate]]]]:
        """Name of each objective, and for each seed its shifts at a layer residual."""
        norm = self.layers("norm", 0)
        yield "norm", [norm.candidate]
        if affordable(norm):
            yield "norm, layer by layer", [lambda r: layer_by_layer(self.bench, norm, self.samples, r)]
        yield "curvature", [self.layers("curvature", seed).candidate for seed in range(seeds)]

    def at(self, candidate_at: Callable[[float], Candidate], deviation: float) -> Candidate:
        """Shifts whose outputs deviate as asked, on all calibration data: secant steps on the log-log scale."""
        low, high, residual = 0.0, 0.9, min(deviation, 0.9)
        for _ in range(MOST_STEPS):
            candidate = candidate_at(residual)
            found = self.bench.deviation(self.samples, candidate.arrays).largest_rel()
            if abs(found / deviation - 1) <= CLOSE:
                return candidate
            low, high = (residual, high) if found < deviation else (low, residual)
            guess = residual * deviation / found if found else high
            residual = guess if low < guess < high else (low + high) / 2
        raise SystemExit(f"{self.bench.model.where}: no layer residual makes the outputs deviate by {deviation:g}")

    def measure(self, candidates: Sequence[Candidate], seed: int = 0) -> Measured:
        """All figures of the shifts that the seeds of one objective gave; no candidate is the original."""
        arrays = [candidate.arrays for candidate in candidates] or [{}]
        solved = [entry for candidate in candidates for entry in candidate.solved.values()]
        norms = [(s.shift.norm_after / s.shift.norm_before) ** 2 if s.moved else 1.0 for s in solved]
        weighted = [s.weighted for s in solved if s.weighted is not None]
        few = thinned(self.samples, MOST_FLATNESS_SAMPLES, seed)
        traces = [
            flatness(
                self.bench, few, loss_of(self.bench, few), moved, probes=self._probes, seed=seed
            ).trace.before.value
            for moved in arrays
            if self._probes
        ]
        return Measured(
            [self.gate.run(moved) for moved in arrays],
            float(np.mean(norms)) if norms else 1.0,
            float(np.mean(weighted)) if weighted else None,
            float(np.mean(traces)) if traces else None,
        )


def _data(bench: Workbench, path: Path, settings: Settings) -> Samples:
    found = find_calibration(bench.model, [path], settings)
    if found is None or found.labels is None:
        raise SystemExit(f"{path}: labels are needed, as an array {settings.labels!r}.")
    return found


def line(model: str, deviation: str, objective: str, found: Measured, norm: Measured | None) -> str:
    """One row of the table."""
    score = found.together.score
    nll = f"{score.loss:.4f}"
    if len(found.judged) > 1:
        each = [judged.score.loss for judged in found.judged]
        nll += f" ({min(each):.4f}-{max(each):.4f})"
    less = "" if norm is None else "{:+.4f} +- {:.4f}".format(*paired(found.together.losses, norm.together.losses))
    cells = [model, deviation, objective, nll, less]
    cells += ["-" if score.top1 is None else f"{100 * score.top1:.2f}", f"{found.norm:.3f}"]
    cells += ["-" if found.weighted is None else f"{found.weighted:.3f}"]
    cells += ["-" if found.trace is None else f"{found.trace:.4g}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Reads the command line and prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES, metavar="EPS")
    parser.add_argument("--seeds", type=int, default=3, help="of the curvature's probes (default %(default)s)")
    parser.add_argument("--flatness", type=int, default=30, metavar="PROBES", help="0 for no trace (default 30)")
    parser.add_argument("--nodes-to-include", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--max-samples", type=int, default=None)
    arguments = parser.parse_args()
    settings = Settings(
        nodes_to_include=tuple(arguments.nodes_to_include), max_samples=arguments.max_samples, device="cpu"
    )
    print(f"| {' | '.join(HEADER)} |")
    print("|---" * len(HEADER) + "|")
    for folder in arguments.folders:
        comparison = Comparison(folder, settings, arguments.flatness)
        print(line(folder.name, "0", "none", comparison.measure([]), None), flush=True)
        ways = list(comparison.ways(arguments.seeds))
        for tolerance in arguments.tolerances:
            norm = None
            for name, seeds in ways:
                found = comparison.measure([comparison.at(candidate_at, tolerance) for candidate_at in seeds])
                print(line(folder.name, f"{tolerance:g}", name, found, norm), flush=True)
                norm = norm or found


if __name__ == "__main__":
    main()
