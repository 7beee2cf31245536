"""From a module to its weights: every parameter that a linear layer multiplies with, by ALL modules that hold it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize

from onnx_optshift.geometry import MatrixRows, PatchRows, Reshape, Tap, Transpose, WeightForm
from onnx_optshift.graph.weights import Skip, Use, Weight, swapped, with_leading_axis
from onnx_optshift.solve.problem import ROUNDING_UNIT
from onnx_optshift.torch.arrays import as_array

FilterFn = Callable[[nn.Module, str], bool]
"""(module, its qualified name) -> whether its weight may be shifted: the form of torchao's `quantize_`."""

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KNOWN = (nn.Linear, *_CONVS, *_TRANSPOSED)
# Why modules that multiply with weights, or hold some, are left alone.
_REASONS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "its rows are looked up, not multiplied with"),
    (nn.EmbeddingBag, "its rows are looked up, not multiplied with"),
    (nn.RNNBase, "what its weights meet is computed inside it. The pass shifts it in the exported model"),
    (nn.RNNCellBase, "what its weights meet is computed inside it. The pass shifts it in the exported model"),
    (nn.MultiheadAttention, "what its weights meet is computed inside it. The pass shifts it in the exported model"),
)


@dataclass(frozen=True)
class Discovered:
    """The linear layers of a module."""

    weights: tuple[Weight, ...]  # those that can be solved for, named as in `state_dict`
    skips: tuple[Skip, ...]  # those that are left alone, with reasons
    parameters: dict[str, nn.Parameter]  # by the weight's name
    modules: dict[Tap, nn.Module]  # that read the tap

    def content(self, name: str) -> NDArray[np.generic]:
        """What a weight holds now."""
        return as_array(self.parameters[name])

    def only(self, names: Iterable[str]) -> Discovered:
        """The same with these weights alone."""
        chosen = set(names)
        weights = tuple(weight for weight in self.weights if weight.name in chosen)
        parameters = {name: parameter for name, parameter in self.parameters.items() if name in chosen}
        modules = {use.tap: self.modules[use.tap] for weight in weights for use in weight.uses}
        return replace(self, weights=weights, parameters=parameters, modules=modules)


@dataclass(frozen=True)
class _Holder:
    """A module that holds a parameter."""

    path: str
    module: nn.Module
    attribute: str
    inside_attention: bool

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


def discover(model: nn.Module, filter_fn: FilterFn | None = None) -> Discovered:
    """All weights of two axes and more, in the order of `named_modules`; shared ones once.

    Args:
        model: A module that is neither compiled nor wrapped.
        filter_fn: Which modules' weights may be shifted; all that can be when not given.
    """
    holders: dict[int, list[_Holder]] = {}
    for holder, parameter in _held(model):
        holders.setdefault(id(parameter), []).append(holder)
    found = Discovered((), (), {}, {})
    weights, skips = [], []
    for uses in holders.values():
        first = uses[0]
        parameter = getattr(first.module, first.attribute)
        reason = next(filter(None, map(_obstacle, uses)), None)
        if reason is None and len({_read(holder)[1] for holder in uses}) > 1:
            reason = "they read it in different ways"
        if len(uses) > 1 and reason is not None:
            reason = f"{', '.join(repr(h.path) for h in uses)} share it: {reason}"
        chosen = reason is not None or filter_fn is None or all(filter_fn(h.module, h.path) for h in uses)
        if reason is None and chosen:
            weight = _weight(uses, parameter)
            weights.append(weight)
            found.parameters[weight.name] = parameter
            found.modules.update({use.tap: h.module for use, h in zip(weight.uses, uses, strict=True)})
        else:
            kind = type(first.module).__name__
            skips.append(Skip(first.name, first.path, kind, reason or "left out by filter_fn", unselected=not chosen))
    return Discovered(tuple(weights), tuple(skips), found.parameters, found.modules)


def _held(model: nn.Module) -> Iterator[tuple[_Holder, object]]:
    """Weights that modules hold: parameters, and attributes that are computed from some."""
    attentions = [
        f"{path}." if path else "" for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    ]
    for path, module in model.named_modules():
        inside = any(path.startswith(prefix) and path != prefix[:-1] for prefix in attentions)
        if isinstance(module, parametrize.ParametrizationList):
            continue
        if isinstance(module, _KNOWN):
            yield _Holder(path, module, "weight", inside), module._parameters.get("weight", module)
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and (parameter.ndim >= 2 or nn.parameter.is_lazy(parameter)):
                yield _Holder(path, module, attribute, inside), parameter


def _obstacle(holder: _Holder) -> str | None:
    """Why a module's weight cannot be solved for, or None."""
    module = holder.module
    kind = next((known for known in _KNOWN if isinstance(module, known)), None)
    if holder.inside_attention:
        return "what it meets is computed inside a MultiheadAttention. The pass shifts it in the exported model"
    if kind is None:
        reasons = (reason for known, reason in _REASONS if isinstance(module, known))
        return next(reasons, f"{type(module).__name__} is not handled")
    if any(getattr(type(module), f, None) is not getattr(kind, f, None) for f in ("forward", "_conv_forward")):
        return f"{type(module).__name__} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(module, "weight"):
        return "its weight is computed from other parameters. Let remove_parametrizations make it one first"
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        return "its weight has no values yet"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if _dtype(weight) not in ROUNDING_UNIT:
        return f"its weight's type {_dtype(weight)} is not one of {', '.join(ROUNDING_UNIT)}"
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(module, _CONVS) and module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r} is not handled"
    return None


def _weight(holders: list[_Holder], parameter: nn.Parameter) -> Weight:
    """The weight of modules that can be solved for, and read it in one way."""
    taps, forms = zip(*map(_read, holders), strict=True)
    uses = [Use(h.path, type(h.module).__name__, tap, "") for h, tap in zip(holders, taps, strict=True)]
    return Weight(holders[0].name, _dtype(parameter), tuple(parameter.shape), forms[0], tuple(uses))


def _read(holder: _Holder) -> tuple[Tap, WeightForm]:
    """How a module reads its input as rows, and its weight as V."""
    module = holder.module
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    shape = tuple(weight.shape)
    form = WeightForm(shape)
    rows: MatrixRows | PatchRows = MatrixRows()
    if isinstance(module, _CONVS):
        same, explicit = module.padding == "same", isinstance(module.padding, tuple)
        pads = tuple(int(pad) for pad in module.padding) * 2 if explicit else (0,) * (2 * len(module.kernel_size))
        # What torch adds for "same" has its odd pixel at the end.
        auto = "NOTSET" if explicit else "SAME_UPPER" if same else "VALID"
        rows = PatchRows(module.kernel_size, module.stride, module.dilation, pads, auto, module.groups)
        depth = shape[1] * math.prod(shape[2:])
        form = form.then(Reshape((module.groups, shape[0] // module.groups, depth))).then(Transpose((0, 2, 1)))
    elif isinstance(module, _TRANSPOSED):
        ones = (1,) * len(module.kernel_size)
        rows = PatchRows(ones, ones, ones, (0,) * (2 * len(ones)), group=module.groups)
        form = form.then(Reshape((module.groups, shape[0] // module.groups, math.prod(shape[1:]))))
    else:
        form = with_leading_axis(swapped(form))
    groups, width, _ = form.result_shape
    return Tap(holder.path, rows, groups, width), form


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
