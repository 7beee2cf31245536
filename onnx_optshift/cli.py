"""The command line: runs a command, report to terminal and files, errors to one message and an exit status."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from io import TextIOWrapper
from itertools import chain
from typing import TYPE_CHECKING, Never

from onnx_optshift import journal
from onnx_optshift.arguments import parse
from onnx_optshift.commands.places import check_places
from onnx_optshift.errors import InputError, OptShiftError
from onnx_optshift.isolation import INTERRUPTED, drain, run_isolated, say
from onnx_optshift.launcher import Place
from onnx_optshift.options import DIAGNOSE, INSPECT, PROBES, SHIFT, VERIFY
from onnx_optshift.report.progress import progress_for

if TYPE_CHECKING:
    from pathlib import Path

    from onnx_optshift.report.model import Report


# Seconds that processes with nothing to say leave the one that tells of an error.
_LINGER = 10.0


def run() -> Never:
    """Entry point of the installed script and of `python -m onnx_optshift`: `main` in a process of its own."""
    _open_streams()
    sys.exit(run_isolated(_traced if "--verbose" in sys.argv else main))


def _open_streams() -> None:
    """A daemon's standard streams may be closed: no file of ours must get their numbers, and what is meant for them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


def _traced() -> int:
    """Native crashes show where they were, as Python errors do with --verbose."""
    faulthandler.enable()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command: with these arguments, without the program's name, or with those of the process.

    Returns:
        The exit status: 0 done, 2 bad usage or bad input, 3 outputs left the tolerance, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # Names in a model may hold what the terminal's encoding has no character for: shown as escapes, no crash.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _first_speaks():
            args = _parsed(words)
            args.command_line = shlex.join([*_started(), "-m", "onnx_optshift", *words])
            check_places(None, args.report, _reads(args), force=False, checkpoint=args.settings.checkpoint)
            _check_started(args.command)
        level = args.log_level if Place.found().rank == 0 else "critical"
        with _quiet_libraries(level, verbose=args.verbose):
            _COMMANDS[args.command](args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        if Place.found().rank == 0:
            say(f"interrupted: {journal.read().written}")
        return INTERRUPTED
    except Exception as error:
        verbose = "--verbose" in words
        if verbose:
            say(traceback.format_exc().rstrip())
        say(f"error: {_explained(error, verbose=verbose)}")
        return error.exit_code if isinstance(error, OptShiftError) else InputError.exit_code
    return 0


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Before several processes have joined, all of them meet the same errors: the first one tells.

    Raises:
        SystemExit: This is another one.
    """
    if Place.found().rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except (Exception, SystemExit) as error:
            status = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", InputError.exit_code)
            time.sleep(_LINGER if status else 0)  # who ends first has the others ended
            raise SystemExit(status) from error


def _check_started(command: str) -> None:
    """Insists on one process for what only runs in one.

    Raises:
        InputError: There are several.
    """
    if command != SHIFT and not Place.found().alone:
        raise InputError(f"{command} runs in one process. Start it without torchrun.")


def _started() -> list[str]:
    """What runs Python, as a user types it."""
    place = Place.found()
    nodes = place.size // max(1, place.local_size)
    several = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", str(place.local_size)]
    return ["python"] if place.alone else several


def _parsed(words: list[str]) -> argparse.Namespace:
    try:
        return parse(words)
    except SystemExit:  # -h and the like, whose text is still in the buffer
        with _printing():
            sys.stdout.flush()
        raise


def _reads(args: argparse.Namespace) -> list[object]:
    """What the command line names to be read."""
    models = args.files[:1] if args.command == SHIFT else args.files
    sources = (getattr(args, name, None) or () for name in ("calibration", "heldout", "baseline"))
    return [*models, *chain.from_iterable(sources)]


def _explained(error: Exception, *, verbose: bool) -> str:
    """One message for any error."""
    text = " ".join(str(error).split())
    if isinstance(error, OptShiftError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}. Choose files and folders that you may use."
    # Torch's own ways to say it are plain RuntimeErrors on the host.
    torch_says = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "CUDA out of memory" in text)
    if isinstance(error, MemoryError) or torch_says:
        hint = "Lower --batch-size or --max-memory, or take fewer layers at a time with --nodes-to-include."
        return f"out of memory; {journal.read().written}. {hint}"
    return (
        f"internal error: {type(error).__name__}: {text}{'' if verbose else '; run with --verbose for the traceback'}"
    )


def _shift(args: argparse.Namespace) -> None:
    from onnx_optshift.commands import shift
    from onnx_optshift.run.world import joined

    model, out = args.files
    data = (args.calibration, args.heldout)
    with joined() as world:
        progress = progress_for(quiet=args.quiet or not world.first)
        result = shift.run(model, out, *data, args.settings, progress, reports=args.report, world=world)
        if world.first:
            _publish_after(out, result.report, args)


def _publish_after(out: Path | None, report: Report, args: argparse.Namespace) -> None:
    """Writes and prints the report of a model that has its place already.

    Raises:
        InputError: It cannot be written.
    """
    try:
        _publish(report, args)
    except InputError as error:
        if args.settings.dry_run:
            raise
        raise InputError(f"{out} was written and verified, its report was not: {error}") from error


def _inspect(args: argparse.Namespace) -> None:
    from onnx_optshift.commands.inspect import inspect

    _publish(inspect(args.files[0], args.calibration, args.settings, progress_for(quiet=args.quiet)), args)


def _verify(args: argparse.Namespace) -> None:
    from onnx_optshift.commands.outcome import judge
    from onnx_optshift.commands.verify import verify

    a, b = args.files
    progress = progress_for(quiet=args.quiet)
    report = verify(a, b, args.calibration, args.settings, progress, baseline=args.baseline)
    _publish(report, args)
    judge(report)


def _diagnose(args: argparse.Namespace) -> None:
    from onnx_optshift.commands.diagnose import diagnose

    data, probes = (args.calibration, args.heldout), args.settings.flatness or PROBES
    _publish(diagnose(args.files[0], *data, args.settings, probes, progress_for(quiet=args.quiet)), args)


_COMMANDS = {SHIFT: _shift, INSPECT: _inspect, VERIFY: _verify, DIAGNOSE: _diagnose}


def _publish(report: Report, args: argparse.Namespace) -> None:
    """Writes the report's files, then prints it: a reader that closes the pipe must not cost the files."""
    from onnx_optshift.report import files

    finished = datetime.now(UTC).isoformat(timespec="seconds")
    report = replace(report, tool=replace(report.tool, command=args.command_line, finished=finished))
    for path in sorted(args.report, key=lambda path: path == files.STDOUT):
        with _printing() if path == files.STDOUT else nullcontext():
            files.write(report, path)
    if args.quiet or files.STDOUT in args.report:
        return
    from onnx_optshift.report import terminal

    console = terminal.console()
    with _printing():
        with console.capture() as text:
            terminal.render(report, console, verbose=args.verbose)
        print(text.get(), end="", flush=True)


@contextmanager
def _printing() -> Iterator[None]:
    """For standard output; a reader that has gone is no error, and the interpreter's own flush must not make it one.

    Raises:
        InputError: It is a file on a disk that is full.
    """
    try:
        yield
    except OSError as error:
        drain(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or str(error)
            raise InputError(f"standard output cannot be written: {reason}. Give --report FILE and --quiet.") from error


@contextmanager
def _quiet_libraries(level: str, *, verbose: bool) -> Iterator[None]:
    """Our log lines on standard error from `level` up; Python warnings of libraries only if verbose."""
    logger = logging.getLogger("onnx_optshift")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
