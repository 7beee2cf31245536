"""The pass on a GPU: capture against a plain pass, solvers against cuBLAS and cuSOLVER, and agreement with the CPU.

    python tools/bench_gpu.py [--repeats 5] [--limit 300] [--json FILE]

Needs CUDA builds of torch and onnxruntime and one GPU; without them it says what is missing and ends with status 77.
Ends with status 1 where the solutions on GPU and CPU do not agree.

- capture: an encoder of 12 layers, 768 wide. Plain is ONNX Runtime alone, with outputs left on the GPU. Wanted: at
  least 0.85 of its samples a second with all statistics taken.
- solve: the package's products and factorization against `cublasDsyrk` and `torch.linalg.eigh` (cuSOLVER) alone.
- agreement: the small encoder shifted on both devices.
- narrowing: layers of the shapes of LLaMA-2-7B, objective range, block after block until `--limit` seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import bench_models
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

import onnx_optshift
from onnx_optshift.calibration.source import Batch
from onnx_optshift.capture.stream import stream
from onnx_optshift.geometry import Tap
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.objective import make_objective
from onnx_optshift.solve.problem import ROUNDING_UNIT, Problem
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.stats.moments import InputMoments

SKIPPED = 77  # as test harnesses know it
WIDTHS = (1024, 4096, 11008)
ROWS = 16384
BLOCKS = 32
# Inputs of one block of LLaMA-2-7B (arXiv 2307.09288), each with the outputs of the weights that read it.
BLOCK = {
    "attention": (4096, (4096, 4096, 4096)),
    "projection": (4096, (4096,)),
    "up": (4096, (11008, 11008)),
    "down": (11008, (4096,)),
}
TOLERANCE = 0.02
# Float32 activations of two devices differ in their last bits; solutions are as exact as those.
AGREEMENT = 1e-4

Figures = dict[str, float]


def missing() -> str:
    """What this machine lacks, or an empty string."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} is no CUDA build"
    return ""


def finish() -> None:
    """Waits for all work on the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time, all work on the GPU finished; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        finish()
        start = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def capture(repeats: int, device: str = "cuda", samples: int = 512, width: int = 768, layers: int = 12) -> Figures:
    """Samples a second: plain, with activations handed over, and with statistics."""
    with tempfile.TemporaryDirectory() as folder:
        bench_models.encoder(Path(folder), samples, width=width, layers=layers)
        calibration = [str(Path(folder) / "calibration.npz")]
        settings = Settings(device=device, batch_size=32)
        prepared = prepare(Path(folder) / "model.onnx", settings, calibration)
        assert prepared.data is not None
        bench, data = prepared.bench, prepared.data.calibration
        original, probe = bench.sessions.original(), bench.sessions.probe(bench.taps)
        batches = list(data.batches(bench.batch_size))

        def nowhere(_: Tap, __: Batch, activation: Tensor) -> None:
            assert activation.device.type == device

        ways: dict[str, Callable[[], object]] = {
            "plain": lambda: [original.run_tensors(batch.feeds, original.outputs) for batch in batches],
            "handed over": lambda: stream(probe, bench.taps, batches, nowhere),
            "statistics": lambda: bench.capture(bench.taps, data),
        }
        return {name: samples / seconds(work, repeats) for name, work in ways.items()}


def syrk(rows: Tensor, into: Tensor) -> None:
    """`into += rowsᵀ rows`, one triangle, by cuBLAS; rows `[n, d]`, float64."""
    library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")  # type: ignore[union-attr]
    one = ctypes.byref(ctypes.c_double(1.0))
    n, d = rows.shape
    # cuBLAS counts columns first: the rows are a `[d, n]` matrix to it. 0: no transposition, and one triangle.
    status = library.cublasDsyrk_v2(
        ctypes.c_void_p(torch.cuda.current_blas_handle()), 0, 0, d, n, one, ctypes.c_void_p(rows.data_ptr()), d, one,
        ctypes.c_void_p(into.data_ptr()), d,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cublasDsyrk: status {status}")


def solve(repeats: int) -> dict[int, Figures]:
    """Seconds of products of `ROWS` rows and of factorizations, by width: the package's, and the libraries' alone."""
    found = {}
    for width in WIDTHS:
        rows = torch.randn(1, ROWS, width, dtype=torch.float64, device="cuda")
        moments = InputMoments(1, width, "cuda")
        moments.update(rows)
        gram = moments.gram()
        count = repeats if width < max(WIDTHS) else 1
        found[width] = {
            "products": seconds(lambda: moments.update(rows), count),  # noqa: B023 - called within the round
            "syrk": seconds(lambda: syrk(rows[0], gram[0].clone()), count),  # noqa: B023
            "factor": seconds(lambda: factor(moments), count),  # noqa: B023
            "eigh": seconds(lambda: torch.linalg.eigh(gram), count),  # noqa: B023
        }
    return found


def agreement(other: str = "cuda") -> float:
    """Largest relative difference between weights that were shifted on the CPU and on another device."""
    weights: list[dict[str, np.ndarray]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench_models.encoder(Path(folder), 24, width=128, layers=2, tokens=16, vocabulary=500)
        files = [str(Path(folder) / name) for name in ("model.onnx", "calibration.npz")]
        for device in ("cpu", other):
            result = onnx_optshift.shift(*files, device=device, tolerance=TOLERANCE, heldout="none")
            assert result.report.verification is not None
            assert result.report.verification.passed
            weights.append({t.name: numpy_helper.to_array(t) for t in onnx.load(result.path).graph.initializer})
    pairs = [(weights[0][name], weights[1][name]) for name in weights[0]]
    return max(
        float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-30))
        for a, b in pairs
        if np.issubdtype(a.dtype, np.floating)
    )


def narrowing(limit: float, device: str = "cuda", block: Mapping[str, tuple[int, tuple[int, ...]]] = BLOCK) -> Figures:
    """Blocks of LLaMA-2-7B's shapes narrowed within a limit of seconds, and seconds for all of them at that speed."""
    objective = make_objective("range", (4,), "channel", None, "symmetric")
    generator = torch.Generator(device).manual_seed(0)
    start, blocks = time.perf_counter(), 0
    while blocks < BLOCKS and time.perf_counter() - start < limit:
        for width, outputs in block.values():
            # Rows whose inputs differ in size by three decades, as those of language models do.
            scale = torch.logspace(0, -3, width, device=device)
            moments = InputMoments(1, width, device, torch.float32)
            for _ in range(2 * width // 4096 + 1):
                moments.update(torch.randn(1, 4096, width, generator=generator, device=device) * scale)
            spectrum = factor(moments)
            for columns in outputs:
                matrix = torch.randn(1, width, columns, generator=generator, device=device).double()
                objective.solve(Problem(spectrum, matrix, ROUNDING_UNIT["float32"]), TOLERANCE)
        finish()
        blocks += 1
    passed = time.perf_counter() - start
    return {"blocks": blocks, "seconds": passed, "seconds for all": passed * BLOCKS / blocks}


def main() -> int:
    """Runs all four and prints them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for LLaMA-2-7B's layers")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if reason := missing():
        print(f"bench_gpu: skipped: {reason}", file=sys.stderr)
        return SKIPPED
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    rates = capture(args.repeats)
    for name, rate in rates.items():
        print(f"capture, {name}: {rate:.0f} samples/s, {rate / rates['plain']:.2f} of plain", flush=True)
    widths = solve(args.repeats)
    for width, times in widths.items():
        print(
            f"{width}: products {times['products']:.3f} s, {times['products'] / times['syrk']:.2f}x syrk; "
            f"factor {times['factor']:.2f} s, {times['factor'] / times['eigh']:.2f}x eigh",
            flush=True,
        )
    apart = agreement()
    print(f"weights shifted on GPU and CPU: relative difference {apart:.1e} at most, allowed {AGREEMENT:.0e}")
    narrowed = narrowing(args.limit)
    print(
        f"LLaMA-2-7B's shapes: {narrowed['blocks']:.0f} of {BLOCKS} blocks in {narrowed['seconds']:.0f} s; all "
        f"{'' if narrowed['blocks'] == BLOCKS else 'would take '}{narrowed['seconds for all']:.0f} s"
    )
    if args.json:
        figures = {"capture": rates, "solve": widths, "agreement": apart, "narrowing": narrowed}
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return int(apart > AGREEMENT)


if __name__ == "__main__":
    sys.exit(main())
