"""`shift_`: a module's weights, replaced in place by better solutions of the same equations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from onnx_optshift.capture.session import as_tensor
from onnx_optshift.capture.statistics import StatisticsStore
from onnx_optshift.decide.share import MOST_RESIDUAL, search
from onnx_optshift.errors import InputError, ToleranceError
from onnx_optshift.geometry import Tap
from onnx_optshift.run.candidate import Arrays
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.spanning import Spanning
from onnx_optshift.solve.finish import as_matrix
from onnx_optshift.solve.problem import ROUNDING_UNIT
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.row_weights import MOST_SAMPLES, RowRule, Rows, energies
from onnx_optshift.stats.rows import to_rows
from onnx_optshift.torch import ranks
from onnx_optshift.torch.calls import Call, Calls, Forward
from onnx_optshift.torch.capture import Hooks, Statistics, solver_device
from onnx_optshift.torch.config import ShiftConfig
from onnx_optshift.torch.discover import Discovered, FilterFn, discover
from onnx_optshift.torch.outputs import deviation, drawn
from onnx_optshift.torch.result import ShiftResult, layer_reports
from onnx_optshift.torch.running import check_hooks_are_seen, evaluating, put, unwrapped


def shift_(
    model: nn.Module,
    data: Iterable[object],
    config: ShiftConfig | None = None,
    filter_fn: FilterFn | None = None,
    *,
    forward: Forward | None = None,
) -> ShiftResult:
    """Replaces the weights of linear layers, in place, by smaller ones that give the same outputs on data.

    The model runs in eval mode and without gradients, and is back in its own mode afterwards. All layers are solved
    for the inputs that they have in the original model. Where anything fails the model is as it was.

    Args:
        model: After training. Compiled models are looked through; in DistributedDataParallel all ranks take part, each
            with its own data, and end up with the same weights.
        data: Batches, each what the model's forward takes: a tensor; a dict by the names of its parameters; a tuple or
            list, one for each required parameter. One more element is taken for labels, so that `(inputs, labels)`
            pairs come through. Tensors are moved to the model's device. Read once to solve, and again to find a
            residual and to verify; what can be iterated over only once is kept in memory.
        config: The choices; exact where none is given.
        filter_fn: `(module, qualified name) -> bool`, which modules may be shifted; all that can be by default.
        forward: Runs the model on one element of the data, where that says more than its inputs.

    Returns:
        What became of each weight.

    Raises:
        InputError: The data or the model cannot be used.
        ToleranceError: The model's outputs moved farther than allowed.
    """
    config = config or ShiftConfig()
    check_hooks_are_seen(model)
    group, model = ranks.group_of(model), unwrapped(model)
    found = discover(model, filter_fn)
    if not found.weights:
        reasons = "; ".join(f"{skip.weight}: {skip.reason}" for skip in found.skips[:5])
        raise InputError(f"no weight of {type(model).__name__} can be shifted. {reasons or 'It has no linear layer.'}")
    if group is not None and config.stochastic is not None:
        raise InputError("stochastic draws from one process's data. Give the module inside, on the first rank.")
    source = Calls(model, data, forward)
    with evaluating(model):
        with ranks.together(group):
            calls = source if config.stochastic is None else drawn(source, config.stochastic, config.seed)
        layers = _layers(source, calls, found, config, group)

        def moved(arrays: Arrays, some: Iterable[Call] = source) -> float:
            return deviation(source, some, found.parameters, tensors(arrays), group)

        measured: float | None = None
        if config.tolerance > 0 and config.tolerance_of == "outputs":
            shared = search(moved, layers.candidate, config.tolerance, min(config.tolerance, MOST_RESIDUAL))
            candidate, measured = shared.candidate, shared.deviation
        else:
            candidate = layers.candidate(config.tolerance)
        if config.verify and config.tolerance == 0:
            _check(measured := moved(candidate.arrays, calls), candidate.arrays, found)
        if config.verify and (measured is None or config.stochastic is not None):
            measured = moved(candidate.arrays)
    put(found.parameters, tensors(candidate.arrays))
    ranks.agree([found.parameters[weight.name] for weight in found.weights], group)
    return ShiftResult(layer_reports(layers, candidate, found.skips), measured, candidate.tolerance)


def layers_of(
    found: Discovered, moments: Mapping[Tap, InputMoments], config: ShiftConfig, spanning: Spanning | None = None
) -> Layers:
    """The pass's own layers, over a module's parameters."""
    device = str(next(iter(moments.values())).device)
    store, objective = StatisticsStore.of(moments), config.make_objective()
    return Layers(found.weights, store, found.content, objective, device=device, spanning=spanning)


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Solutions as tensors."""
    return {name: as_tensor(array) for name, array in arrays.items()}


def _layers(
    source: Calls, calls: Iterable[Call], found: Discovered, config: ShiftConfig, group: ranks.Group | None
) -> Layers:
    """The layers with the moments of all rows that reach them; of an exact shift, of as many as leave freedom."""
    device = solver_device(source.model)
    relative = config.row_weighting == "relative" and config.tolerance > 0
    rules = _rules(source, calls, found, device, group) if relative else {}
    statistics = Statistics(tuple(found.modules), device, rules)
    exact = config.tolerance == 0 and group is None
    spanning = Spanning(found.weights, found.content, str(device)) if exact else None
    with ranks.together(group), Hooks(found.modules, statistics.add):
        for call in calls:
            source.run(call)
            if spanning is not None:
                statistics.wanted = spanning.wanted(statistics.moments)
                if not statistics.wanted:
                    break
    return layers_of(found, ranks.merged(statistics.moments, group), config, spanning)


def _rules(
    source: Calls, calls: Iterable[Call], found: Discovered, device: torch.device, group: ranks.Group | None
) -> dict[Tap, RowRule]:
    """What weighs the rows of each tap, by the outputs that the first batch gives."""
    matrices = {w.name: as_matrix(found.content(w.name), w.form, str(device)).float() for w in found.weights}
    weight_of = {use.tap: weight.name for weight in found.weights for use in weight.uses}
    seen: dict[str, list[Tensor]] = {}

    def look(tap: Tap, activation: Tensor) -> None:
        values = energies(to_rows(activation[:MOST_SAMPLES], tap).to(device), matrices[weight_of[tap]])
        seen.setdefault(weight_of[tap], []).append(values[values.isfinite()])

    with ranks.together(group), Hooks(found.modules, look):
        source.run(next(iter(calls)))
    medians = {name: Rows(torch.cat(parts)).median for name, parts in seen.items() if any(map(len, parts))}
    everyones = ranks.gathered(medians, group)
    rules = {}
    for name, matrix in matrices.items():
        some = [theirs[name] for theirs in everyones if theirs.get(name, 0.0) > 0]
        if some:
            rules[name] = RowRule.of([matrix], [sum(some) / len(some)])
    return {tap: rules[name] for tap, name in weight_of.items() if name in rules}


def _check(measured: float, arrays: Arrays, found: Discovered) -> None:
    """Refuses outputs that moved although every layer's stayed.

    Raises:
        ToleranceError: They moved farther than rounding explains.
    """
    units = [ROUNDING_UNIT[weight.dtype] for weight in found.weights if weight.name in arrays]
    bound = math.sqrt(max(units, default=0.0))
    if not measured <= bound:
        raise ToleranceError(
            f"with exact shifts of {len(arrays)} weights the model's outputs deviate by {measured:.2g}, more than "
            f"rounding explains ({bound:.2g}). The model is as it was. (a) Its outputs are random in eval mode. "
            "(b) A weight is also used outside its own module: leave that out with filter_fn."
        )
