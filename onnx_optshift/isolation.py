"""Work in a process of its own: a crash in native code costs neither the message nor the tidiness.

The process forks before anything heavy is loaded, so this costs milliseconds and next to no memory. The child does
everything; the parent only waits, and speaks where the child no longer can.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Never, TextIO

from onnx_optshift import journal
from onnx_optshift.errors import InputError
from onnx_optshift.launcher import Place
from onnx_optshift.write.atomic import remove

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# A terminal's Ctrl-C reaches both processes, and the parent passes its own on: two this close [s] are one.
_ECHO = 0.5
# A bar hides the cursor; erases the rest of its line too.
_SHOW_CURSOR = "\r\x1b[K\x1b[?25h"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CRASHES = {"SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"}


def run_isolated(work: Callable[[], int]) -> int:
    """Does some work in a child process that does not outlive this one, and removes what it leaves unfinished.

    Args:
        work: Returns an exit status. It runs right here on systems other than Linux, which cannot fork (Windows) or not
            safely (macOS, whose frameworks must not be used on both sides of a fork).

    Returns:
        The work's status. If a signal killed it, with one message on standard error: 128 + the signal's number for
        those that ask to end, which are passed on (130 for SIGINT, 143 for SIGTERM); 2 for a crash or SIGKILL.
    """
    with suppress(OSError):  # no memory: then nothing is recorded
        journal.share()
    if sys.platform != "linux":
        return work()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the child would write it again
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller that ignores it would cost us the child's status
    requests = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    # Those that are ignored (nohup) stay so. None may come before both sides have their handlers.
    ends = [end for end in requests if signal.getsignal(end) is not signal.SIG_IGN]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError:  # no more processes to be had: then without the safety
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()
    if not child:
        _end_with(parent)
        if signal.SIGINT in ends and Place.found().alone:
            _interrupt_once()
        elif signal.SIGINT in ends:
            # One that waits for another process would never come to it; there is this one's parent to clear up.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _work_and_exit(work)

    def pass_on(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for end in ends:
        signal.signal(end, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for end in ends:
        signal.signal(end, signal.SIG_IGN)  # the last words take no time
    record = journal.read()
    for name in record.hidden:
        remove(Path(name))
    if code >= 0:
        return code
    place, asked = Place.found(), -code in requests
    # Of several processes all are asked to end, by who started them, once one has met an error and told it.
    if place.alone or not asked or (code == -signal.SIGINT and place.rank == 0):
        say(_SHOW_CURSOR * sys.stderr.isatty() + _words(-code, record, asked=asked))
    return 128 - code if -code in requests else InputError.exit_code


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was quicker
        os._exit(INTERRUPTED)


def _interrupt_once() -> None:
    """A second SIGINT that is the first one's echo must not interrupt the clearing up."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last = -_ECHO

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _ECHO:
            last = now
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)


def _work_and_exit(work: Callable[[], int]) -> Never:
    """The child's whole life. No destructors of native libraries: one that crashes would spoil a finished run."""
    status = 1
    atexit._clear()  # what was registered before is the parent's
    try:
        status = work()
    except KeyboardInterrupt:
        status = INTERRUPTED
        say("interrupted")
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()  # as multiprocessing does in its children
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
        finally:
            os._exit(status)


def _words(number: int, record: journal.Record, *, asked: bool) -> str:
    """What a signal did to the child, and what to do next."""
    if asked:
        return f"{'interrupted' if number == signal.SIGINT else 'terminated'}: {record.written}"
    # Real-time signals have no names.
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    what, hint = "ended by a signal", "Look for a limit of the system, or for who sent it."
    if number == signal.SIGKILL:
        what, hint = "killed", "Memory most likely ran out: give --max-memory, or a smaller --batch-size."
    elif name in _CRASHES:
        what = "a native library crashed"
        hint = "Check that the model runs in ONNX Runtime alone; --verbose shows the place."
    return f"error: {what} ({name}) {record.stage}; {record.written}. {hint}"


def say(message: str) -> None:
    """One message on standard error, which nobody may listen to any more."""
    try:
        print(message, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drain(sys.stderr)


def drain(stream: TextIO) -> None:
    """Has a stream that failed lead nowhere, or the interpreter's own flush at the end would change the exit status.

    As the Python documentation has it (signal module, "Note on SIGPIPE").
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
