"""Shift, then quantize with real quantizers: what each makes of the model as it was and of the shifted one.

    python tools/quantize_recipe.py models/digits_mlp/model.onnx --tolerance 0.05 auto
    python tools/quantize_recipe.py MODEL.onnx ... [--calib FILE --test FILE] [--tolerance EPS|auto ...]
        [--layer-residual EPS ...] [--quantizers rtn static dynamic nbits peer] [--bits 8 4 3 2] [--seeds 0 1 2]
        [--peer-python PYTHON [--equalizers]]

Each `--tolerance` is one call of `onnx_optshift.shift` per seed and per bit width of the quantizers. It sees the
calibration data alone and splits its own judges off that, so the test data has decided nothing; figures are medians
over the seeds. Each `--layer-residual` shifts all layers in parallel by exactly this residual, without a gate. Both
files then go through the same quantizers with the same settings. Data that is not named is looked for beside the
model: `calibration.npz` and `heldout.npz`.

The tables give top-1 and NLL on the test data's labels and the output error `‖Z' - Z‖_F / ‖Z‖_F` of the first output
against the FLOAT ORIGINAL, so that what the shift itself moves counts too. Ratio = error shifted / error unshifted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from quantizers import EQUALIZERS, NotApplicable, Quantizer, run_peer, table
from score import LABELS, Arrays, Judge, Score, read_arrays

from onnx_optshift.api import shift
from onnx_optshift.errors import OptShiftError
from onnx_optshift.graph.selection import Selection
from onnx_optshift.quantize.rtn import Grid
from onnx_optshift.run.capture import captured, objective_of
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.finish import finished
from onnx_optshift.write.patch import write_beside

FAMILIES = ("rtn", "static", "dynamic", "nbits", "peer")
ANY = 0  # bits of a shift that was not made for one width


@dataclass(frozen=True)
class Variant:
    """A way to shift, and the files that it gave.

    Attributes:
        title: What was done.
        files: By bits of the quantizer that comes next, one file per seed; one entry for all bits under `ANY`.
        notes: One line per file.
    """

    title: str
    files: Mapping[int, tuple[Path, ...]]
    notes: tuple[str, ...] = ()

    def for_bits(self, bits: int) -> tuple[Path, ...]:
        """The files for a quantizer of these bits; none where the shift was refused."""
        return self.files.get(bits, self.files.get(ANY, ()))


def shifted_by_tolerance(
    model: Path, calibration: Path, tolerance: str, bits: Sequence[int], arguments: argparse.Namespace, folder: Path
) -> Variant:
    """The whole pass, as a user calls it, for every bit width that comes next and every seed."""
    files: dict[int, tuple[Path, ...]] = {}
    notes = []
    for count in bits:
        for seed in arguments.seeds:
            try:
                result = shift(
                    model,
                    str(calibration),
                    tolerance=tolerance if tolerance == "auto" else float(tolerance),
                    quantization_bits=(count,),
                    seed=seed,
                    **_chosen(arguments),
                )
            except OptShiftError as error:
                notes.append(f"{count} bits, seed {seed}: refused: {error}")
                continue
            report = result.report
            shifted = [layer for layer in report.layers if layer.status == "shifted"]
            residual = max((layer.tolerance or 0.0 for layer in shifted), default=0.0)
            deviation = max((output.rel for output in report.verification.outputs), default=0.0)
            notes.append(
                f"{count} bits, seed {seed}: {len(shifted)} of {len(report.layers)} layers, layer residual "
                f"{residual:.3g}, model deviation {deviation:.3g}, {report.timing.total:.0f} s"
            )
            path = result.save(folder / f"shifted-{tolerance}-{count}-{seed}.onnx")
            files[count] = (*files.get(count, ()), path)
    title = f"--objective {arguments.objective} --tolerance {tolerance} --quantization-bits (those of each row)"
    return Variant(title, files, tuple(notes))


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "objective": arguments.objective,
        "range_scope": arguments.range_scope,
        "range_block": arguments.range_block,
        "nodes_to_include": tuple(arguments.nodes_to_include),
    }


def shifted_by_residual(
    model: Path, calibration: Path, residual: float, arguments: argparse.Namespace, folder: Path
) -> Variant:
    """All layers in parallel against their original inputs, each by this residual, without a gate."""
    prepared = prepare(model, Settings(**_chosen(arguments)), [str(calibration)])
    layers, _ = captured(prepared, prepared.data, objective_of(prepared))
    arrays, ratios = {}, []
    for weight in layers.weights.values():
        found = layers.objective.solve(layers.problem(weight), residual)
        if found.outcome.moved:
            arrays[weight.name] = finished(found.matrix, weight.form, prepared.model.initializer(weight.name).dtype)
            ratios.append(found.range_after / found.range_before)
    target = folder / f"residual-{residual}.onnx"
    write_beside(prepared.model, arrays, target).commit()
    ends = f"{min(ratios, default=1):.2f} to {max(ratios, default=1):.2f}"
    said = f"{len(arrays)} of {len(layers.weights)} layers, ranges {ends} of before"
    return Variant(f"objective {arguments.objective}, every layer at residual {residual:g}", {ANY: (target,)}, (said,))


def equalized(
    model: Path, name: str, calibration: Arrays, arguments: argparse.Namespace, folder: Path
) -> Variant | None:
    """What another package's float-to-float pass makes of the model; None when it fails."""
    target = folder / f"{name.replace(' ', '-')}.onnx"
    try:
        run_peer(name, arguments.peer_python, model, target, calibration)
    except NotApplicable as reason:
        print(f"\n{name}: {reason}")
        return None
    return Variant(f"{name}, instead of a shift", {ANY: (target,)})


def compare(
    model: Path, variants: Sequence[Variant], quantizers: Sequence[Quantizer], calibration: Arrays, judge: Judge
) -> None:
    """Prints a table per variant."""
    with tempfile.TemporaryDirectory(prefix="quantize-recipe-") as name:
        target = Path(name) / "quantized.onnx"
        before = {quantizer: _scores([model], quantizer, calibration, judge, target) for quantizer in quantizers}
        for variant in variants:
            print(f"\n### {variant.title}\n")
            for note in variant.notes:
                print(f"- {note}")
            print("\n| quantizer | bits | top-1 | shifted | NLL | shifted | error | shifted | ratio |")
            print("|---|---|---|---|---|---|---|---|---|")
            for bits, files in variant.files.items():
                name = "float" if bits == ANY else f"float, shifted for {bits} bits"
                _print_row(name, 32, judge.score(model), _median([judge.score(file) for file in files]))
            for quantizer in quantizers:
                if isinstance(before[quantizer], str):
                    print(f"| {quantizer.name} | {quantizer.bits} | {before[quantizer]} |||||||", flush=True)
                    continue
                after = _scores(variant.for_bits(quantizer.bits), quantizer, calibration, judge, target)
                if isinstance(after, str):
                    print(f"| {quantizer.name} | {quantizer.bits} | shifted: {after} |||||||", flush=True)
                    continue
                _print_row(quantizer.name, quantizer.bits, before[quantizer], after)


def _scores(
    files: Sequence[Path], quantizer: Quantizer, calibration: Arrays, judge: Judge, target: Path
) -> Score | str:
    """Median score over the quantized files, or why the quantizer gives none."""
    scores = []
    if not files:
        return "no shift that the gate accepts"
    for file in files:
        target.unlink(missing_ok=True)
        try:
            quantizer.run(file, target, calibration)
            scores.append(judge.score(target))
        except NotApplicable as reason:
            return str(reason)
        except Exception as error:  # someone else's quantizer: its failure is a row of the table, not the end of it
            return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return _median(scores)


def _median(scores: Sequence[Score]) -> Score:
    return Score(*(statistics.median(figures) for figures in zip(*map(astuple, scores), strict=True)))


def _print_row(name: str, bits: int, before: Score, after: Score) -> None:
    ratio = f"{after.error / before.error:.2f}" if before.error else "-"
    print(
        f"| {name} | {bits} | {100 * before.top1:.2f} | {100 * after.top1:.2f} | {before.nll:.4f} | {after.nll:.4f} "
        f"| {before.error:.4f} | {after.error:.4f} | {ratio} |",
        flush=True,
    )


def main() -> None:
    """Reads the command line and prints the tables of every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--calib", type=Path, help="calibration data (default: calibration.npz beside the model)")
    parser.add_argument("--test", type=Path, help="labelled test data (default: heldout.npz beside the model)")
    parser.add_argument("--objective", default="range", help="range or norm (default: %(default)s)")
    parser.add_argument("--tolerance", nargs="*", default=[], help="deviations of the model outputs, or auto")
    parser.add_argument("--layer-residual", type=float, nargs="*", default=[], help="residuals, without a gate")
    parser.add_argument("--nodes-to-include", nargs="*", default=[], help="shift and round to nearest these alone")
    parser.add_argument("--quantizers", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3, 2], help="of round-to-nearest")
    parser.add_argument("--levels", default="symmetric", help="of round-to-nearest: symmetric, full or unsigned")
    parser.add_argument(
        "--range-scope", default="channel", help="of the shift and of round-to-nearest: channel, tensor"
    )
    parser.add_argument("--range-block", type=int, help="the same in blocks of so many inputs")
    parser.add_argument("--block-size", type=int, default=32, help="of MatMulNBits (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="calibration samples for quantizers (they hold all)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the shift's own split")
    parser.add_argument("--peer-python", type=Path, help="interpreter with nvidia-modelopt or onnxsim")
    parser.add_argument("--equalizers", action="store_true", help="compare with CLE and SmoothQuant of onnxsim as well")
    arguments = parser.parse_args()
    if arguments.equalizers and arguments.peer_python is None:
        parser.error("--equalizers needs --peer-python")
    if not arguments.tolerance and not arguments.layer_residual and not arguments.equalizers:
        parser.error("give --tolerance or --layer-residual: without a shift there is nothing to compare")
    try:
        scope = "block" if arguments.range_block else arguments.range_scope
        quantizers = table(
            arguments.quantizers,
            arguments.bits,
            selection=Selection(tuple(arguments.nodes_to_include)),
            grid=Grid(8, scope, arguments.range_block, arguments.levels),
            block=arguments.block_size,
            samples=arguments.samples,
            peer_python=arguments.peer_python,
        )
        for model in arguments.models:
            calibration, test = (
                given or model.with_name(name)
                for given, name in ((arguments.calib, "calibration.npz"), (arguments.test, "heldout.npz"))
            )
            _one_model(model, calibration, test, quantizers, arguments)
    except OptShiftError as error:
        raise SystemExit(str(error)) from error


def _one_model(
    model: Path, calibration: Path, test: Path, quantizers: Sequence[Quantizer], arguments: argparse.Namespace
) -> None:
    with tempfile.TemporaryDirectory(prefix="quantize-recipe-") as name:
        folder = Path(name)
        judge = Judge(model, read_arrays(test))
        print(f"\n## {model} ({calibration.name}, {test.name})", flush=True)
        bits = sorted({quantizer.bits for quantizer in quantizers}, reverse=True)
        variants = [
            shifted_by_tolerance(model, calibration, text, bits, arguments, folder) for text in arguments.tolerance
        ]
        variants += [
            shifted_by_residual(model, calibration, value, arguments, folder) for value in arguments.layer_residual
        ]
        inputs = {key: array for key, array in read_arrays(calibration).items() if key != LABELS}
        first = {key: array[: arguments.samples] for key, array in inputs.items()}
        if arguments.peer_python is not None and arguments.equalizers:
            variants += [equalized(model, peer, first, arguments, folder) for peer in EQUALIZERS]
        compare(model, [variant for variant in variants if variant is not None], quantizers, inputs, judge)


if __name__ == "__main__":
    main()
