"""Where long passes report to: a bar with the time left on a terminal, lines in pipes and files, or nothing at all."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from onnx_optshift import journal

if TYPE_CHECKING:
    from rich import progress as rich_progress

Advance = Callable[[int], None]
# Seconds that a run may be silent for: less than the time after which people and build machines give it up.
EVERY = 30.0


class Progress:
    """Says nothing, but notes the stage for whoever has to tell where a run died. The base of those that speak.

    ```python
    with progress.stage("capture", total=len(samples)) as advance:
        ...
        advance(len(batch))
    ```
    """

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """One stage of the work; stages may lie in stages.

        Args:
            name: A word or two for the user.
            total: How many steps it has; None when that is not known.

        Yields:
            A function to call with the number of steps done since the last call.
        """
        with journal.stage(name):
            yield lambda _: None


@dataclass
class _Stage:
    name: str
    total: int | None
    done: int = 0
    start: float = field(default_factory=time.perf_counter)

    def advance(self, steps: int) -> None:
        self.done += steps


class Lines(Progress):
    """A line when an outermost stage ends, with its time; and while it runs one now and then, even if none advances.

    Args:
        file: Where the lines go; standard error by default.
        every: Seconds between the lines of a stage that runs.
    """

    def __init__(self, file: TextIO | None = None, every: float | None = None) -> None:
        self._file = file
        self._every = EVERY if every is None else every
        self._stages: list[_Stage] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """See `Progress.stage`. One that fails leaves no last line."""
        stage, outermost, ended = _Stage(name, total), not self._stages, threading.Event()
        self._stages.append(stage)
        if outermost:
            # A daemon: it must not keep a process alive that ends in another way.
            threading.Thread(target=self._repeat, args=(ended,), name="progress", daemon=True).start()
        try:
            with super().stage(name):
                yield stage.advance
        finally:
            ended.set()
            self._stages.remove(stage)
        if outermost:
            self._say([stage])

    def _repeat(self, ended: threading.Event) -> None:
        while not ended.wait(self._every):
            self._say(self._stages[:])

    def _say(self, stages: list[_Stage]) -> None:
        """How far the innermost stage is, and how long the outermost has been running."""
        if not stages:  # ended just now
            return
        outer, inner = stages[0], stages[-1]
        words = [] if inner.name == outer.name else [inner.name]
        words += [] if inner.total is None else [f"{inner.done} of {inner.total}"]
        seconds = time.perf_counter() - outer.start
        words.append(f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s")
        # Nobody may listen any more, which is no reason to end a run.
        with suppress(OSError, ValueError):
            print(f"{outer.name}: {', '.join(words)}", file=self._file or sys.stderr, flush=True)


class Bar(Progress):
    """A bar for each running stage, with the time left; gone when the stage ends.

    Args:
        file: A terminal; standard error by default.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._display: rich_progress.Progress | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """See `Progress.stage`. Stages inside stages share one display, as a terminal has only one last line."""
        display, outermost = self._display, self._display is None
        if display is None:
            display = self._display = self._open()
            display.start()
        task = display.add_task(name, total=total)
        try:
            with super().stage(name):
                yield lambda steps: display.update(task, advance=steps)
        finally:
            display.remove_task(task)
            if outermost:
                display.stop()
                self._display = None

    def _open(self) -> rich_progress.Progress:
        from rich import progress  # slow to load, and most runs never show a bar
        from rich.console import Console

        return progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=Console(file=self._file or sys.stderr),
            transient=True,
        )


SILENT = Progress()


def progress_for(*, quiet: bool = False, file: TextIO | None = None) -> Progress:
    """What suits the place, standard error by default: a bar on a terminal, lines elsewhere, nothing if quiet."""
    file = file or sys.stderr
    if quiet:
        return SILENT
    return Bar(file) if file.isatty() else Lines(file)
