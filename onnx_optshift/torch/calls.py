"""Data as calls of a model: what an element gives to `forward`, and which part of it are labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onnx_optshift.errors import InputError

Forward = Callable[[Any], object]
"""Runs a model on one element of the data, where that says more than its inputs."""


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    labels: object = None  # that came with the inputs; None where none did

    def to(self, device: torch.device) -> Call:
        """The same with all tensors on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, index: Tensor) -> Call:
        """Some samples of it, by number along axis 0."""
        return self._with(lambda tensor: tensor[index.to(tensor.device)] if tensor.ndim else tensor)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        args, kwargs = _changed(self.args, change), _changed(self.kwargs, change)
        return Call(args, kwargs, _changed(self.labels, change))


class Calls:
    """Data, as often as it is wanted.

    An element is what the model's forward takes: a tensor; a dict or another mapping, by its parameters' names; a tuple
    or list, one for each of forward's required parameters. One element more than these is labels, which the model is
    not given: so `(inputs, labels)` pairs come through. A pair whose first element is itself a tuple, a list or a
    mapping is always inputs and labels.

    Args:
        model: The model itself, neither wrapped nor compiled.
        data: Elements. What can be iterated over only once is kept in memory.
        forward: Runs the model on an element; by the rules above when not given.
    """

    def __init__(self, model: nn.Module, data: Iterable[object], forward: Forward | None = None) -> None:
        if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
            raise InputError(
                f"data: expected an iterable of batches, found {type(data).__name__}. For a single batch give [batch]."
            )
        self.model = model
        self._data = list(data) if isinstance(data, Iterator) else data
        self._forward = forward
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._required = max(1, _required(model))

    def __iter__(self) -> Iterator[Call]:
        """One call an element, its tensors on the model's device.

        Raises:
            InputError: There is no element, or one does not fit the model.
        """
        count = 0
        for element in self._data:
            count += 1
            yield (Call((element,), {}) if self._forward else self._read(element)).to(self._device)
        if count == 0:
            raise InputError("data holds no batch. Give at least one; a generator that was used up gives none.")

    def run(self, call: Call) -> object:
        """The model's outputs."""
        return self._forward(*call.args) if self._forward else self.model(*call.args, **call.kwargs)

    def _read(self, element: object) -> Call:
        if isinstance(element, Mapping):
            return Call((), element)
        if not isinstance(element, (tuple, list)):
            return Call((element,), {})
        if len(element) == 2 and isinstance(element[0], (tuple, list, Mapping)):
            inputs, labels = element
            return Call((), inputs, labels) if isinstance(inputs, Mapping) else Call(tuple(inputs), {}, labels)
        if len(element) == self._required + 1:
            return Call(tuple(element[:-1]), {}, element[-1])
        if len(element) == self._required:
            return Call(tuple(element), {})
        raise InputError(
            f"data: an element is a {type(element).__name__} of {len(element)}, but {type(self.model).__name__}."
            f"forward requires {self._required} argument(s), and labels may follow. Give dicts by the names of its "
            "parameters, or forward=, a function that runs the model on an element."
        )


def leaves(output: object) -> list[Tensor]:
    """The floating tensors of what a model gave, in its own order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts: Iterable[object] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif hasattr(output, "__dataclass_fields__"):
        parts = vars(output).values()
    return [tensor for part in parts for tensor in leaves(part)]


def _required(model: nn.Module) -> int:
    """Positional parameters without a default that forward has."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(parameter.kind in kinds and parameter.default is inspect.Parameter.empty for parameter in parameters)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors inside tuples, lists and mappings, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _changed(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_changed(item, change) for item in value)
    return value
