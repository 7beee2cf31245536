"""The table of all options: which commands have them, what they mean, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx_optshift.settings import OBJECTIVES, RANGE_LEVELS, RANGE_SCOPES, RECAPTURES, ROW_WEIGHTINGS

PROGRAM = "onnx-optshift"
SHIFT, INSPECT, VERIFY, DIAGNOSE = "shift", "inspect", "verify", "diagnose"
_ALL, _JUDGED, _SOLVED = (SHIFT, INSPECT, VERIFY, DIAGNOSE), (SHIFT, DIAGNOSE), (SHIFT, INSPECT)
# Random directions for each layer where flatness is asked for without a number.
PROBES = 32
# Powers of 1024, as memory is counted.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:iB)?)?", re.IGNORECASE)


def _read_as(expected: str, convert: Callable[[str], object], hint: str = "") -> Callable[[str], object]:
    """What argparse takes as a type, with our message."""

    def read(text: str) -> object:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}{hint}") from None

    return read


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _named(text: str) -> str:
    if not text:
        raise ValueError
    return text


# A path of no characters would mean the current folder.
path_of = _read_as("a file name", lambda text: Path(_named(text)))
_source = _read_as("a path", _named)
_number = _read_as("a number", float)
_number_or_auto = _read_as("auto or a number", float)
_whole = _read_as("a whole number", int)
_bits = _read_as("whole numbers", lambda text: tuple(map(int, text.split(","))))
_samples = _read_as("a number of samples or nothing", int, "; a file must come before this option")
_size = _read_as("bytes, or a size such as 512M or 2G", _bytes)

_FLAG: dict[str, Any] = {"action": "store_true"}
_N: dict[str, Any] = {"type": _whole, "metavar": "N"}
_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend"}
_SOURCES: dict[str, Any] = {"type": _source, "metavar": "SRC", "default": None, **_SEVERAL}
# Takes the commands that have an option, its flags, its help, and what argparse takes.
_Add = Callable[..., None]


def _data(add: _Add) -> None:
    add(
        _ALL,
        "--calib --calibration-data -d",
        ".npz or .npy files, a directory of them, test_data_set_* folders, Polygraphy JSON, or "
        "script.py[:function]; looked for beside the model when not given",
        dest="calibration",
        **_SOURCES,
    )
    add(
        _JUDGED,
        "--heldout",
        "held-out data that judges; a seeded fifth of the calibration data when not given; 'none' for no judging",
        **_SOURCES,
    )
    add([VERIFY], "--baseline", "the calibration data, whose drift is reported beside that of the data", **_SOURCES)
    add(_JUDGED, "--heldout-fraction", "how much to split off to judge (default 0.2)", type=_number, metavar="F")
    add(_ALL, "--labels", "name of the labels' array in the data (default labels)", metavar="NAME")
    add(
        _ALL,
        "--input-shape --input-shapes",
        "sizes of an input whose axes the model leaves free, such as images:1,3,320,320; once for each input",
        action="append",
        dest="input_shapes",
        metavar="NAME:D,...",
    )
    add(_ALL, "--max-samples", "calibration samples to use at most (default: all)", **_N)


def _choices(add: _Add) -> None:
    add(
        [SHIFT],
        "--tolerance",
        "relative deviation that the outputs may show on calibration data; 0 (default) is exact; auto takes what "
        "serves held-out data best",
        type=lambda text: text if text == "auto" else _number_or_auto(text),
        metavar="EPS|auto",
    )
    for command, text in (
        (VERIFY, "relative deviation that the outputs may show; 0 (default): equality within the noise floor"),
        (DIAGNOSE, "of the shift whose flatness stands beside the original's; 0 (default) is the exact one"),
    ):
        add([command], "--tolerance", text, type=_number, metavar="EPS")
    text = "exact only on a class-balanced batch of B samples (without B: held-out data chooses it)"
    add([SHIFT], "--stochastic", text, type=_samples, nargs="?", const=0, metavar="B")
    add(
        [VERIFY],
        "--max-drift",
        "fail when, for more than one sample in ten, the shift changes more than this share of a layer's output; "
        "the outputs' deviation is then reported only",
        type=_number,
        metavar="SHARE",
    )
    text = f"measure the loss's curvature and sharpness along random directions (default {PROBES} per layer)"
    add(_JUDGED, "--flatness", text, type=_whole, nargs="?", const=PROBES, metavar="PROBES")
    add(
        _SOLVED,
        "--objective",
        "what to make small: the weights' norm (default), the range that a quantizer scales by, or the norm as "
        "earlier weights feel it",
        metavar="|".join(OBJECTIVES),
    )
    text = "what shares a scale of the quantizer, for --objective range (default: channel)"
    add(_SOLVED, "--range-scope", text, metavar="|".join(RANGE_SCOPES))
    add(_SOLVED, "--range-block", "inputs of a channel that share a scale: 32, 64 or 128", **_N)
    text = "levels of the quantizer: symmetric (-7 to 7), full (-8 to 7), or auto: full in blocks (default: auto)"
    add(_SOLVED, "--range-levels", text, metavar="|".join(RANGE_LEVELS))
    text = "with --objective range and one bit width: narrow floats instead of weights on the quantizer's grid"
    add(_SOLVED, "--no-snap", text, dest="snap", action="store_false")
    text = "whether each layer also makes up for those before it, for two more runs of the data each (default: auto)"
    add(_SOLVED, "--recapture", text, metavar="|".join(RECAPTURES))
    text = "how rows count: each relative to its own output (relative, the default), or all alike (none)"
    add(_ALL, "--row-weighting", text, metavar="|".join(ROW_WEIGHTINGS))
    text = "input whose zeros mark rows to leave out, or none for no rows (default: found by trying)"
    add(_ALL, "--row-mask", text, metavar="INPUT|none")
    text = "bit widths to be quantized to: the report gives their errors before and after"
    add(_SOLVED, "--quantization-bits", text, type=_bits, metavar="B[,B...]")
    text = "only these layers: exact names, globs or re:... of nodes or initializers"
    add(_ALL, "--nodes-to-include -ni", text, metavar="NAME", **_SEVERAL)
    text = "leave these layers alone; wins over --nodes-to-include"
    add(_ALL, "--nodes-to-exclude -ne", text, metavar="NAME", **_SEVERAL)
    add(_ALL, "--op-types", "only layers of these operators", metavar="OP", **_SEVERAL)
    add([SHIFT], "--dry-run", "do everything except writing OUT, which may then be left out", **_FLAG)
    add([SHIFT], "--force", "go on where a refusal can be overridden, such as OUT being no model", **_FLAG)
    add([SHIFT], "--save-as-external-data", "write the weights to a data file beside OUT", **_FLAG)


def _resources(add: _Add) -> None:
    add(_ALL, "--device", "auto (default), cpu, cuda or cuda:N; never falls back silently", metavar="DEVICE")
    add(_ALL, "--allow-cpu-fallback", "with --device cuda: let single nodes run on the CPU", **_FLAG)
    add(_ALL, "--providers", "ONNX Runtime execution providers, in order", metavar="EP", **_SEVERAL)
    add(_ALL, "--batch-size", "samples per run of the model (default: chosen by memory)", **_N)
    text = "what the process may take at its peak, in bytes or as 512M, 2G (powers of 1024)"
    add(_ALL, "--max-memory", text, type=_size, metavar="SIZE")
    text = "folder to keep finished work in: after a kill the same command goes on where it was, to the same bytes"
    add(_SOLVED, "--checkpoint", text, type=_source, metavar="DIR")
    add(_ALL, "--seed", "seed of all random choices (default 0)", **_N)
    add(_ALL, "--custom-op-library", "shared library with the model's custom operators", metavar="FILE")


def _output(add: _Add) -> None:
    from onnx_optshift import __version__

    add(
        _ALL,
        "--report",
        "write the whole report to this file, as .json or as .html for people, or as JSON to standard output (-), "
        "where nothing else is printed then; may be given several times",
        type=path_of,
        action="append",
        default=[],
        metavar="FILE",
    )
    add(_ALL, "--quiet", "print errors only", default=False, **_FLAG)
    add(_ALL, "--verbose", "print more: trials, all skips, tracebacks of errors", default=False, **_FLAG)
    levels = ("debug", "info", "warning", "error")
    add(_ALL, "--log-level", "least level of log lines (default error)", choices=levels, default="error")
    version = f"{PROGRAM} {__version__}"
    add(_ALL, "--version", "show program's version number and exit", action="version", version=version)


GROUPS = {"data": _data, "what to do": _choices, "resources": _resources, "output": _output}
