"""One quantizer or equalizer of another package, run by an interpreter that has that package.

    PYTHON tools/peer_quantizers.py NAME IN.onnx OUT.onnx CALIBRATION.npz

Stands alone: it imports neither `onnx_optshift` nor the other tools. `nvidia-modelopt[onnx]` and `onnxsim` bring their
own onnx and torch, so that they belong in a virtual environment of their own (`quantize_recipe.py --peer-python`).
NAME is a key of `QUANTIZERS`. The calibration file has the model's inputs by name, samples along axis 0.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

BATCH = 25


def modelopt(source: Path, target: Path, data: dict[str, np.ndarray], *, mode: str, method: str) -> None:
    """NVIDIA Model Optimizer; calibrates on the CPU and keeps float32 beside the quantized layers; int4 per channel."""
    from modelopt.onnx.quantization import quantize

    # It was seen to rewrite the model that it is given: it gets a copy.
    source = Path(shutil.copy(source, target.with_name(f"{target.stem}-source.onnx")))
    # Its int8 calibration needs a whole number of the model's batches; a dynamic batch axis counts as 1.
    quantize(
        str(source),
        quantize_mode=mode,
        calibration_method=method,
        calibration_data=data,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(target),
        log_level="ERROR",
        **({"block_size": -1} if mode == "int4" else {}),  # a scale for each output channel, as the float weights have
    )


def onnxsim_gptq(source: Path, target: Path, data: dict[str, np.ndarray]) -> None:
    """The onnxsim port of GPTQ over its own 4-bit weight-only format."""
    import onnx
    import onnxsim

    model = onnx.load(source)
    onnx.save(onnxsim.apply_gptq(model, onnxsim.quantize_weight_only_int4(model), _batches(data)), target)


def onnxsim_int4(source: Path, target: Path, _: dict[str, np.ndarray]) -> None:
    """The 4-bit weight-only format of onnxsim, rounded to nearest."""
    import onnx
    import onnxsim

    onnx.save(onnxsim.quantize_weight_only_int4(onnx.load(source)), target)


def onnxsim_equalized(source: Path, target: Path, _: dict[str, np.ndarray]) -> None:
    """Cross-layer equalization: a float model whose ranges are balanced between successive convolutions."""
    import onnx
    import onnxsim

    onnx.save(onnxsim.cross_layer_equalize(onnx.load(source)), target)


def onnxsim_smoothquant(source: Path, target: Path, data: dict[str, np.ndarray]) -> None:
    """SmoothQuant: a float model with activation ranges moved into the weights."""
    import onnx
    import onnxsim

    onnx.save(onnxsim.apply_smoothquant(onnx.load(source), _batches(data)), target)


def _batches(data: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(data.values())))
    return [{name: array[k : k + BATCH] for name, array in data.items()} for k in range(0, count, BATCH)]


QUANTIZERS: dict[str, Callable[[Path, Path, dict[str, np.ndarray]], None]] = {
    "modelopt int8 max": partial(modelopt, mode="int8", method="max"),
    "modelopt int8 entropy": partial(modelopt, mode="int8", method="entropy"),
    "modelopt int4 rtn": partial(modelopt, mode="int4", method="rtn_dq"),
    "modelopt int4 awq": partial(modelopt, mode="int4", method="awq_clip"),
    "onnxsim int4": onnxsim_int4,
    "onnxsim int4 GPTQ": onnxsim_gptq,
    "onnxsim CLE": onnxsim_equalized,
    "onnxsim SmoothQuant": onnxsim_smoothquant,
}


def main() -> None:
    """Reads the four arguments and writes OUT."""
    if len(sys.argv) != 5 or sys.argv[1] not in QUANTIZERS:
        raise SystemExit(f"usage: peer_quantizers.py {{{' | '.join(QUANTIZERS)}}} IN.onnx OUT.onnx CALIBRATION.npz")
    name, source, target, calibration = sys.argv[1:]
    with np.load(calibration, allow_pickle=False) as file:
        data = {key: file[key] for key in file.files}
    QUANTIZERS[name](Path(source), Path(target), data)


if __name__ == "__main__":
    main()
