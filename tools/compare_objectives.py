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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnx_optshift.decide.gate import Gate, Judged, paired
from onnx_optshift.decide.recapture import layer_by_layer, worth_it
from onnx_optshift.diagnosis.flatness import flatness_of
from onnx_optshift.run.candidate import Candidate
from onnx_optshift.run.capture import layers_maker
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import make_objective

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


@dataclass(frozen=True)
class Way:
    """One objective's shifts.

    Attributes:
        name: For the table.
        layers: What is solved, once for each seed.
        candidate_at: Layer residual -> shifts, likewise.
    """

    name: str
    layers: Sequence[Layers]
    candidate_at: Sequence[Callable[[float], Candidate]]


class Comparison:
    """One model with its data.

    Args:
        folder: Of the model.
        settings: What to shift, and how many samples.
        probes: Random directions of the Hessian trace; 0 for none.
    """

    def __init__(self, folder: Path, settings: Settings, probes: int) -> None:
        settings = replace(settings, objective="curvature")  # so that memory for it is planned
        files = [[folder / f"{part}.npz"] for part in ("calibration", "heldout")]
        self._prepared = prepare(folder / "model.onnx", settings, *files)
        data = self._prepared.data
        if data is None or data.heldout is None or data.calibration.labels is None or data.heldout.labels is None:
            raise SystemExit(f"{folder}: labels are needed, as an array {settings.labels!r}.")
        self.bench, self.samples = self._prepared.bench, data.calibration
        self.gate = Gate(self.bench.outputs, data.heldout, 0.0)
        self._statistics = self.bench.statistics(self.samples)
        self._probes = probes

    def layers(self, objective: str, seed: int = 0) -> Layers:
        """The layers as the pass makes them."""
        seeded = replace(self._prepared, settings=replace(self._prepared.settings, seed=seed))
        return layers_maker(seeded, seeded.data, make_objective(objective))(self._statistics)

    def ways(self, seeds: int) -> Iterator[Way]:
        """All objectives; curvature with so many seeds."""
        norm = self.layers("norm")
        yield Way("norm", [norm], [norm.candidate])
        if worth_it(norm, "auto"):
            yield Way("norm, layer by layer", [norm], [lambda r: layer_by_layer(self.bench, norm, self.samples, r)])
        curvature = [self.layers("curvature", seed) for seed in range(seeds)]
        yield Way("curvature", curvature, [layers.candidate for layers in curvature])

    def at(self, candidate_at: Callable[[float], Candidate], deviation: float) -> Candidate:
        """Shifts whose outputs deviate as asked, on all calibration data: secant steps on the log-log scale."""
        low, high, residual = 0.0, 0.9, min(deviation, 0.9)
        for _ in range(MOST_STEPS):
            candidate = candidate_at(residual)
            found = self.bench.outputs.deviation(self.samples, candidate.arrays).largest_rel()
            if abs(found / deviation - 1) <= CLOSE:
                return candidate
            low, high = (residual, high) if found < deviation else (low, residual)
            guess = residual * deviation / found if found else high
            residual = guess if low < guess < high else (low + high) / 2
        raise SystemExit(f"{self.bench.model.where}: no layer residual makes the outputs deviate by {deviation:g}")

    def measured(self, way: Way, deviation: float) -> Measured:
        """All figures of a way's shifts whose outputs deviate as asked."""
        return self.measure([self.at(candidate_at, deviation) for candidate_at in way.candidate_at], way.layers)

    def measure(self, candidates: Sequence[Candidate], layers: Sequence[Layers]) -> Measured:
        """All figures of the shifts that the seeds of one objective gave; no candidate is the original."""
        arrays = [candidate.arrays for candidate in candidates] or [{}]
        norms, weighted = [], []
        for candidate, solver in zip(candidates, layers, strict=True):
            for name, solved in candidate.solved.items():
                norms.append((solved.shift.norm_after / solved.shift.norm_before) ** 2 if solved.moved else 1.0)
                if solver.objective.needs_slopes and solved.moved and not solved.note:
                    weighted.append((solved.figure / solver.facts[name].figure) ** 2)
        settings = self._prepared.settings
        traces = [
            flatness_of(self.bench, self.samples, settings, moved, self._probes).trace
            for moved in arrays
            if self._probes
        ]
        return Measured(
            [self.gate.run(moved) for moved in arrays],
            float(np.mean(norms)) if norms else 1.0,
            float(np.mean(weighted)) if weighted else None,
            float(np.mean([(trace.after or trace.before).value for trace in traces])) if traces else None,
        )


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
        print(line(folder.name, "0", "none", comparison.measure([], []), None), flush=True)
        ways = list(comparison.ways(arguments.seeds))
        for tolerance in arguments.tolerances:
            norm = None
            for way in ways:
                found = comparison.measured(way, tolerance)
                print(line(folder.name, f"{tolerance:g}", way.name, found, norm), flush=True)
                norm = norm or found


if __name__ == "__main__":
    main()
