"""Flatness from runs of the model against automatic differentiation: traces, relative flatness, largest eigenvalue.

    python tools/validate_flatness.py [--probes 200] [digits_mlp ...]

Rebuilds each example network in torch from the weights in its file, and computes the exact Hessian blocks there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from make_models import RECIPES

from onnx_optshift.calibration.source import Samples
from onnx_optshift.decide.gate import loss_of
from onnx_optshift.diagnosis.flatness import flatness
from onnx_optshift.diagnosis.landscape import Landscape, smooth_session
from onnx_optshift.run.bench import Bench
from onnx_optshift.run.prepare import prepare
from onnx_optshift.settings import Settings

SAME_PROBES = 8
MODELS = Path(__file__).parents[1] / "models"


def network_of(name: str) -> nn.Module:
    """The torch network of an example model, in float64, with the weights of the file."""
    network = RECIPES[name].build().double()
    proto = onnx.load(MODELS / name / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in proto.graph.initializer}
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            parameter.copy_(_stored(key, tuple(parameter.shape), stored, len(getattr(network, "layers", ()))))
    return network


def _stored(key: str, shape: tuple[int, ...], stored: dict[str, np.ndarray], layers: int) -> torch.Tensor:
    array = stored[initializer_of(key, layers)]
    if key.endswith(".weight") and len(shape) == 2 and _plain(array, shape, key):
        array = array.T
    return torch.from_numpy(np.ascontiguousarray(array))


def _plain(array: np.ndarray, shape: tuple[int, ...], key: str) -> bool:
    """Whether the file holds [d, m] where torch has [m, d]; square ones are so in the transformer alone."""
    return array.shape != shape or (shape[0] == shape[1] and not key.startswith("layers."))


def initializer_of(key: str, layers: int) -> str:
    """Name in the file of a torch parameter."""
    head, _, tail = key.rpartition(".")
    if head.startswith("layers."):
        number = int(head.split(".")[1]) + 1
        return f"{'logits' if number == layers else f'fc{number}'}.{tail}"
    if head in {"q", "k", "v", "o"}:
        head = f"attention.{head}"
    head = head.replace("_norm", ".norm").replace("ffn_", "ffn.").replace("ffn..", "ffn.")
    tail = tail.replace("weight", "scale") if head.endswith("norm") else tail
    return f"{head}.{tail}" if head else tail


def loss_function(network: nn.Module, samples: torch.Tensor, labels: torch.Tensor):
    """Mean cross-entropy as a function of a dict of parameters."""
    fixed = {key: parameter.detach() for key, parameter in network.named_parameters()}

    def loss(moved: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(functional_call(network, {**fixed, **moved}, (samples,)), labels)

    return loss, fixed


def hessian_product(loss, at: dict[str, torch.Tensor], along: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """H z, forward over reverse."""
    return jvp(torch.func.grad(loss), (at,), (along,))[1]


def exact_trace(loss, key: str, value: torch.Tensor, chunk: int = 8) -> float:
    """Trace of one parameter's block of H: every column by automatic differentiation."""
    gradient = torch.func.grad(lambda w: loss({key: w}))

    def entry(unit: torch.Tensor) -> torch.Tensor:
        return (jvp(gradient, (value,), (unit,))[1] * unit).sum()

    total, units = 0.0, torch.eye(value.numel(), dtype=value.dtype)
    for start in range(0, len(units), chunk):
        total += float(torch.vmap(entry)(units[start : start + chunk].reshape(-1, *value.shape)).sum())
    return total


def exact_mlp_trace(network: nn.Module, number: int, samples: torch.Tensor) -> float:
    """Trace of one layer's block of H in an MLP of ReLUs: `E ‖a‖² tr(Jᵀ H_out J)`, J from its outputs z to the logits.

    The logits are piecewise linear in the weight, so that nothing but the Gauss-Newton part is there.
    """
    layers = list(network.layers)
    rows = samples
    for layer in layers[:number]:
        rows = torch.relu(layer(rows))

    def rest(z: torch.Tensor) -> torch.Tensor:
        for layer in layers[number + 1 :]:
            z = layer(torch.relu(z))
        return z

    z = layers[number](rows).detach()
    jacobian = torch.vmap(torch.func.jacrev(rest))(z)
    shares = torch.softmax(rest(z), dim=1)
    outer = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
    inner = torch.einsum("ncm,ncd,ndm->n", jacobian, outer, jacobian)
    return float((rows.square().sum(dim=1) * inner).mean().detach())


def error_on_the_same_probes(bench, samples, loss, key: str, value: torch.Tensor, layer, seed: int) -> float:
    """Relative error of the mean zᵀHz over a few of the run's own probes: what differencing alone costs."""
    weight = next(weight for weight in bench.weights if weight.name == layer.name)
    place = Landscape(bench, smooth_session(bench), samples, loss_of(bench.outputs, samples), {}, seed)
    found, exact = 0.0, 0.0
    array = bench.model.initializer(layer.name)
    as_stored = array.shape == tuple(value.shape) and np.allclose(array, value.numpy())
    for probe in range(SAME_PROBES):
        signs = place.signs(layer.name, probe)
        found += place.differences({layer.name: signs}, layer.step).second
        z = torch.from_numpy(weight.form.from_matrix(signs))
        z = z if as_stored else z.T
        exact += float((hessian_product(loss, {key: value}, {key: z})[key] * z).sum())
    return found / exact - 1


def gauss_newton_product(network, samples, fixed, at, along):
    """Jᵀ H_out J z / n for the cross-entropy of logits."""

    def outputs(moved):
        return functional_call(network, {**fixed, **moved}, (samples,))

    logits, slopes = jvp(outputs, (at,), (along,))
    shares = torch.softmax(logits, dim=1)
    weighted = shares * (slopes - (shares * slopes).sum(dim=1, keepdim=True))
    return vjp(outputs, at)[1](weighted / len(samples))[0]


def largest(product, at: dict[str, torch.Tensor], iterations: int = 200) -> float:
    """Largest eigenvalue by power iteration on exact products."""
    generator = torch.Generator().manual_seed(0)
    z = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in at.items()}
    value = 0.0
    for _ in range(iterations):
        norm = torch.sqrt(sum((v**2).sum() for v in z.values()))
        z = {k: v / norm for k, v in z.items()}
        moved = product(at, z)
        new = float(sum((moved[k] * z[k]).sum() for k in z))
        z = {k: v.detach() for k, v in moved.items()}
        if abs(new - value) <= 1e-4 * abs(new):
            break
        value = new
    return new


def bench_of(name: str) -> tuple[Bench, Samples]:
    """Bench and calibration samples of an example model."""
    prepared = prepare(MODELS / name / "model.onnx", Settings(device="cpu", batch_size=250), None)
    assert prepared.data is not None
    return prepared.bench, prepared.data.calibration


def main() -> None:
    """Prints one line per layer and model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["digits_mlp", "noisy_mlp", "digits_transformer"])
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        bench, samples = bench_of(name)
        start = time.perf_counter()
        found = flatness(
            bench, samples, loss_of(bench.outputs, samples), {}, probes=arguments.probes, seed=arguments.seed
        )
        seconds = time.perf_counter() - start
        network = network_of(name)
        with np.load(MODELS / name / "calibration.npz") as file:
            inputs = torch.from_numpy(file[RECIPES[name].input].astype(np.float64))
            labels = torch.from_numpy(file["labels"])
        loss, fixed = loss_function(network, inputs, labels)
        keys = {initializer_of(key, len(getattr(network, "layers", ()))): key for key in fixed}
        print(
            f"\n{name}: mean loss {found.loss_before:.6g} (torch {float(loss(fixed)):.6g}), noise {found.noise:.2g}, "
            f"{arguments.probes} probes, {seconds:.1f} s"
        )
        print(
            f"{'layer':24}{'step':>10}{'trace':>12}{'s.e.':>9}{'autograd':>12}{'off by':>9}{'in s.e.':>9}"
            f"{'same probes':>13}"
        )
        total = 0.0
        for layer in found.layers:
            key = keys[layer.name]
            number = int(key.split(".")[1]) if key.startswith("layers.") else -1
            exact = exact_mlp_trace(network, number, inputs) if number >= 0 else exact_trace(loss, key, fixed[key])
            total += exact
            same = error_on_the_same_probes(bench, samples, loss, key, fixed[key], layer, arguments.seed)
            _line(layer.name, f"{layer.step:10.2g}", layer.trace.before, exact, f"{same:13.2%}")
        _line("total", " " * 10, found.trace.before, total)
        _line("total (Gauss-Newton)", " " * 10, found.gauss_newton.before, total)
        at = {keys[layer.name]: fixed[keys[layer.name]] for layer in found.layers}
        hessian = largest(lambda at, z, f=loss: hessian_product(f, at, z), at)
        gauss = largest(lambda at, z, n=network, x=inputs, f=fixed: gauss_newton_product(n, x, f, at, z), at)
        top = found.top_before
        bracket = f"[{top.lower:.4g}, {top.upper:.4g}] from {top.probes} probes" if top else "not kept"
        print(f"largest eigenvalue: {bracket}; autograd: Gauss-Newton {gauss:.4g}, Hessian {hessian:.4g}", flush=True)


def _line(name: str, step: str, found, exact: float, more: str = "") -> None:
    off = found.value - exact
    print(
        f"{name:24}{step}{found.value:12.5g}{found.error:9.2g}{exact:12.5g}{off / exact:9.2%}{off / found.error:9.2f}"
        f"{more}",
        flush=True,
    )


if __name__ == "__main__":
    main()
