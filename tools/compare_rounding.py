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
from onnx_optshift.write.patch import write_beside

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
    """MagR's proximal gradient in float32; the prox of the max-norm takes off the projection on the l1 ball."""
    largest = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(1e-300)[:, None, None]
    strength = alpha / gram.shape[-1]  # the step is 1/λmax, and α is a share of λmax
    target, slope = matrix.to(torch.float32), (gram / largest).to(torch.float32)
    found, level = target.clone(), None
    for _ in range(STEPS):
        cells = granularity.cells(found - slope @ (found - target))
        level = _clip_level(cells.abs(), strength, level)
        found = granularity.matrix(torch.minimum(torch.maximum(cells, -level), level), matrix.shape)
    return found.to(matrix)


def _clip_level(sizes: Tensor, excess: float, guess: Tensor | None) -> Tensor:
    """The level above which the sizes of a cell add up to an excess, or 0: Newton's steps, exact after a few."""
    level = torch.zeros_like(sizes[:, :, :1]) if guess is None else guess
    while True:
        above = (sizes - level).clamp_min_(0)
        moved = (above.sum(2, keepdim=True) - excess) / (above > 0).sum(2, keepdim=True).clamp_min(1)
        # From above the level the first step goes below it, or beyond 0; from below they only climb.
        level = (level + moved).clamp_min(0)
        if float(moved.max()) <= 1e-6 * float(level.max()):
            return level


def best_magr(matrix: Tensor, gram: Tensor, narrow: Sequence[Tensor], rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The rounded weight of the α that is closest on the calibration rows, of weights made narrow by each."""
    found = [rounded(each) for each in narrow]
    return min(found, key=lambda weight: float(((gram @ (weight - matrix)) * (weight - matrix)).sum()))


WAYS = ("RTN", "GPTQ", "MagR + RTN", "MagR + GPTQ", "narrowed + RTN", "on the grid")


def file_name(way: str, bits: int, block: int | None) -> str:
    """What a rounded model is called: `GPTQ-4.onnx`, or `GPTQ-4-block32.onnx`."""
    return f"{way.replace(' ', '')}-{bits}{f'-block{block}' if block else ''}.onnx"


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
    folder: Path | None = None,
    seeds: Sequence[int] = (0,),
) -> Iterator[Row]:
    """The float model, then every way at every bit width; in a folder each becomes a model (`file_name`).

    The pass never sees the held-out data: its own judges are split off the calibration data, by each of the seeds, and
    its row is the one of median error. The other ways have no choice that a seed could change.
    """
    warnings.simplefilter("ignore")
    settings = Settings(nodes_to_include=tuple(include), max_samples=max_samples)
    prepared = prepare(model, settings, calib, heldout)
    layers, _ = captured(prepared, prepared.data, Norm())
    bench, judges = prepared.bench, prepared.data.heldout
    gate = Gate(bench.outputs, judges, 0.0)
    # MagR's weights do not depend on the bits; by weight, with the seconds that they took.
    granularity = Granularity("block" if block else "channel", block or 1)
    narrow: dict[str, tuple[list[Tensor], float]] = {}

    def score(width: int, way: str, arrays: dict[str, np.ndarray], seconds: float) -> Row:
        error = bench.outputs.deviation(judges, arrays).largest_rel()
        found = gate.run(arrays).score
        if folder is not None and arrays:
            with write_beside(bench.model, arrays, folder / file_name(way, width, block)) as written:
                written.commit()
        return Row(width, way, error, found.loss, found.top1, seconds)

    def quantized(width: int, way: str, rounded: Callable[[Tensor, Tensor], Tensor]) -> Row:
        start, arrays, before = time.perf_counter(), {}, 0.0
        for weight in bench.weights:
            content = bench.model.initializer(weight.name)
            matrix, gram = as_matrix(content, weight.form), layers.factored.moments(weight).gram()
            if way.startswith("MagR"):
                if weight.name not in narrow:
                    begun = time.perf_counter()
                    found = [magr(matrix, gram, alpha, granularity) for alpha in ALPHAS]
                    narrow[weight.name] = found, time.perf_counter() - begun
                else:
                    before += narrow[weight.name][1]
                result = best_magr(matrix, gram, narrow[weight.name][0], partial(rounded, gram=gram))
            else:
                result = rounded(matrix, gram=gram)
            arrays[weight.name] = finished(result, weight.form, content.dtype)
        return score(width, way, arrays, before + time.perf_counter() - start)

    def passed(grid: Grid, way: str, *, snap: bool) -> Row:
        rows = sorted((seeded(grid, way, seed, snap=snap) for seed in seeds), key=lambda row: row.error)
        return rows[len(rows) // 2]

    def seeded(grid: Grid, way: str, seed: int, *, snap: bool) -> Row:
        start = time.perf_counter()
        result = onnx_optshift.shift(
            model,
            list(calib),
            seed=seed,
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
        nearest: Callable[..., Tensor] = lambda v, gram, g=grid: round_to_nearest(v, g)  # noqa: E731
        fed_back = partial(gptq, grid=grid)
        found: dict[str, Callable[[str], Row]] = {
            "RTN": lambda way, g=grid, f=nearest: quantized(g.bits, way, f),
            "GPTQ": lambda way, g=grid, f=fed_back: quantized(g.bits, way, f),
            "MagR + RTN": lambda way, g=grid, f=nearest: quantized(g.bits, way, f),
            "MagR + GPTQ": lambda way, g=grid, f=fed_back: quantized(g.bits, way, f),
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
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write every model there, such as GPTQ-4.onnx")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the pass; the median counts")
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
        folder=given.write,
        seeds=given.seeds,
    ):
        top1 = "" if row.top1 is None else f"  top-1 {100 * row.top1:.2f} %"
        print(
            f"{row.bits} bits  {row.way:15} error {row.error:.4f}  loss {row.loss:.4f}{top1}  {row.seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
