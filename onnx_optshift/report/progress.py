"""Where long passes report to: a bar with the time left on a terminal, lines in pipes and files, or nothing at all."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from onnx_optshift import journal

if TYPE_CHECKING:
    from rich import progress as rich_progress

Advance = Callable[[int], None]
# Seconds that a run may be silent for: less than the time after which people and build machines give it up.
EVERY = 30.0


class Progress:
    """Says nothing. The base of those that do.

    ```python
    with progress.stage("capture", total=len(samples)) as advance:
        ...
        advance(len(batch))
    ```
    """

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """One stage of the work.

        Args:
            name: A word or two for the user.
            total: How many steps it has; None when that is not known.

        Yields:
            A function to call with the number of steps done since the last call.
        """
        yield lambda _: None


class Lines(Progress):
    """A line when a stage ends, with its time; and while it runs one now and then, even if it never advances.

    Args:
        file: Where the lines go; standard error by default.
        every: Seconds between the lines of a stage that runs.
    """

    def __init__(self, file: TextIO | None = None, every: float = EVERY) -> None:
        self._file = file
        self._every = every
        self._running: list[object] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """See `Progress.stage`; of stages inside stages the innermost speaks. One that fails leaves no last line."""
        done = 0
        start = time.perf_counter()
        ended = threading.Event()

        def advance(steps: int) -> None:
            nonlocal done
            done += steps

        def say() -> None:
            of = "" if total is None else f"{done} of {total}, "
            # Nobody may listen any more, which is no reason to end a run.
            with suppress(OSError, ValueError):
                print(f"{name}: {of}{_seconds(start)}", file=self._file or sys.stderr, flush=True)

        def repeat() -> None:
            while not ended.wait(self._every):
                if self._running[-1:] == [ended]:
                    say()

        self._running.append(ended)
        # A daemon: it must not keep a process alive that ends in another way.
        threading.Thread(target=repeat, name=f"progress of {name}", daemon=True).start()
        try:
            yield advance
        finally:
            ended.set()
            self._running.remove(ended)
        say()


def _seconds(start: float) -> str:
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


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


class Noted(Progress):
    """Another progress, whose stages are recorded too: what a crash interrupts can be told.

    Args:
        shown: What the user sees.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """See `Progress.stage`."""
        with journal.stage(name), self._shown.stage(name, total) as advance:
            yield advance


SILENT = Progress()


def progress_for(*, quiet: bool = False, file: TextIO | None = None) -> Progress:
    """The progress that suits the place: a bar on a terminal, lines elsewhere, nothing if quiet.

    Args:
        quiet: Nothing in any case.
        file: Where it goes; standard error by default.
    """
    file = file or sys.stderr
    if quiet:
        return SILENT
    return Bar(file) if file.isatty() else Lines(file)
