"""The floor of an exact run: what no implementation of it can leave out, each part measured alone.

    python tools/bench_floor.py MODEL CALIB [--samples N] [--json FILE]

- `pass`: ONNX Runtime alone over the data, with the session options and the batch size that the package takes. Opening
  the session is not counted, nor one batch before, which fills its memory pools.
- `gram`: the symmetric rank-k updates of the Gram matrices of the distinct inputs, in float64, each by the fastest way
  that is found here on its first rows. Conversions to float64 are not counted, and no products where rows are no more
  than their width.
- `factor`: one `eigh` for each distinct input, or an SVD of its rows where those are no more than their width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_optshift.calibration.source import Batch
from onnx_optshift.capture.stream import stream
from onnx_optshift.geometry import PatchRows, Tap
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.patches import lag_axis, patch_gram
from onnx_optshift.stats.rows import CHUNK_BYTES, to_rows

try:
    from scipy.linalg.blas import dsyrk
except ImportError:
    dsyrk = None


# That passed, and of the processor over all threads.
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """One way to a Gram matrix: how it adds rows `[g, n, d]` (or a whole activation), and the matrix so far."""

    add: Callable[[Tensor], object]
    gram: Callable[[], Tensor]
    whole: bool = False  # whether it takes activations


def ways(tap: Tap, activation: Tensor) -> dict[str, Way]:
    """All ways that there are for a tap, with empty matrices."""
    g, d = tap.groups, tap.width
    full = torch.zeros(g, d, d, dtype=torch.float64)
    blocks = InputMoments(g, d)
    blocks.update_gram(full, full[:, 0], 0)
    found = {
        "torch matmul": Way(lambda rows: full.baddbmm_(rows.mT, rows), lambda: full),
        "torch matmul, blocks of the upper triangle": Way(blocks.update, blocks.gram),
    }
    if dsyrk is not None and g == 1:
        upper = np.zeros((d, d), order="F")

        def add(rows: Tensor) -> None:
            dsyrk(1.0, rows[0].numpy().T, beta=1.0, c=upper, overwrite_c=1)

        found["scipy dsyrk"] = Way(add, lambda: torch.from_numpy(np.triu(upper) + np.triu(upper, 1).T)[None])
    if isinstance(tap.form, PatchRows) and (axis := lag_axis(activation, tap.form)) is not None:
        form, sums = tap.form, torch.zeros_like(full)

        def add_lags(images: Tensor) -> None:
            sums.add_(patch_gram(images, form, axis, device=sums.device, chunk_bytes=CHUNK_BYTES)[0])

        found["torch matmul, lags of overlapping patches"] = Way(add_lags, lambda: sums, whole=True)
    return found


class Input:
    """One distinct input of layers: its products, or its rows where those are no more than their width."""

    def __init__(self, tap: Tap, rows: int) -> None:
        self.tap, self.stores = tap, rows <= tap.width
        self.seconds = np.zeros(2)
        self.name = ""
        self._way: Way | None = None
        self._rows: list[Tensor] = []

    def add(self, activation: Tensor) -> None:
        """Counts the seconds of an activation's products."""
        rows = to_rows(activation, self.tap)
        pieces = [
            piece.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
            for piece in rows.split(max(1, CHUNK_BYTES // (8 * self.tap.groups * self.tap.width)), dim=1)
        ]
        if self.stores:
            self._rows += pieces
            return
        if self._way is None:
            trials = {name: _seconds(way, activation, pieces) for name, way in ways(self.tap, activation).items()}
            self.name = min(trials, key=lambda name: float(trials[name][0]))
            self._way = ways(self.tap, activation)[self.name]
        self.seconds += _seconds(self._way, activation, pieces)

    def factor(self) -> Seconds:
        """Seconds of the factorization."""
        if self._way is None:
            rows = torch.cat(self._rows, 1)
            return _timed(lambda: torch.linalg.svd(rows, full_matrices=False))
        gram = self._way.gram()
        return _timed(lambda: torch.linalg.eigh(gram))


def _seconds(way: Way, activation: Tensor, pieces: list[Tensor]) -> Seconds:
    parts = [_timed(partial(way.add, piece)) for piece in ([activation] if way.whole else pieces)]
    return np.sum(parts, axis=0)


def _timed(work: Callable[[], object]) -> Seconds:
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def floor(model: Path, calibration: Path, samples: int | None) -> dict[str, object]:
    """Seconds of every part, and by which ways the products were made."""
    prepared = prepare(model, Settings(max_samples=samples), [str(calibration)])
    assert prepared.data is not None
    bench, data = prepared.bench, prepared.data.calibration
    inputs = {tap: Input(tap, bench.rows[tap] * len(data)) for tap in bench.taps}
    original, batches = bench.sessions.original(), list(data.batches(bench.batch_size))
    original.run(batches[0].feeds)

    def run() -> None:
        for batch in batches:
            original.run(batch.feeds)

    def sink(tap: Tap, _: Batch, activation: Tensor) -> None:
        inputs[tap].add(activation)

    plain = _timed(run)
    stream(bench.sessions.probe(bench.taps), bench.taps, batches, sink)
    parts = {
        "pass": plain,
        "gram": np.sum([each.seconds for each in inputs.values()], axis=0),
        "factor": np.sum([each.factor() for each in inputs.values()], axis=0),
    }
    return {
        **{name: float(seconds[0]) for name, seconds in parts.items()},
        "processor": {name: float(seconds[1]) for name, seconds in parts.items()},
        "ways": dict(Counter(each.name or "none: SVD of the rows" for each in inputs.values())),
        "samples": len(data),
        "batch": bench.batch_size,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, metavar="CALIB")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--json", type=Path, help="file for the figures, instead of standard output")
    args = parser.parse_args()
    found = json.dumps(floor(args.model, args.calibration, args.samples))
    if args.json:
        args.json.write_text(found, encoding="utf-8")
    else:
        print(found)


if __name__ == "__main__":
    main()
