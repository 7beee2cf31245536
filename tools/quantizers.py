"""The quantizers that `quantize_recipe.py` compares, each a function from a float model file to a quantized one.

All are called as their users call them: on a file, with the calibration data, with one setting each that is said in
the table. `Quantizer.run` raises `NotApplicable` with the reason where a quantizer has nothing to do in a model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_optshift.graph.discover import discover
from onnx_optshift.graph.modelfile import ModelFile
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid, round_initializer
from onnx_optshift.write.patch import write_beside

Arrays = Mapping[str, NDArray[np.generic]]

LINEAR = ["Conv", "Gemm", "MatMul"]
READER_BATCH = 25
# What a model holds once something in it is quantized; a file without any of these is still the float model.
QUANTIZED_OPS = {
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
    "QAttention", "QGemm", "QLinearConv", "QLinearMatMul",
}  # fmt: skip
PEER_SCRIPT = Path(__file__).with_name("peer_quantizers.py")
PEER_TIMEOUT = 900.0
PEERS = {
    "modelopt int8 max": 8,
    "modelopt int8 entropy": 8,
    "modelopt int4 rtn": 4,
    "modelopt int4 awq": 4,
    "onnxsim int4": 4,
    "onnxsim int4 GPTQ": 4,
}
EQUALIZERS = ("onnxsim CLE", "onnxsim SmoothQuant")


class NotApplicable(Exception):
    """The quantizer has nothing to do in this model, or is not to be had here."""


@dataclass(frozen=True)
class Quantizer:
    """One row of the table.

    Attributes:
        family: What `--quantizers` selects it by.
        name: With its settings, as printed.
        bits: Of the weights.
        quantize: `(float model, quantized model, calibration data)`; writes the second file.
    """

    family: str
    name: str
    bits: int
    quantize: Callable[[Path, Path, Arrays], None]

    def run(self, source: Path, target: Path, calibration: Arrays) -> None:
        """Quantizes a copy of the float model: some quantizers write inferred shapes back into their input file.

        Raises:
            NotApplicable: There is nothing to quantize, or the quantizer cannot be had.
        """
        with tempfile.TemporaryDirectory(prefix="quantizers-") as folder:
            copy = Path(shutil.copy(source, folder))
            self.quantize(copy, target, calibration)


def rtn(grid: Grid, selection: Selection) -> Quantizer:
    """Plain round-to-nearest of every linear weight; activations stay float. Simulated: weights are dequantized."""

    def run(source: Path, target: Path, _: Arrays) -> None:
        model = ModelFile.load(source)
        weights, _skips = discover(model, selection)
        arrays = {w.name: round_initializer(model.initializer(w.name), w.form, grid) for w in weights}
        write_beside(model, arrays, target).commit()

    kind = {"symmetric": "int", "full": "full int", "unsigned": "uint"}[grid.levels]
    where = f"block {grid.block}" if grid.scope == "block" else f"per {grid.scope}"
    return Quantizer("rtn", f"RTN {kind}{grid.bits} {where}", grid.bits, run)


class Reader:
    """Calibration data as ONNX Runtime reads it: equal batches of the model's inputs, then None.

    Samples that do not fill a batch are left out: its histogram calibrators stack batches, and fail on a shorter one.
    """

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._batches = self._all()

    def _all(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        count = len(next(iter(self._arrays.values())))
        size = min(READER_BATCH, count)
        for start in range(0, count - size + 1, size):
            yield {name: array[start : start + size] for name, array in self._arrays.items()}

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        """The next batch, None at the end."""
        return next(self._batches, None)

    def __iter__(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        return self._all()

    def __deepcopy__(self, _: object) -> Reader:
        return Reader(self._arrays)  # ONNX Runtime copies readers, and generators cannot be copied


def static(method: str, samples: int) -> Quantizer:
    """ONNX Runtime `quantize_static`: QDQ, weights int8 per channel, activations uint8 by this calibrator."""

    def run(source: Path, target: Path, calibration: Arrays) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        with quiet():
            quantize_static(
                source,
                target,
                Reader({name: array[:samples] for name, array in calibration.items()}),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=LINEAR,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=getattr(CalibrationMethod, method),
            )
        _check_quantized(target, "no linear layer")

    return Quantizer("static", f"ORT static QDQ {method}", 8, run)


def dynamic() -> Quantizer:
    """ONNX Runtime `quantize_dynamic`: weights int8 per channel, activations per call. Its int8 Conv has no kernel."""

    def run(source: Path, target: Path, _: Arrays) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with quiet():
            quantize_dynamic(
                source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
            )
        _check_quantized(target, "no MatMul or Gemm")

    return Quantizer("dynamic", "ORT dynamic", 8, run)


def nbits(method: str, block: int, samples: int) -> Quantizer:
    """ONNX Runtime `MatMulNBitsQuantizer`, 4 bits, symmetric where that is a choice. It takes MatMul alone."""

    def run(source: Path, target: Path, calibration: Arrays) -> None:
        try:
            from onnxruntime.quantization import matmul_nbits_quantizer as library
        except ImportError as error:
            raise NotApplicable(f"MatMulNBitsQuantizer cannot be imported: {error}") from error
        reader = Reader({name: array[:samples] for name, array in calibration.items()})
        configs: dict[str, Callable[[], object]] = {
            "DEFAULT": lambda: library.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True),
            "RTN": lambda: library.RTNWeightOnlyQuantConfig(),
            "HQQ": lambda: library.HQQWeightOnlyQuantConfig(block_size=block),
            "GPTQ": lambda: library.GPTQWeightOnlyQuantConfig(reader, block_size=block),
        }
        model = onnx.load(source)
        known = {tensor.name for tensor in model.graph.initializer}
        if not any(node.op_type == "MatMul" and known & set(node.input) for node in model.graph.node):
            raise NotApplicable("no MatMul with a constant weight")
        with quiet():
            quantizer = library.MatMulNBitsQuantizer(
                model, block_size=block, is_symmetric=True, algo_config=configs[method]()
            )
            quantizer.process()
            quantizer.model.save_model_to_file(str(target), False)
        _check_quantized(target, "no MatMul")

    return Quantizer("nbits", f"ORT MatMulNBits {method}", 4, run)


def run_peer(name: str, python: Path, source: Path, target: Path, calibration: Arrays) -> None:
    """Runs one entry of `peer_quantizers.py` with the interpreter that has its package.

    Raises:
        NotApplicable: It failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        copy, data = Path(shutil.copy(source, folder)), Path(folder) / "calibration.npz"
        np.savez(data, **calibration)
        command = [str(python), str(PEER_SCRIPT), name, str(copy), str(target), str(data)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise NotApplicable(f"not done after {PEER_TIMEOUT:.0f} s") from error
    if done.returncode or not target.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise NotApplicable(lines[-1][:160])


def peer(name: str, bits: int, python: Path, samples: int) -> Quantizer:
    """A quantizer of another package."""

    def run(source: Path, target: Path, calibration: Arrays) -> None:
        run_peer(name, python, source, target, {key: array[:samples] for key, array in calibration.items()})
        _check_quantized(target, "no layer")

    return Quantizer("peer", name, bits, run)


def table(
    families: Sequence[str],
    bits: Sequence[int],
    *,
    selection: Selection,
    grid: Grid,
    block: int,
    samples: int,
    peer_python: Path | None,
) -> list[Quantizer]:
    """All quantizers of these families, in the order of the table."""
    rows = [rtn(replace(grid, bits=count), selection) for count in bits]
    rows += [static(method, samples) for method in ("MinMax", "Entropy", "Percentile")]
    rows += [dynamic()]
    rows += [nbits(method, block, samples) for method in ("DEFAULT", "RTN", "HQQ", "GPTQ")]
    if peer_python is not None:
        rows += [peer(name, count, peer_python, samples) for name, count in PEERS.items()]
    return [row for row in rows if row.family in families]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the quantizers' own output, which would tear the table apart."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(previous)


def _check_quantized(path: Path, missing: str) -> None:
    model = onnx.load(path, load_external_data=False)
    if not any(node.op_type in QUANTIZED_OPS for node in model.graph.node):
        raise NotApplicable(f"{missing} that it takes: the file it writes is still float")
