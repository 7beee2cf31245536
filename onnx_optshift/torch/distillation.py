"""`distill_`: the last step of a distillation without training, one layer solved towards a teacher's outputs.

With rows A of the layer, its weight V, its bias b and the teacher's outputs T, both centred (a bias takes the means),
`min ‖W‖_F` or `min ‖W - V‖_F  subject to  ‖AW - T‖² <= least + ε² ‖·‖²`: the ball of `solve.towards`, around T
itself or around what V lacks of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onnx_optshift.capture.session import as_tensor
from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.solve.finish import as_matrix, finished
from onnx_optshift.solve.problem import ROUNDING_UNIT
from onnx_optshift.solve.spectrum import factor
from onnx_optshift.solve.towards import towards
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import to_rows
from onnx_optshift.torch.arrays import as_array
from onnx_optshift.torch.calls import Calls, leaves
from onnx_optshift.torch.capture import Hooks, solver_device
from onnx_optshift.torch.discover import discover
from onnx_optshift.torch.running import check_hooks_are_seen, evaluating, put, unwrapped

LEAST = ("change", "norm")


@dataclass(frozen=True)
class Distilled:
    """How near a layer came to its teacher.

    Attributes:
        distance_before: Relative Frobenius distance of the layer's outputs to the teacher's, around their mean.
        distance_after: The same of the new weight, in the layer's own dtype.
        norm_before: ‖V‖_F.
        norm_after: ‖W‖_F.
        rows: Of the data.
    """

    distance_before: float
    distance_after: float
    norm_before: float
    norm_after: float
    rows: int


def distill_(
    model: nn.Module,
    teacher: nn.Module | Callable[..., object],
    data: Iterable[object],
    layer: str,
    *,
    tolerance: float = 0.0,
    least: str = "change",
) -> Distilled:
    """Solves one linear layer of a model for the outputs of a teacher, in place; the bias follows where there is one.

    Args:
        model: The student.
        teacher: Called as the model is; its first floating output `[..., m]` is what the layer's outputs should be:
            logits for a classifier's last layer.
        data: As for `shift_`; labels are not used.
        layer: Qualified name of a Linear that is called once in forward.
        tolerance: ε, what may be left beyond what no weight can reach: 0 is least squares; 1 leaves the weight as it
            is with `"change"`, and makes it 0 with `"norm"`.
        least: `"change"`, the default: of all weights as near to the teacher, the one nearest to the layer's own; then
            ε is relative to what the layer lacks. `"norm"`: the smallest; then ε is relative to the teacher's outputs.

    Returns:
        How near it came.

    Raises:
        InputError: The layer, the teacher's outputs or a choice cannot be used. The model is as it was.
    """
    if least not in LEAST or not 0 <= tolerance <= 1:
        raise InputError(
            f"expected a tolerance from 0 to 1 and least as one of {LEAST}, found {tolerance!r}, {least!r}."
        )
    check_hooks_are_seen(model)
    model = unwrapped(model)
    found = discover(model, lambda module, path: path == layer and isinstance(module, nn.Linear))
    if len(found.modules) != 1:
        raise InputError(f"layer {layer!r} is not a Linear of the model whose weight is its own and can be solved for.")
    ((tap, module),), (weight,) = found.modules.items(), found.weights
    moments = _joint_moments(model, teacher, data, tap, module, weight.m)
    (gram,), (total,), d, count = moments.gram(), moments.total, weight.d, moments.rows
    if not bool(torch.isfinite(gram).all()):
        raise InputError(f"the inputs of {layer!r} or the teacher's outputs contain NaN or infinity.")
    bias = module.bias
    if bias is not None:
        gram = gram - total[:, None] * total / count
    rows = InputMoments(1, d, moments.device)
    rows.update_gram(gram[None, :d, :d], total[None, :d], count)
    cross, wanted = gram[:d, d:], gram[d:, d:].trace()
    before = as_matrix(found.content(weight.name), weight.form, str(moments.device))[0]

    def distance(matrix: Tensor) -> float:
        """‖A W - T‖² of a weight `[d, m]`."""
        return max(float((matrix * (gram[:d, :d] @ matrix - 2 * cross)).sum() + wanted), 0.0)

    unit, spectrum = ROUNDING_UNIT[weight.dtype], factor(rows)
    if least == "norm":
        after = towards(spectrum, cross[None], float(wanted), tolerance, unit).matrix[0]
    else:
        lacking = cross - gram[:d, :d] @ before
        after = before + towards(spectrum, lacking[None], distance(before), tolerance, unit).matrix[0]
    content = as_tensor(finished(after[None], weight.form, found.content(weight.name).dtype))
    written = as_matrix(as_array(content), weight.form, str(moments.device))[0]
    put(found.parameters, {weight.name: content})
    if isinstance(bias, nn.Parameter):
        put({"bias": bias}, {"bias": (total[d:] - total[:d] @ written) / count})
    scale = math.sqrt(float(wanted)) or math.inf
    near, nearer = (math.sqrt(distance(matrix)) / scale for matrix in (before, written))
    return Distilled(near, nearer, float(before.norm()), float(written.norm()), count)


def _joint_moments(
    model: nn.Module,
    teacher: nn.Module | Callable[..., object],
    data: Iterable[object],
    tap: Tap,
    module: nn.Module,
    outputs: int,
) -> InputMoments:
    """Moments of a layer's rows and, beside each, of what its outputs should be: `[1, n, d + m]`.

    Raises:
        InputError: The two do not fit together.
    """
    moments = InputMoments(1, tap.width + outputs, solver_device(model))
    source = Calls(model, data)
    seen: list[Tensor] = []
    guide = unwrapped(teacher) if isinstance(teacher, nn.Module) else None
    with evaluating(model), evaluating(guide or nn.Module()):
        for call in source:
            seen.clear()
            with Hooks({tap: module}, lambda _, activation: seen.append(to_rows(activation, tap))):
                source.run(call)
            targets = leaves((guide or teacher)(*call.args, **call.kwargs))
            rows = seen[0] if len(seen) == 1 else None
            if rows is None or not targets or targets[0].shape[-1:] != (outputs,):
                raise InputError(
                    f"layer {tap.value!r} was called {len(seen)} time(s), and the teacher gave "
                    f"{[list(t.shape) for t in targets]}. Expected one call, and one output of [..., {outputs}] first."
                )
            wanted = targets[0].reshape(1, -1, outputs).to(moments.device, torch.float64)
            if wanted.shape[1] != rows.shape[1]:
                raise InputError(
                    f"layer {tap.value!r} has {rows.shape[1]} rows, the teacher's output {wanted.shape[1]}. Expected "
                    "as many."
                )
            moments.update(torch.cat([rows.to(wanted), wanted], 2))
    return moments
