"""What torchrun tells each process that it starts: its number, and among how many. Loads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One process among those that share a run; alone unless stated."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its host
    local_size: int = 1

    @classmethod
    def found(cls) -> Place:
        """That of this process, from the environment, as torch.distributed names it."""
        size = os.environ.get("WORLD_SIZE", "")
        if not all(os.environ.get(name) for name in _NAMES) or not size.isdigit() or int(size) < 2:
            return cls()
        rank = os.environ["RANK"]
        local = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        return cls(int(rank), int(size), *map(int, local))

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1
