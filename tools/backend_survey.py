"""Runs the pass over the models of the onnx package's own backend tests, each with its own inputs as calibration data.

    python tools/backend_survey.py [KIND ...] [--only TEXT] [--json FILE]

Kinds are the folders simple, pytorch-operator and pytorch-converted of the package's test data; light (real
architectures whose weights are computed); node (one operator each, everything an input). Two more are made from these:
drawn, the light models with seeded random numbers for their weights; and frozen, a node case for every input that a
linear operator can take as its weight, with that input made an initializer.

Every model must end in exit status 0 with a written model whose outputs are the original's within its own noise, or in
exit status 2 with one message and nothing written. Prints tables of models and of layers, the messages, and every model
that did something else; exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from onnx_optshift.cli import main as optshift
from onnx_optshift.graph.operators import OPERATORS

FOLDERS = ("simple", "pytorch-operator", "pytorch-converted")
KINDS = (*FOLDERS, "light", "drawn", "node", "frozen")
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
# Of the largest value of an output: what two runs of one model may differ by, see `deviation`.
NOISE_FACTOR = 10
FLOAT32_UNIT = 2.0**-24
# The onnx package writes its newest format and opset, which runtimes read a release later; linear operators are older.
FROZEN_IR_VERSION = 10
FROZEN_OPSET = 26


@dataclass
class Case:
    """One model with its test inputs.

    Attributes:
        kind: One of `KINDS`.
        name: The test's name.
        model: The model.
        feeds: Sets of inputs, one serialized message per input.
    """

    kind: str
    name: str
    model: onnx.ModelProto
    feeds: list[list[bytes]]


@dataclass
class Row:
    """What became of one model.

    Attributes:
        kind: One of `KINDS`.
        name: The test's name.
        outcome: `shifted`, `unchanged` (there are layers, none moved), `skipped` (all layers were left alone with a
            reason), `no layer`, `refused` (exit status 2), or `problem`.
        message: Of a refusal or a problem.
        layers: (operator, status, reason) of every layer.
        seconds: Of the run.
    """

    kind: str
    name: str
    outcome: str
    message: str = ""
    layers: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0


def cases(kinds: Iterable[str] = KINDS, only: str = "", modules: Sequence[str] = ()) -> Iterator[Case]:
    """The onnx package's test cases.

    Args:
        kinds: Which of `KINDS`.
        only: Text that a case's name must contain.
        modules: Modules under `onnx.backend.test.case.node` to collect node cases from; all when empty.
    """
    for kind in kinds:
        if kind == "light":
            found = _light_cases()
        elif kind == "drawn":
            found = map(_drawn, _light_cases())
        elif kind == "node":
            found = _node_cases(modules)
        elif kind == "frozen":
            found = (frozen for case in _node_cases(modules) for frozen in _frozen(case))
        else:
            found = _folder_cases(kind)
        yield from (case for case in found if only in case.name)


def _folder_cases(kind: str) -> Iterator[Case]:
    for path in sorted((DATA / kind).glob("*/model.onnx")):
        feeds = []
        for folder in sorted(path.parent.glob("test_data_set_*")):
            files = sorted(folder.glob("input_*.pb"), key=lambda file: int(file.stem.removeprefix("input_")))
            feeds.append([file.read_bytes() for file in files])
        yield Case(kind, path.parent.name, onnx.load(path), feeds)


def _light_cases() -> Iterator[Case]:
    """Real architectures whose weights are computed by ConstantOfShape; fed as the onnx package's own runner does."""
    for path in sorted((DATA / "light").glob("*.onnx")):
        model = onnx.load(path)
        given = {tensor.name for tensor in model.graph.initializer}
        feed = []
        for value in model.graph.input:
            if value.name not in given:
                shape = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
                ramp = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)
                feed.append(numpy_helper.from_array(ramp, value.name).SerializeToString())
        yield Case("light", path.stem, model, [feed])


def _drawn(case: Case) -> Case:
    """The case with weights instead of ConstantOfShape nodes: normal, scaled to keep the size of activations."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    shapes = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    generator = np.random.default_rng(0)
    for node in list(model.graph.node):
        shape = shapes.get(node.input[0], []) if node.op_type == "ConstantOfShape" else []
        if len(shape) >= 2:
            weight = generator.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:]), dtype=np.float32)
            model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
            # Version 3 of the format demands that initializers are inputs too.
            model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, shape))
            model.graph.node.remove(node)
    return Case("drawn", case.name, model, case.feeds)


def _node_cases(modules: Sequence[str]) -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases compute their expected outputs, overflows and all
        node = importlib.import_module("onnx.backend.test.case.node")
        if modules:
            for module in modules:
                importlib.import_module(f"{node.__name__}.{module}")
            found = list(node._NodeTestCases)
        else:
            loader = importlib.import_module("onnx.backend.test.loader")
            found = loader.load_model_tests(kind="node")
    for case in sorted(found, key=lambda case: case.name):
        feeds = []
        for inputs, _ in case.data_sets:
            # An optional input that is not given has no message.
            names = [value.name for value in case.model.graph.input]
            pairs = zip(names, inputs, strict=False)
            feeds.append([_message(value, name) for name, value in pairs if value is not None])
        yield Case("node", case.name, case.model, feeds)


def _frozen(case: Case) -> Iterator[Case]:
    """The case with one input made an initializer, for every input that is where a linear operator has its weight."""
    names = [value.name for value in case.model.graph.input]
    weights = {
        node.input[operand]: node.op_type
        for node in case.model.graph.node
        if (operator := OPERATORS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type)))
        for operand in operator.operands
        if operand < len(node.input) and node.input[operand] in names
    }
    for name in weights:
        index = names.index(name)
        if len(case.feeds[0]) != len(names) or len(names) == 1:
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.graph.initializer.append(onnx.TensorProto.FromString(case.feeds[0][index]))
        model.graph.initializer[-1].name = name
        del model.graph.input[index]
        model.ir_version = min(model.ir_version, FROZEN_IR_VERSION)
        for entry in model.opset_import:
            entry.version = min(entry.version, FROZEN_OPSET)
        yield Case("frozen", f"{case.name}[{name}]", model, [[*case.feeds[0][:index], *case.feeds[0][index + 1 :]]])


def _message(value: object, name: str) -> bytes:
    if isinstance(value, onnx.TensorProto):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.name = name
        return tensor.SerializeToString()
    if isinstance(value, list):
        return numpy_helper.from_list(value, name).SerializeToString()
    return numpy_helper.from_array(np.asarray(value), name).SerializeToString()


def survey(case: Case, folder: Path) -> Row:
    """Runs the pass on one case.

    Args:
        case: The case.
        folder: An empty folder to work in.
    """
    model, out, report = folder / "model.onnx", folder / "out.onnx", folder / "report.json"
    onnx.save(case.model, model)
    sources: list[str] = []
    for number, feed in enumerate(case.feeds):
        if feed:
            source = folder / f"test_data_set_{number}"
            source.mkdir()
            for index, message in enumerate(feed):
                (source / f"input_{index}.pb").write_bytes(message)
            sources.append(str(source))
    # One data set of each model: few samples, on purpose.
    arguments = [str(model), str(out), "--report", str(report), "--device", "cpu", "--force", "--quiet"]
    if sources:
        arguments += ["--calib", *sources]
    start = time.perf_counter()
    code, text = _called(arguments)
    row = Row(case.kind, case.name, "problem", seconds=time.perf_counter() - start)
    row.message = (
        _problem(code, text, folder) or _differs(case, out, report) if code == 0 else _problem(code, text, folder)
    )
    if row.message:
        return row
    if code != 0:
        row.outcome, row.message = "refused", text.strip()
        return row
    layers = json.loads(report.read_text())["layers"]
    row.layers = [(layer["op_type"], layer["status"], layer["reason"]) for layer in layers]
    statuses = {status for _, status, _ in row.layers}
    row.outcome = (
        "shifted"
        if "shifted" in statuses
        else "unchanged"
        if statuses - {"skipped"}
        else "skipped"
        if statuses
        else "no layer"
    )
    return row


def _called(arguments: list[str]) -> tuple[int, str]:
    """Exit status of the command line, and what it wrote to standard error."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = optshift(arguments)
    return code, error.getvalue()


def _problem(code: int, text: str, folder: Path) -> str:
    """What is wrong with the way a run ended; empty if nothing is."""
    left = sorted(path.name for path in folder.iterdir())
    left = [name for name in left if name != "model.onnx" and not name.startswith("test_data_set_")]
    if code == 0 and left != ["out.onnx", "report.json"]:
        return f"exit 0, but there is {left}"
    if code == 0:
        return ""
    if code != 2:
        return f"exit {code}: {text.strip()}"
    if "internal error" in text or "Traceback" in text:
        return text.strip()
    if len(text.strip().splitlines()) != 1 or not text.startswith("error: "):
        return f"not one message: {text.strip()}"
    return f"exit 2, but {left} was written" if left else ""


def _differs(case: Case, out: Path, report: Path) -> str:
    """How the written model differs from the original where it must not; empty if nowhere."""
    written = onnx.load(out)
    shifted = {layer["weight"] for layer in json.loads(report.read_text())["layers"] if layer["status"] == "shifted"}
    if not shifted:
        return "" if written == case.model else "nothing was shifted, but the model changed"
    try:
        worst, allowed = deviation(case.model, written, case.feeds)
    except Exception as error:
        return f"the written model does not run: {error}"
    return "" if worst <= allowed else f"outputs differ by {worst:.2g}, noise is {allowed:.2g}"


def deviation(one: onnx.ModelProto, two: onnx.ModelProto, feeds: list[list[bytes]]) -> tuple[float, float]:
    """Largest difference of two models' outputs relative to an output's largest value, and what may pass as noise.

    Noise is `NOISE_FACTOR` times the same figure of the first model with and without graph optimizations, at least
    one rounding unit of float32 (or of the output's own type, if that is coarser).
    """
    names = [value.name for value in one.graph.input if value.name not in {t.name for t in one.graph.initializer}]
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for options in (plain,):
        options.log_severity_level = 4
    sessions = [
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for model, options in ((one, None), (one, plain), (two, None))
    ]
    worst = noise = 0.0
    for feed in feeds:
        arrays = {
            name: numpy_helper.to_array(onnx.TensorProto.FromString(message))
            for name, message in zip(names, feed, strict=True)
        }
        original, unoptimized, changed = (session.run(None, arrays) for session in sessions)
        for a, b, c in zip(original, unoptimized, changed, strict=True):
            unit = max(FLOAT32_UNIT, float(np.finfo(a.dtype).eps) / 2 if a.dtype.kind == "f" else 0.0)
            noise = max(noise, unit, _relative(a, b))
            worst = max(worst, _relative(a, c))
    return worst, NOISE_FACTOR * noise


def _relative(reference: np.ndarray, other: np.ndarray) -> float:
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    if reference.shape != other.shape:
        return float("inf")
    scale = np.abs(reference).max(initial=0.0) or 1.0
    return float(np.abs(reference - other).max(initial=0.0) / scale)


def tables(rows: Sequence[Row]) -> str:
    """The survey as text."""
    outcomes = ("shifted", "unchanged", "skipped", "no layer", "refused", "problem")
    lines = [f"{'models':20}{'run':>8}" + "".join(f"{name:>12}" for name in outcomes)]
    for kind in [kind for kind in KINDS if any(row.kind == kind for row in rows)] + ["all"]:
        counts = collections.Counter(row.outcome for row in rows if kind in {row.kind, "all"})
        lines.append(f"{kind:20}{counts.total():>8}" + "".join(f"{counts[name]:>12}" for name in outcomes))
    layers = collections.Counter((op, status, _kind_of_message(why)) for row in rows for op, status, why in row.layers)
    lines += ["", f"{'layers':>8}  {'operator':24}{'status':12}reason"]
    for (op_type, status, reason), count in sorted(layers.items()):
        lines.append(f"{count:>8}  {op_type:24}{status:12}{reason}")
    refusals = collections.Counter(_kind_of_message(row.message) for row in rows if row.outcome == "refused")
    lines += ["", f"{'refused':>8}  message"]
    lines += [f"{count:>8}  {message}" for message, count in refusals.most_common()]
    problems = [row for row in rows if row.outcome == "problem"]
    lines += ["", f"{len(problems)} problems"]
    for kind, count in collections.Counter(_kind_of_message(row.message) for row in problems).most_common():
        first = next(row for row in problems if _kind_of_message(row.message) == kind)
        lines.append(f"{count:>8}  first {first.kind}/{first.name}: {first.message}")
    return "\n".join(lines)


def _kind_of_message(message: str) -> str:
    """A message without what is particular to one case: paths, names, shapes, numbers."""
    text = re.sub(r"/\S+/", "", message.removeprefix("error: "))
    text = re.sub(r"'[^']*'|\[[^\]]*\]|\([^)]*\)", "*", text)
    return re.sub(r"\d+", "#", text)[:150]


def main() -> None:
    """Reads the command line, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")
    arguments = parser.parse_args()
    unknown = set(arguments.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    rows = []
    for case in cases(arguments.kinds or KINDS, arguments.only):
        with tempfile.TemporaryDirectory(prefix="survey-") as folder:
            rows.append(survey(case, Path(folder)))
        if sys.stderr.isatty() or os.environ.get("SURVEY_VERBOSE"):
            print(
                f"{rows[-1].seconds:6.2f} s  {rows[-1].outcome:10} {case.kind}/{case.name}", file=sys.stderr, flush=True
            )
    print(tables(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(any(row.outcome == "problem" for row in rows))


if __name__ == "__main__":
    main()
