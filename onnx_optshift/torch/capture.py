"""Forward pre-hooks that add what reaches the layers to their moments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onnx_optshift.geometry import PatchRows, Tap
from onnx_optshift.stats.moments import InputMoments
from onnx_optshift.stats.rows import Weigh, observe

Watch = Callable[[Tap, Tensor], None]


class Hooks:
    """Calls a function with every tensor that reaches a tap, while hooks are in place; nothing is left of them then.

    Args:
        modules: By the tap that they read.
        watch: What is done with an input.
    """

    def __init__(self, modules: Mapping[Tap, nn.Module], watch: Watch) -> None:
        self._modules = modules
        self._watch = watch
        self._handles: list[RemovableHandle] = []

    @property
    def armed(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles)

    def arm(self) -> None:
        """Puts the hooks in place."""
        self.disarm()
        for tap, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(tap), with_kwargs=True))

    def disarm(self) -> None:
        """Removes them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Hooks:
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disarm()

    def _hook(self, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            activation = (args[0] if args else kwargs["input"]).detach()
            if isinstance(tap.form, PatchRows) and activation.ndim == 1 + len(tap.form.kernel):
                activation = activation[None]  # an image by itself
            self._watch(tap, activation)

        return hook


class Statistics:
    """Moments of the rows of every tap.

    Args:
        taps: All of them.
        device: Where the moments live.
        rules: What weighs the rows of a tap; all rows alike where there is none.
        first: Entries along axis 0 of an input that are taken at most, over all calls; None for all.

    Attributes:
        moments: By tap.
        wanted: Taps whose rows are still taken; all of them at first.
    """

    def __init__(
        self,
        taps: tuple[Tap, ...],
        device: torch.device,
        rules: Mapping[Tap, Weigh] | None = None,
        *,
        first: int | None = None,
    ) -> None:
        self.moments = {tap: InputMoments(tap.groups, tap.width, device) for tap in taps}
        self.wanted: Collection[Tap] = taps
        self._rules = rules or {}
        self._first = first
        self._taken = dict.fromkeys(taps, 0)

    @torch.no_grad()
    def add(self, tap: Tap, activation: Tensor) -> None:
        """Adds the rows of one input."""
        if tap not in self.wanted:
            return
        if self._first is not None:
            activation = activation[: self._first - self._taken[tap]]
            self._taken[tap] += len(activation)
        observe(self.moments[tap], tap, activation, self._rules.get(tap))


def solver_device(model: nn.Module) -> torch.device:
    """Where moments live and are solved: with the model, where its device has float64."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return device if device.type in {"cpu", "cuda", "xpu"} else torch.device("cpu")
