"""One layer at few bits: round-to-nearest and GPTQ, of the weight as it was and of range-shifted ones.

    python tools/gptq_reference.py MODEL.onnx --weight NAME [--calib FILE --test FILE] [--tolerance 0.03 0.1 ...]

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023) is here for comparison alone: all inputs in one block, damping of 1 % of the mean diagonal,
and the per-channel symmetric scales of plain round-to-nearest, so that both choose from the same levels.

The error is `‖A(Q(W) - V)‖_F / ‖A V‖_F` for the ORIGINAL V, on the calibration rows and on the test rows; top-1 and
NLL are those of the float model with this one weight replaced.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from score import Judge, read_arrays
from torch import Tensor

from onnx_optshift.quantize.rtn import Grid, round_to_nearest
from onnx_optshift.run.capture import captured
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings
from onnx_optshift.solve.finish import finished
from onnx_optshift.solve.objective import Norm, make_objective
from onnx_optshift.solve.spectrum import relative_residual
from onnx_optshift.write.patch import write_beside

DAMPING = 0.01  # of the mean diagonal of H, the paper's


def gptq(matrix: Tensor, gram: Tensor, bits: int, *, damping: float = DAMPING) -> Tensor:
    """Quantizes the inputs one after the other, each time letting those that are left make up for the error.

    With H = AᵀA + damping and U the upper Cholesky factor of H⁻¹, rounding input i with error e = (w_i - q_i) / U_ii
    is best made up for by `w_j -= U_ij e` for j > i (equations 2 and 3 of the paper, with its step 3 factorization).

    Args:
        matrix: W `[g, d, m]`.
        gram: AᵀA `[g, d, d]`.
        bits: Of the symmetric grid per output channel.
        damping: Added to the diagonal, as a share of its mean.

    Returns:
        `[g, d, m]`, float64.
    """
    work = matrix.to(torch.float64).clone()
    width = work.shape[1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)[..., None]
    hessian = gram + (damping * diagonal).clamp_min(torch.finfo(torch.float64).tiny) * torch.eye(width).to(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    top = 2 ** (bits - 1) - 1
    scale = work.abs().amax(1, keepdim=True) / top
    scale = torch.where(scale == 0, 1.0, scale)
    for i in range(width):
        row = work[:, i : i + 1]
        rounded = (row / scale).round().clamp(-top, top) * scale
        error = (row - rounded) / upper[:, i : i + 1, i : i + 1]
        work[:, i + 1 :] -= upper[:, i, i + 1 :, None] * error
        work[:, i : i + 1] = rounded
    return work


def main() -> None:
    """Reads the command line and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--weight", required=True, help="the initializer")
    parser.add_argument("--calib", type=Path, help="calibration data (default: calibration.npz beside the model)")
    parser.add_argument("--test", type=Path, help="labelled test data (default: heldout.npz beside the model)")
    parser.add_argument("--objective", default="range")
    parser.add_argument("--tolerance", type=float, nargs="*", default=[0.01, 0.03, 0.1], help="layer residuals")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    arguments = parser.parse_args()

    settings = Settings(nodes_to_include=(arguments.weight,))
    places = [
        given or arguments.model.with_name(name)
        for given, name in ((arguments.calib, "calibration.npz"), (arguments.test, "heldout.npz"))
    ]
    opened = [prepare(arguments.model, settings, [str(place)]) for place in places]
    layers, unseen = (captured(prepared, prepared.data, Norm())[0] for prepared in opened)
    source, (weight,) = opened[0].model, layers.weights.values()
    judge = Judge(arguments.model, read_arrays(places[1]))

    problem, gram = layers.problem(weight), layers.factored.moments(weight).gram()
    original, spectra = problem.matrix, (problem.spectrum, unseen.spectrum(weight))
    candidates = {"no shift": original}
    for tolerance in arguments.tolerance:
        found = make_objective(arguments.objective).solve(problem, tolerance)
        candidates[f"{arguments.objective}, residual {tolerance:g}"] = found.matrix
        print(f"{arguments.objective} at {tolerance:g}: range {found.range_after / found.range_before:.3f} of before, "
              f"norm {found.norm_after / found.norm_before:.3f}, {found.iterations} iterations")  # fmt: skip
    print(f"\n{weight.name} [{weight.d}, {weight.m}], {layers.factored.moments(weight).rows} rows\n")
    print("| bits | weight | quantizer | error, calibration | error, test | top-1 | NLL |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="gptq-reference-") as folder:
        target = Path(folder) / "model.onnx"
        for bits in [32, *arguments.bits]:
            for title, matrix in candidates.items():
                kinds = {"float": matrix} if bits == 32 else {
                    "RTN": round_to_nearest(matrix, Grid(bits)), "GPTQ": gptq(matrix, gram, bits)
                }  # fmt: skip
                for kind, quantized in kinds.items():
                    array = finished(quantized, weight.form, source.initializer(weight.name).dtype)
                    write_beside(source, {weight.name: array}, target).commit()
                    score = judge.score(target)
                    errors = [relative_residual(spectrum, original, quantized) for spectrum in spectra]
                    print(f"| {bits} | {title} | {kind} | {errors[0]:.4f} | {errors[1]:.4f} | {100 * score.top1:.2f} "
                          f"| {score.nll:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
