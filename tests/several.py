"""Runs of several processes, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MODULE = ("-m", "onnx_optshift")
FAULTY = (str(Path(__file__).with_name("faulty_run.py")),)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SECONDS = 240  # a run that hangs is an error


def torchrun(count: int, *words: object, program: Sequence[str] = MODULE, fault: str = "waves"):
    """A finished run of so many processes, with torchrun's own words among those of the processes."""
    environment = {**os.environ, "FAULT": fault}
    return subprocess.run(
        [*TORCHRUN, str(count), *program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=environment,
    )


@contextmanager
def started(count: int, *words: object, program: Sequence[str] = MODULE, **environment: str) -> Iterator[list]:
    """Processes that share a run, without torchrun's watch over them; ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), **environment}
    found = [
        subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def finished(count: int, *words: object, **options) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of every process of a run that comes to its end."""
    with started(count, *words, **options) as processes:
        texts = [process.communicate(timeout=SECONDS) for process in processes]
        return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def ours(text: str) -> list[str]:
    """Of what torchrun and its processes have said, our messages."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "terminated", "interrupted"))]
