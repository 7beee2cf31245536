"""A model run for what flows through it, and left as it was: in eval mode, without gradients, without compilation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from onnx_optshift.errors import InputError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile and the data-parallel wrappers make of it."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def eagerly() -> AbstractContextManager[object]:
    """Compiled functions run as they were written meanwhile, so that hooks see their layers' inputs."""
    stance = getattr(torch.compiler, "set_stance", None)
    # Where nothing was compiled, that would load the whole compiler.
    return nullcontext() if stance is None or "torch._dynamo" not in sys.modules else stance("force_eager")


def check_hooks_are_seen(model: nn.Module) -> None:
    """Refuses a compiled model where torch cannot run it uncompiled for a while.

    Raises:
        InputError: It is one, and torch is too old.
    """
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    if compiled and not hasattr(torch.compiler, "set_stance"):
        raise InputError(
            f"the model is compiled, and torch {torch.__version__} cannot run it uncompiled for a while, so that its "
            "layers' inputs are not seen. Update torch to 2.6 or newer, or compile the model after the shift."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no compiled graphs; each module's own mode is back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad(), eagerly():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def holding(parameters: Mapping[str, Tensor], contents: Mapping[str, Tensor]) -> Iterator[None]:
    """Other contents of parameters for a while."""
    before = {name: parameters[name].detach().clone() for name in contents}
    try:
        put(parameters, contents)
        yield
    finally:
        put(parameters, before)


@torch.no_grad()
def put(parameters: Mapping[str, Tensor], contents: Mapping[str, Tensor]) -> None:
    """Writes contents into parameters, in place."""
    for name, content in contents.items():
        parameters[name].copy_(content)
