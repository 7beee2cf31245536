"""One model at few bits: round-to-nearest, GPTQ, MagR with either, and this package, by what held-out data sees.

    python tools/compare_rounding.py MODEL.onnx --calib FILE --heldout FILE [--bits 4 3 2] [--block 32]

Every weight that the pass can solve for is quantized, and nothing else. The error is that of the model's outputs on
held-out data, relative to the float original's; top-1 and loss need labels there. Peers are written from their papers:

- GPTQ (Frantar et al. 2022, arXiv 2210.17323): inputs in the order of their energy, damping of 1 % of the mean
  diagonal.
- MagR (Zhang et al. 2024, arXiv 2406.00800): `½‖XW - XV‖² + α Σ_j ‖w_j‖_∞` by 150 steps of proximal gradient, with
  step 1/λmax; of several α the one of least error on the calibration rows once rounded is taken.

Both use the plain Gram matrix of the rows, as published; the pass is run by its defaults, `--tolerance auto`, with and
without weights on the grid.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import onnx_optshift
from onnx_optshift.decide.gate import Gate
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.quantize.rtn import Grid, round_to_nearest
from onnx_optshift.run.capture import captured
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.finish import as_matrix, finished
from onnx_optshift.solve.granularity import Granularity
from onnx_optshift.solve.objective import Norm, make_grids

DAMPING = 0.01
STEPS = 150
# Of λmax of the Gram matrix divided by d, as MagR's own script scales it.
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Row:
    """What held-out data sees of one way: relative error of the outputs, loss, share that is right; and seconds."""

    bits: int
    way: str
    error: float
    loss: float
    top1: float | None
    seconds: float


def gptq(matrix: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """Quantizes `[g, d, m]` input by input, each time letting those that are left make up for the error."""
    granularity = Granularity(grid.scope, grid.block or 1)
    cells = granularity.cells(matrix)
    half = 2 ** (grid.bits - 1)
    largest = cells.gather(2, cells.abs().argmax(2, keepdim=True))
    scale = largest / -half if grid.levels == "full" else largest.abs() / (half - 1)
    scale = granularity.matrix(torch.where(scale == 0, 1.0, scale).expand_as(cells), matrix.shape)
    low = -half if grid.levels == "full" else 1 - half
    result = torch.empty_like(matrix)
    for group in range(len(matrix)):
        order = gram[group].diagonal().argsort(descending=True)
        hessian = gram[group][order][:, order]
        ridge = (DAMPING * hessian.diagonal().mean()).clamp_min(1e-300)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + ridge * torch.eye(len(order)).to(hessian)))
        upper = torch.linalg.cholesky(inverse, upper=True)
        work, scales = matrix[group][order].clone(), scale[group][order]
        for i in range(len(order)):
            rounded = (work[i] / scales[i]).round().clamp(low, half - 1) * scales[i]
            work[i + 1 :] -= upper[i, i + 1 :, None] * ((work[i] - rounded) / upper[i, i])
            work[i] = rounded
        result[group, order] = work
    return result


def magr(matrix: Tensor, gram: Tensor, alpha: float, granularity: Granularity) -> Tensor:
    """MagR's proximal gradient; the prox of the max-norm takes off the projection on the l1 ball."""
    step = 1 / torch.linalg.eigvalsh(gram)[:, -1].clamp_min(1e-300)[:, None, None]
    strength = alpha / gram.shape[-1] * (1 / step)
    found = matrix.clone()
    for _ in range(STEPS):
        point = found - step * (gram @ (found - matrix))
        cells = granularity.cells(point)
        ordered, _ = cells.abs().sort(dim=2, descending=True)
        count = torch.arange(1, cells.shape[2] + 1).to(ordered)[:, None]
        level = ((ordered.cumsum(2) - (step * strength)[:, None]) / count).amax(2, keepdim=True).clamp_min(0)
        found = granularity.matrix(torch.minimum(torch.maximum(cells, -level), level), matrix.shape)
    return found


def best_magr(matrix: Tensor, gram: Tensor, grid: Grid, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The rounded weight of the α that is closest on the calibration rows."""
    granularity = Granularity(grid.scope, grid.block or 1)
    found = [rounded(magr(matrix, gram, alpha, granularity)) for alpha in ALPHAS]
    return min(found, key=lambda weight: float(((gram @ (weight - matrix)) * (weight - matrix)).sum()))


WAYS = ("RTN", "GPTQ", "MagR + RTN", "MagR + GPTQ", "narrowed + RTN", "on the grid")


def measure(
    model: Path,
    calib: Sequence[str],
    heldout: Sequence[str],
    bits: Sequence[int],
    *,
    block: int | None = None,
    include: Sequence[str] = (),
    max_samples: int | None = None,
    ways: Sequence[str] = WAYS,
) -> Iterator[Row]:
    """The float model, then every way at every bit width."""
    warnings.simplefilter("ignore")
    settings = Settings(nodes_to_include=tuple(include), max_samples=max_samples)
    prepared = prepare(model, settings, calib, heldout)
    layers, _ = captured(prepared, prepared.data, Norm())
    bench, judges = prepared.bench, prepared.data.heldout
    gate = Gate(bench.outputs, judges, 0.0)

    def score(width: int, way: str, arrays: dict[str, np.ndarray], seconds: float) -> Row:
        error = bench.outputs.deviation(judges, arrays).largest_rel()
        found = gate.run(arrays).score
        return Row(width, way, error, found.loss, found.top1, seconds)

    def quantized(width: int, way: str, quantize: Callable[[Tensor, Tensor], Tensor]) -> Row:
        start, arrays = time.perf_counter(), {}
        for weight in bench.weights:
            content = bench.model.initializer(weight.name)
            matrix = as_matrix(content, weight.form)
            arrays[weight.name] = finished(quantize(matrix, layers.moments(weight).gram()), weight.form, content.dtype)
        return score(width, way, arrays, time.perf_counter() - start)

    def passed(grid: Grid, way: str, *, snap: bool) -> Row:
        start = time.perf_counter()
        result = onnx_optshift.shift(
            model,
            list(calib),
            heldout=list(heldout),
            objective="range",
            tolerance="auto",
            quantization_bits=grid.bits,
            range_block=block,
            snap=snap,
            nodes_to_include=tuple(include),
            max_samples=max_samples,
        )
        seconds, shifted, arrays = time.perf_counter() - start, ModelFile.load(result.path), {}
        for weight in bench.weights:
            content = shifted.initializer(weight.name)
            rounded = round_to_nearest(as_matrix(content, weight.form), grid)
            arrays[weight.name] = finished(rounded, weight.form, content.dtype)
        return score(grid.bits, way, arrays, seconds)

    yield score(32, "float", {}, 0.0)
    for grid in make_grids(bits, "channel", block):
        nearest, fed_back = partial(round_to_nearest, grid=grid), partial(gptq, grid=grid)
        found: dict[str, Callable[[str], Row]] = {
            "RTN": lambda way, g=grid, f=nearest: quantized(g.bits, way, lambda v, _: f(v)),
            "GPTQ": lambda way, g=grid: quantized(g.bits, way, lambda v, h: gptq(v, h, g)),
            "MagR + RTN": lambda way, g=grid, f=nearest: quantized(g.bits, way, partial(best_magr, grid=g, rounded=f)),
            "MagR + GPTQ": lambda way, g=grid, f=fed_back: quantized(
                g.bits, way, lambda v, h: best_magr(v, h, g, lambda w: f(w, h))
            ),
            "narrowed + RTN": lambda way, g=grid: passed(g, way, snap=False),
            "on the grid": lambda way, g=grid: passed(g, way, snap=True),
        }
        for way in ways:
            yield found[way](way)


def main() -> None:
    """Reads the command line and prints one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True, nargs="+")
    parser.add_argument("--heldout", required=True, nargs="+")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--block", type=int, help="inputs that share a scale; a channel by default")
    parser.add_argument("--nodes-to-include", nargs="+", default=[])
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    given = parser.parse_args()
    for row in measure(
        given.model,
        given.calib,
        given.heldout,
        given.bits,
        block=given.block,
        include=given.nodes_to_include,
        max_samples=given.max_samples,
        ways=given.ways,
    ):
        top1 = "" if row.top1 is None else f"  top-1 {100 * row.top1:.2f} %"
        print(
            f"{row.bits} bits  {row.way:15} error {row.error:.4f}  loss {row.loss:.4f}{top1}  {row.seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
