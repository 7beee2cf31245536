"""One model trained by several processes: the rows of all ranks count, and all end up with the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from onnx_optshift.errors import InputError
from onnx_optshift.geometry import Tap
from onnx_optshift.stats.moments import InputMoments

Group = distributed.ProcessGroup
_Value = TypeVar("_Value")


def group_of(model: nn.Module) -> Group | None:
    """The processes that train a model together, as its DistributedDataParallel knows them; None where it is one."""
    wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return wrapped[0].process_group if wrapped else None


def everyone() -> Group | None:
    """All processes of a launcher such as torchrun; None where there is one."""
    alone = not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1
    return None if alone else distributed.group.WORLD


def gathered(value: _Value, group: Group | None) -> list[_Value]:
    """The values of all ranks, in their order."""
    if group is None:
        return [value]
    values = [value] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group)
    return values


@contextmanager
def together(group: Group | None) -> Iterator[None]:
    """Work of each rank by itself, after which all raise where any has failed: none waits for one that is gone.

    Raises:
        InputError: Another rank has failed.
    """
    try:
        yield
    except Exception as error:
        gathered(f"{type(error).__name__}: {error}", group)
        raise
    for rank, message in enumerate(gathered("", group)):
        if message:
            raise InputError(f"rank {rank} failed: {message}")


def merged(moments: Mapping[Tap, InputMoments], group: Group | None) -> Mapping[Tap, InputMoments]:
    """The moments of the rows of all ranks, the same on each.

    Rows themselves are exchanged where all of them together are no more than directions, sums of products otherwise.
    """
    if group is None:
        return moments
    counts = gathered([(some.rows, some.nonfinite) for some in moments.values()], group)
    rows = [sum(rank[k][0] for rank in counts) for k in range(len(moments))]
    few = {tap: rows[k] <= tap.width for k, tap in enumerate(moments)}
    parts = gathered({tap: some.stored_rows for tap, some in moments.items() if few[tap]}, group)
    found = {}
    for k, (tap, some) in enumerate(moments.items()):
        found[tap] = total = InputMoments(some.groups, some.width, some.device, some.products)
        if few[tap]:
            for part in parts:
                stored = part[tap]
                assert stored is not None
                total.update(stored)
        else:
            gram, sums = some.gram(), some.total.clone()
            distributed.all_reduce(gram, group=group)
            distributed.all_reduce(sums, group=group)
            total.update_gram(gram, sums, rows[k])
        total.nonfinite = sum(rank[k][1] for rank in counts)
    return found


@torch.no_grad()
def agree(tensors: Sequence[Tensor], group: Group | None) -> None:
    """Gives all ranks the first one's tensors."""
    if group is not None:
        for tensor in tensors:
            distributed.broadcast(tensor.data, distributed.get_global_rank(group, 0), group=group)
