"""Layers that read weighed rows: the rules of `stats.row_weights`, from a few samples, shared where layers agree.

In one Frobenius norm the rows of the largest outputs own the tolerance: in trained transformers 1 to 3 per cent of the
tokens (separators) have outputs 35 times the median's norm, and a residual of 2 per cent over all rows then lets an
ordinary row be wrong by half. With `diag(√w) A` in place of A everything else stays as it is; exact solutions are the
same, as an equation may be scaled.

Medians come from a pass over a few samples, so that the weight of a row depends on nothing but the row: weighted
moments stay additive. Layers that read one input share its statistics where their weights agree on those samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onnx_optshift.calibration.source import Batch, Samples
from onnx_optshift.capture.stream import stream
from onnx_optshift.geometry import Tap
from onnx_optshift.graph.weights import Weight
from onnx_optshift.run.bench import Bench
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.stats.row_weights import FLOOR, MOST_SAMPLES, RowRule, Rows, energies
from onnx_optshift.stats.rows import to_rows

# Layers share statistics where 99 of 100 rows have weights within this factor of the mean's: what a residual means then
# differs by less than its square root.
AGREEMENT = 1.5


def output_rows(bench: Bench, samples: Samples) -> dict[str, Rows]:
    """Energies of the output rows of every layer, by weight, from one pass over a few evenly spaced samples."""
    few = samples.spread(MOST_SAMPLES)
    matrices = {weight.name: _matrix(bench, weight) for weight in bench.weights}
    found: dict[str, list[Tensor]] = {weight.name: [] for weight in bench.weights}
    by_tap: dict[Tap, list[str]] = {}
    for weight in bench.weights:
        for use in weight.uses:
            by_tap.setdefault(use.tap, []).append(weight.name)

    def sink(tap: Tap, _: Batch, activation: Tensor) -> None:
        rows = to_rows(activation, tap)
        for name in by_tap[tap]:
            found[name].append(energies(rows, matrices[name]).cpu())

    for wave in bench.waves:
        stream(bench.sessions.probe(wave), wave, few.batches(min(bench.batch_size, MOST_SAMPLES)), sink)
    bench.sessions.rest()
    kept = {name: torch.cat(parts) for name, parts in found.items() if parts}
    finite = {name: values[values.isfinite()] for name, values in kept.items()}
    return {name: Rows(values) for name, values in finite.items() if len(values) and float(values.sum()) > 0}


def weighed(bench: Bench, rows: Mapping[str, Rows]) -> Bench:
    """The same bench, whose layers read rows that are weighed by their own outputs.

    Args:
        bench: Whose layers count every row alike.
        rows: Of `output_rows`; layers that are not in it stay as they are.
    """
    rules: dict[str, RowRule] = {}
    names: dict[str, str] = {}
    for group in _sharing(bench.weights, rows):
        name = group[0].name
        matrices = [_matrix(bench, weight) for weight in group]
        rules[name] = RowRule.of(matrices, [rows[weight.name].median for weight in group])
        names |= {weight.name: name for weight in group}

    def by_rule(weight: Weight) -> Weight:
        if weight.name not in names:
            return weight
        uses = tuple(replace(use, tap=replace(use.tap, weighed=names[weight.name])) for use in weight.uses)
        return replace(weight, uses=uses)

    weights = tuple(map(by_rule, bench.weights))
    return replace(bench, weights=weights, waves=(), rules=rules)


def _sharing(weights: Sequence[Weight], rows: Mapping[str, Rows]) -> list[list[Weight]]:
    """Layers with rows, those together that read the same input and whose weights agree."""
    groups: list[list[Weight]] = []
    for weight in (weight for weight in weights if weight.name in rows):
        taps = [use.tap for use in weight.uses]
        fitting = (
            group
            for group in groups
            if [use.tap for use in group[0].uses] == taps and _agree([rows[w.name] for w in (*group, weight)])
        )
        group = next(fitting, None)
        if group is None:
            groups.append([weight])
        else:
            group.append(weight)
    return groups


def _agree(layers: Sequence[Rows]) -> bool:
    if len({len(layer.energies) for layer in layers}) > 1:
        return False  # rows that were not finite in one of them
    shares = torch.stack([layer.energies / layer.median for layer in layers])
    weights, shared = 1 / shares.clamp_min(FLOOR), 1 / shares.mean(0).clamp_min(FLOOR)
    ratios = torch.maximum(weights / shared, shared / weights)
    return float(ratios.amax(0).quantile(0.99)) <= AGREEMENT if ratios.shape[1] < 2**24 else False


def _matrix(bench: Bench, weight: Weight) -> Tensor:
    return as_matrix(bench.model.initializer(weight.name), weight.form, bench.device.solve).to(torch.float32)
