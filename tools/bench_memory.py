"""Peak memory and time of `python -m onnx_optshift`, beside a naive script that computes the same exact shift.

    python tools/bench_memory.py MODEL CALIB --samples 200 1600 --repeats 3 [--nodes-to-include PATTERN ...]
    python tools/bench_memory.py MODEL CALIB --samples 200 -- --tolerance 0.01     options after -- go to onnx_optshift
    python tools/bench_memory.py MODEL CALIB --samples 8 --repeats 1 --no-naive    for models of gigabytes

The naive script is what one writes first: keep the inputs A of every linear layer for all samples, then
W = pinv(A) @ (A @ V) in float64, layer by layer. It neither checks its result nor looks at held-out data; onnx_optshift
does both within its time. Runs alternate, each in a fresh process; a row is the median over the repeats. A run that
does not fit the limits is reported as such and not repeated. The `imports` row is what loading the libraries takes, the
`session` row what ONNX Runtime takes for the model alone: loaded as anybody loads it, and run on one batch.

Memory is the largest resident size; beside it stands the part that is the process's own. The rest are pages of files
(mapped weights, libraries), which the system can take back at any time.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

# The parent imports nothing heavy: Linux carries the resident peak of a process over fork and exec into its child's
# own figure, so a large parent would be measured in place of a small child.

NO_MEMORY = re.compile(
    r"MemoryError|bad_alloc|[Ff]ailed to allocate|[Uu]nable to allocate|can't allocate|not enough memory"
)


@dataclass(frozen=True)
class Run:
    """One finished process.

    Attributes:
        failure: Why it did not finish, or an empty string.
        peak: Largest resident size in bytes.
        own: The same without pages of files, sampled; 0 where the system does not tell.
        seconds: Wall-clock time.
        detail: Last line of its standard error, when it failed.
    """

    failure: str
    peak: int
    own: int
    seconds: float
    detail: str = ""


def measure(command: list[str], limit_gb: float, timeout: float) -> Run:
    """Runs a command in a process of its own under a limit of memory [GB] and time [s]."""

    def limit_memory() -> None:
        # RLIMIT_DATA and not RLIMIT_AS: CUDA reserves address space far beyond what it uses.
        limit = int(limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=limit_memory,
            start_new_session=True,
        )
        timed_out, pid, own = False, 0, 0
        try:
            while not pid:
                own = max(own, anonymous(child.pid))
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                seconds = time.perf_counter() - start
                if not pid and seconds > timeout and not timed_out:
                    timed_out = True
                    os.killpg(child.pid, signal.SIGKILL)
                time.sleep(0 if pid else 0.01)
        finally:
            if not pid:  # interrupted: the child is in a session of its own and would go on
                os.killpg(child.pid, signal.SIGKILL)
        child.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for a process that is gone
        errors.seek(0)
        stderr = errors.read()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if child.returncode == 0:
        return Run("", peak, own, seconds)
    lines = stderr.strip().splitlines()
    # A SIGKILL that was not ours is the kernel's, out of memory.
    if timed_out:
        failure = "timeout"
    elif child.returncode == -signal.SIGKILL or NO_MEMORY.search(stderr):
        failure = "out of memory"
    else:
        failure = f"exit {child.returncode}"
    return Run(failure, peak, own, seconds, lines[-1] if lines else "")


def anonymous(process: int) -> int:
    """Bytes that the largest of a process and its descendants holds at the moment and that are in no file."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    except OSError:  # ended meanwhile, or no Linux
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return max([1024 * int(found[1]) if found else 0, *(anonymous(int(child)) for child in children)])


def patches(x: np.ndarray, kernel: tuple[int, ...], attributes: dict[str, Any]) -> np.ndarray:
    """The im2col rows `[positions, C, prod(kernel)]` of an image `[N, C, *spatial]`.

    Raises:
        NotImplementedError: For auto_pad.
    """
    import numpy as np

    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotImplementedError("the naive script knows explicit pads only")
    k = len(kernel)
    pads = attributes.get("pads", [0] * 2 * k)
    strides, dilations = attributes.get("strides", [1] * k), attributes.get("dilations", [1] * k)
    x = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[i + k]) for i in range(k))])
    span = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, span, axis=tuple(range(2, 2 + k)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    windows = windows[(..., *(slice(None, None, s) for s in dilations))]
    return np.moveaxis(windows, 1, 1 + k).reshape(-1, x.shape[1], int(np.prod(kernel)))


def minimum_norm(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """W `[d, m]` = pinv(A) A V from rows A `[n, d]` and V `[d, m]`, in float64."""
    import numpy as np

    rows = rows.astype(np.float64)
    return np.linalg.pinv(rows) @ (rows @ matrix.astype(np.float64))


def shifted_weight(node: onnx.NodeProto, weight: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """The new weight, in the old one's shape and dtype, of a MatMul, Gemm or Conv with this stacked input."""
    import numpy as np
    from onnx import helper

    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        rows = patches(activation, weight.shape[2:], attributes)
        kernels = np.split(weight.reshape(*weight.shape[:2], -1), attributes.get("group", 1))
        parts = np.split(rows, attributes.get("group", 1), axis=1)
        new = np.concatenate([
            minimum_norm(part.reshape(len(part), -1), kernel.reshape(len(kernel), -1).T).T
            for part, kernel in zip(parts, kernels, strict=True)
        ])
    else:
        if node.op_type == "Gemm" and attributes.get("transA", 0):
            activation = activation.T
        transposed = node.op_type == "Gemm" and attributes.get("transB", 0)
        new = minimum_norm(activation.reshape(-1, activation.shape[-1]), weight.T if transposed else weight)
        new = new.T if transposed else new
    return np.ascontiguousarray(new.reshape(weight.shape), dtype=weight.dtype)


def naive(model_path: Path, calibration: Path, out: Path, samples: int, include: list[str]) -> None:
    """Collects all inputs of all chosen linear layers, then replaces their weights one by one."""
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import numpy_helper

    model = onnx.load(model_path)
    tensors = {t.name: t for t in model.graph.initializer}
    layers = [
        node
        for node in model.graph.node
        if node.op_type in {"MatMul", "Gemm", "Conv"}
        and node.input[1] in tensors
        and (node.op_type == "Conv" or len(tensors[node.input[1]].dims) == 2)
        and (not include or any(fnmatch.fnmatchcase(name, p) for name in (node.name, node.input[1]) for p in include))
    ]
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    values = list(dict.fromkeys(node.input[0] for node in layers))
    graph_inputs = {i.name for i in model.graph.input}
    probed = [value for value in values if value not in graph_inputs]
    probe.graph.output.extend(onnx.ValueInfoProto(name=value) for value in probed)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    with np.load(calibration) as data:
        feeds = {i.name: data[i.name][:samples] for i in session.get_inputs()}
    collected: dict[str, list[np.ndarray]] = {value: [] for value in values}
    for start in range(0, len(next(iter(feeds.values()))), 32):
        feed = {name: array[start : start + 32] for name, array in feeds.items()}
        got = dict(zip(probed, session.run(probed, feed), strict=True)) | feed
        for value in values:
            collected[value].append(got[value])
    activations = {value: np.concatenate(collected.pop(value)) for value in values}
    for node in layers:
        tensor = tensors[node.input[1]]
        new = shifted_weight(node, numpy_helper.to_array(tensor), activations[node.input[0]])
        tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    onnx.save(model, out)


def load_and_run(model_path: Path, calibration: Path, samples: int) -> None:
    """What ONNX Runtime needs for the model: a session with its own defaults, and one batch."""
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    with np.load(calibration) as data:
        feeds = {i.name: data[i.name][: min(samples, 32)] for i in session.get_inputs()}
    session.run(None, feeds)


def row(label: str, runs: list[Run], reference: list[Run] | None) -> str:
    """One line of the table; ratios are against the medians of `reference`."""
    if failed := [run for run in runs if run.failure]:
        reached = f"(reached {failed[0].peak / 1e6:,.0f} MB in {failed[0].seconds:.1f} s)"
        return f"{label:<26}{failed[0].failure:>16}  {reached}"
    peak, own, seconds = (
        statistics.median(getattr(run, field) for run in runs) for field in ("peak", "own", "seconds")
    )
    line = f"{label:<26}{peak / 1e6:>13,.0f} MB{own / 1e6:>13,.0f} MB{seconds:>10.2f} s"
    if reference and not any(run.failure for run in reference):
        ratios = (statistics.median(getattr(run, field) for run in reference) for field in ("peak", "seconds"))
        line += "".join(f"{value / base:>13.2f}x" for value, base in zip((peak, seconds), ratios, strict=True))
    return f"{line}   {len(runs)} run{'s' * (len(runs) > 1)}"


def compare(args: argparse.Namespace) -> int:
    """Measures and prints the table; 1 if a run failed for another reason than the limits, else 0."""
    print(f"{args.model}, {args.calibration}; limits {args.limit_gb:g} GB, {args.timeout:g} s")
    print(f"{'samples, run':<26}{'peak memory':>16}{'own':>16}{'time':>12}{'memory ratio':>14}{'time ratio':>14}")
    libraries = "import numpy, onnx, onnx_graphsurgeon, onnxruntime, torch"
    imports = [measure([sys.executable, "-c", libraries], args.limit_gb, args.timeout) for _ in range(args.repeats)]
    print(row("-  imports", imports, None), flush=True)
    selection = ["--nodes-to-include", *args.nodes_to_include] if args.nodes_to_include else []
    details: list[str] = []
    for samples in args.samples:
        runs: dict[str, list[Run]] = {"session": [], "onnx_optshift": [], "naive": []}
        with tempfile.TemporaryDirectory() as folder:
            out, data = str(Path(folder) / "out.onnx"), str(args.calibration)
            ours = ["-m", "onnx_optshift", str(args.model), out, "--calib", data, "--max-samples", str(samples)]
            script = [__file__, str(args.model), data, "--samples", str(samples), "--naive-out", out]
            commands = {
                "session": [__file__, str(args.model), data, "--samples", str(samples), "--session-only"],
                "onnx_optshift": [*ours, *selection, *args.options],
                "naive": [*script, *selection],
            }
            if args.no_naive:
                del commands["naive"], runs["naive"]
            for _ in range(args.repeats):
                for name, command in commands.items():
                    if not any(run.failure for run in runs[name]):
                        runs[name].append(measure([sys.executable, *command], args.limit_gb, args.timeout))
        for name, done in runs.items():
            print(row(f"{samples}  {name}", done, runs["onnx_optshift"] if name == "naive" else None), flush=True)
            details += [f"{samples} {name}: {r.failure}: {r.detail}" for r in done if r.failure.startswith("exit")]
    print(*details, sep="\n", end="\n" if details else "")
    return int(bool(details))


def main() -> None:
    """Command line."""
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, metavar="CALIB", help=".npz with arrays named as the model's inputs")
    parser.add_argument("--samples", type=int, nargs="+", default=[200], metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nodes-to-include", nargs="+", default=[], metavar="PATTERN", help="names or globs, for both")
    parser.add_argument("--limit-gb", type=float, default=8.0, help="memory limit of each run, of private data")
    parser.add_argument("--timeout", type=float, default=600.0, help="time limit of each run, in seconds")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive script out")
    parser.add_argument("--session-only", action="store_true", help="only load the model and run one batch")
    parser.add_argument("--naive-out", type=Path, help="only run the naive script and write its model here")
    args = parser.parse_args(argv[:split])
    args.options = argv[split + 1 :]
    if args.repeats < 1 or min(args.samples) < 1:
        parser.error("--repeats and --samples start at 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child is not left behind
    if args.session_only:
        load_and_run(args.model, args.calibration, args.samples[0])
    elif args.naive_out:
        naive(args.model, args.calibration, args.naive_out, args.samples[0], args.nodes_to_include)
    else:
        sys.exit(compare(args))


if __name__ == "__main__":
    main()
