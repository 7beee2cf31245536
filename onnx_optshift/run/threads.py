"""How many threads a step of a solver takes: by its size alone, as sums over threads end in other bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Entries of a matrix from which on its solver takes several threads.
THREADED = 2**19


@contextmanager
def threads_for(entries: int, most: int) -> Iterator[None]:
    """So many threads at most for a matrix of many entries, one for others.

    Solvers of small layers take many short steps, at each of which threads wait for one another: 6 times the processor
    time and 8 times the wall clock were measured on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(most if entries >= THREADED else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
