"""The processes that share a run: alone by default, or those that torchrun has started.

All of them do the same, step by step, each on its share of the samples and of the layers. Whatever a step is decided on
is known to all of them, from one: so all take the same way, and meet at the same exchanges.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from onnx_optshift import journal
from onnx_optshift.errors import InputError, OptShiftError
from onnx_optshift.isolation import say
from onnx_optshift.launcher import Place

T = TypeVar("T")

# How long processes wait for one another at the start, and for one that computes: that may take hours.
MEETING, COMPUTING = timedelta(minutes=5), timedelta(days=30)
# Seconds between signs of life, and without one after which a process counts as lost.
BEAT, SILENCE = 5.0, 300.0
# Seconds in which whoever started the processes ends them all once one is gone, and in which one can say a sentence.
PATIENCE = 10.0


class World:
    """One process alone: all is its own, and known."""

    def __init__(self, place: Place | None = None) -> None:
        self.rank = place.rank if place else 0
        self.size = place.size if place else 1
        self.local_rank = place.local_rank if place else 0
        self.local_size = place.local_size if place else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def threads(self) -> int | None:
        """Threads of this process where several share the processors of a host; None for as many as it likes."""
        if self.local_size == 1:
            return None
        return max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // self.local_size)

    def broadcast(self, value: T, source: int = 0) -> T:
        """What one process has, known to all; that one gets the very object back."""
        return value

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank, known to all."""
        return [value]

    def once(self, make: Callable[[], T], rank: int = 0) -> T:
        """What one process makes, known to all."""
        return self.broadcast(make() if self.rank == rank else None, rank)  # type: ignore[return-value]

    def meet(self) -> None:
        """Waits until all processes have come as far."""
        self.gather(None)

    def agree(self, known: bool) -> bool:
        """Whether something holds in every process."""
        return all(self.gather(known))

    def settle(self, device: str) -> None:
        """Tells where this process computes; GPUs of their own exchange without the hosts."""

    def total(self, tensor: Tensor, to: int) -> None:
        """Sums a tensor over all processes, in place, in one of them; in the others nothing of it is left."""


ALONE = World()


def check_same(world: World, found: Mapping[str, object]) -> None:
    """Insists that all processes have found the same, by what it is called.

    Raises:
        InputError: One has found something else.
    """
    for rank, theirs in enumerate(world.gather(found)):
        if other := [what for what in found if found[what] != theirs[what]]:
            raise InputError(
                f"torchrun: process {rank} finds another {other[0]} than process {world.rank} at the same path. All "
                "must read the same files, and a script must give the same samples each time."
            )


class LostError(OptShiftError):
    """Another process of the run is gone."""


class Job(World):
    """Several processes, one of which is this one.

    Raises:
        InputError: Not all of them came.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        try:
            store, _, _ = next(rendezvous("env://", timeout=MEETING))
            self._store = PrefixStore("onnx_optshift", store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=COMPUTING)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"torchrun: process {self.rank} of {self.size} has waited for the others in vain "
                f"({' '.join(str(error).split())[:200]}). See that all of them were started, and reach one another."
            ) from error
        self._direct: dist.ProcessGroup | None = None  # between GPUs
        self._ended = threading.Event()
        threading.Thread(target=self._listen, name="signs of life", daemon=True).start()

    def settle(self, device: str) -> None:
        """Tells where this process computes; GPUs of their own exchange without the hosts."""
        places = self.gather((socket.gethostname(), device))
        if all(name.startswith("cuda") for _, name in places) and len(set(places)) == self.size:
            torch.cuda.set_device(device)
            self._direct = dist.new_group(backend="nccl", timeout=COMPUTING)

    def broadcast(self, value: T, source: int = 0) -> T:
        """What one process has, known to all; that one gets the very object back."""
        box: list[Any] = [value]
        with _together():
            dist.broadcast_object_list(box, source)
        found: T = value if self.rank == source else box[0]
        return found

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank, known to all."""
        found: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(found, value)
        return found

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends a tensor to a process that receives it."""
        with _together():
            dist.send(self._portable(tensor), to, group=self._group(tensor))

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fills a tensor with what a process sends."""
        buffer = self._portable(tensor)
        with _together():
            dist.recv(buffer, source, group=self._group(tensor))
        return tensor if buffer is tensor else tensor.copy_(buffer)

    def total(self, tensor: Tensor, to: int) -> None:
        """Sums a tensor over all processes, in place, in one of them; in the others nothing of it is left."""
        buffer = self._portable(tensor)
        with _together():
            dist.reduce(buffer, to, group=self._group(tensor))
        if self.rank == to and buffer is not tensor:
            tensor.copy_(buffer)

    def end(self) -> None:
        """All have done what they had to do."""
        self.meet()
        self._ended.set()
        dist.destroy_process_group()

    def speaks(self, error: Exception) -> bool:
        """Whether this process, which has met an error, is the one that tells: the first that did."""
        self._ended.set()
        status = error.exit_code if isinstance(error, OptShiftError) else InputError.exit_code
        try:
            if isinstance(error, LostError) and self._hears("status", PATIENCE):
                return False
            if self._store.add("failed", 1) == 1:
                self._store.set("status", str(status))
                atexit.register(lambda: self._store.set("said", ""))
                return True
            self._hears("said", PATIENCE)
        except (RuntimeError, OSError):  # whoever kept the store is gone
            return self.first
        return False

    @property
    def status(self) -> int:
        """The exit status of whoever tells of an error."""
        with suppress(RuntimeError, OSError):
            if self._store.check(["status"]):
                return int(self._store.get("status"))
        return InputError.exit_code

    def _hears(self, key: str, seconds: float) -> bool:
        """Whether somebody writes this, soon."""
        end = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _listen(self) -> None:
        """Gives a sign of life now and then, and ends this process where another one gives none.

        One that dies breaks its connections, which all others see. One that hangs, or whose host is gone, does not.
        """
        heard: dict[int, tuple[bytes, float]] = {}
        others = range(1, self.size) if self.first else range(1)
        beats = 0
        while not self._ended.wait(BEAT):
            try:
                self._store.set(f"alive {self.rank}", str(beats := beats + 1))
                for other in others:
                    key = f"alive {other}"
                    sign = self._store.get(key) if self._store.check([key]) else b""
                    now = time.monotonic()
                    if heard.get(other, (None, now))[0] != sign:
                        heard[other] = sign, now
                    elif now - heard[other][1] > SILENCE:
                        self._give_up(other)
            except (RuntimeError, OSError):
                return  # the store is gone, and so are connections

    def _give_up(self, other: int) -> None:
        error = LostError(f"process {other} of {self.size} has shown no sign of life for {SILENCE:.0f} s")
        if self.speaks(error):
            record = journal.read()
            say(f"error: {error}, {record.stage}; {record.written}. See whether it hangs, or its host is gone.")
            self._store.set("said", "")
        os._exit(self.status)

    def _portable(self, tensor: Tensor) -> Tensor:
        """A tensor where the processes can exchange it."""
        return tensor.contiguous() if self._direct and tensor.is_cuda else tensor.cpu().contiguous()

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._direct if tensor.is_cuda else None


@contextmanager
def _together() -> Iterator[None]:
    """An exchange, which fails where another process is gone.

    Raises:
        LostError: One is.
    """
    try:
        yield
    except RuntimeError as error:
        stage = journal.read().stage
        raise LostError(
            f"the connection to another process was lost {stage}; nothing was written. See what that one has said. "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


@contextmanager
def joined() -> Iterator[World]:
    """The processes of this run; of an error in any of them one tells, and the others end with its status, silently.

    Raises:
        InputError: Not all of them came.
        SystemExit: Another process tells.
    """
    place = Place.found()
    if place.alone:
        yield ALONE
        return
    try:
        job = Job(place)
    except InputError:
        if place.local_rank:
            time.sleep(PATIENCE)
            raise SystemExit(InputError.exit_code) from None
        raise
    try:
        yield job
        job.end()
    except Exception as error:
        if job.speaks(error):
            raise
        raise SystemExit(job.status) from error
