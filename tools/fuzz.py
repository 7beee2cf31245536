"""Feeds mutated models and mutated data to the command line, and counts what must not happen.

    python tools/fuzz.py MODEL CALIB --models 100 --data 100 --seconds 300 --seed 0 --workers 2 [-- OPTION ...]

Every mutated input must end in a documented exit status with a message, without a traceback, a crash, a hang or
files left behind; where it is still a valid input, OUT must load. Workers import the package once and call its
`cli.main` for each case; one that dies or hangs is replaced and its case counted. Findings are saved with the
command line that repeats them. When the budget of seconds has run out, or on SIGINT or SIGTERM, the cases under way are
dropped and what was found until then is printed. Exit status 1 if anything was found, 128 + the signal's number if
nothing was found before one came.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mutations import Case, cases

DOCUMENTED = {0, 2, 3}
RUNTIME_FILES = {".ses"}  # ONNX Runtime's own, written to TMPDIR by its mere import


def loads(out: Path) -> str:
    """An empty string if the written model is valid and ONNX Runtime opens it, else why not."""
    import onnx
    import onnxruntime as ort

    try:
        onnx.checker.check_model(str(out))
        ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def call(main: Callable[[list[str]], int | None], argv: list[str]) -> tuple[int, str]:
    """The exit status, as Python would give it, and the traceback if an exception came out of `main`."""
    try:
        return main(argv) or 0, ""
    except SystemExit as stop:
        return (stop.code if isinstance(stop.code, int) else int(stop.code is not None)), ""
    except BaseException:
        return 1, traceback.format_exc()


def work(entry: str, limit_gb: float) -> None:
    """Answers each line of standard input, a JSON list of arguments, by one JSON line on standard output."""
    limit = int(limit_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    with os.fdopen(os.dup(1), "w") as answers, tempfile.TemporaryFile("w+b") as capture:
        # Native code writes to the descriptors themselves, so those are what is captured.
        os.dup2(capture.fileno(), 1)
        os.dup2(capture.fileno(), 2)
        module, function = entry.split(":")
        main = getattr(importlib.import_module(module), function)
        for line in sys.stdin:
            argv = json.loads(line)
            os.ftruncate(capture.fileno(), 0)
            os.lseek(capture.fileno(), 0, os.SEEK_SET)
            code, uncaught = call(main, argv)
            sys.stdout.flush()
            sys.stderr.flush()
            capture.seek(0)
            output = capture.read().decode(errors="replace")
            unloadable = loads(Path(argv[1])) if code == 0 else ""
            print(json.dumps([code, output[-20_000:], uncaught, unloadable]), file=answers, flush=True)


class Stopped(Exception):
    """The budget ran out, or a signal came, before a case had ended."""


class Stop:
    """Tells all threads to stop: when so many seconds have passed, or on SIGINT or SIGTERM.

    Attributes:
        reason: Why it is over; empty while it is not.
        signal: The number of the signal; 0 without one.
        bell: A descriptor that becomes readable when a signal comes.
    """

    def __init__(self, seconds: float) -> None:
        self.signal = 0
        self.bell, self._ring = os.pipe()
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._caught)

    def _caught(self, number: int, _: object) -> None:
        self.signal = number
        os.write(self._ring, b"!")

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return max(0.0, self._end - time.monotonic())

    @property
    def reason(self) -> str:
        """Why it is over; empty while it is not."""
        if self.signal:
            return signal.Signals(self.signal).name
        return "" if self.left else f"the budget of {self._seconds:g} s ran out"


class Worker:
    """A worker process, started when first needed and again after it died."""

    def __init__(self, entry: str, limit_gb: float, timeout: float, scratch: Path, stop: Stop) -> None:
        self.command = [sys.executable, __file__, "--work", entry, "--limit-gb", str(limit_gb)]
        self.timeout, self.scratch, self.over = timeout, scratch, stop
        self.process: subprocess.Popen[str] | None = None
        scratch.mkdir()

    def ask(self, argv: list[str]) -> list[object] | str:
        """The worker's answer; or, as text, how it ended without one.

        Raises:
            Stopped: There is no time left for an answer.
        """
        if self.process is None:
            environment = os.environ | {"TMPDIR": str(self.scratch)}
            self.process = subprocess.Popen(
                self.command,
                text=True,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # an interrupt of the terminal is for us, and no finding
            )
        stdin, stdout = self.process.stdin, self.process.stdout
        try:
            print(json.dumps(argv), file=stdin, flush=True)
            left = self.over.left
            ready, _, _ = select.select([stdout, self.over.bell], [], [], min(self.timeout, left))
            if stdout not in ready:
                self.stop()
                if ready or left < self.timeout:
                    raise Stopped
                return "timeout"
            if line := stdout.readline():
                return json.loads(line)
        except BrokenPipeError:
            pass
        code = self.process.wait()
        self.stop()
        return f"crash, status {code}"

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and whatever it has started
            self.process.communicate()
            self.process = None


@dataclass
class Tally:
    """What happened so far; shared by the threads.

    Attributes:
        runs: Cases that ran.
        codes: How often each exit status came, crashes and timeouts not among them.
        findings: {kind: {signature: labels of the cases}}.
    """

    runs: int = 0
    codes: collections.Counter[int] = field(default_factory=collections.Counter)
    findings: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def judge(answer: list[object] | str, folder: Path, scratch: Path, before: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The findings (kind, signature) of one finished run.

    Args:
        answer: What the worker said.
        folder: The run's folder; `before` holds the digests of its files at the start.
        scratch: The worker's TMPDIR, empty at the start.
        before: {file name: sha256}.
    """
    after = digests(folder)
    if isinstance(answer, str):
        yield answer.split(",", maxsplit=1)[0], answer
    else:
        code, output, uncaught, unloadable = answer
        if uncaught or "Traceback (most recent call last)" in output:
            lines = (uncaught or output[output.index("Traceback (most recent call last)") :]).strip().splitlines()
            frames = [text.strip() for text in lines if text.lstrip().startswith("File ")]
            yield "traceback", f"{lines[-1][:200]}  at {frames[-1] if frames else '?'}"
        elif code not in DOCUMENTED:
            yield "undocumented status", f"exit {code}"
        elif code and not output.strip():
            yield "no message", f"exit {code}"
        if unloadable:
            yield "output does not load", " ".join(unloadable.split())[:200]
        if code == 0:
            after.pop("out.onnx", None)
    temporary = {p.name for p in scratch.iterdir()} - RUNTIME_FILES
    if left := sorted(after.keys() - before.keys()) + sorted(temporary):
        yield "debris", ", ".join(left)
    if changed := sorted(name for name in before if after.get(name) != before[name]):
        yield "input changed", ", ".join(changed)


def digests(folder: Path) -> dict[str, str]:
    """{file name: sha256} of everything under a folder."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_case(case: Case, worker: Worker, options: list[str], tally: Tally, save: Path) -> None:
    """Runs one case, adds it to the tally, and saves its inputs if something was found."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(case.model)
        (folder / "data.npz").write_bytes(case.data)
        before = digests(folder)
        files = [str(folder / file) for file in ("model.onnx", "out.onnx", "data.npz")]
        try:
            answer = worker.ask([*files[:2], "--calib", files[2], *options])
            found = list(judge(answer, folder, worker.scratch, before))
        finally:
            for left in worker.scratch.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if found:
            kept = save / case.label.replace("/", "_")
            kept.mkdir(parents=True, exist_ok=True)
            for file in ("model.onnx", "data.npz"):
                shutil.copy(folder / file, kept / file)
            files = [str(kept / file) for file in ("model.onnx", "out.onnx", "data.npz")]
            command = shlex.join(["python", "-m", "onnx_optshift", *files[:2], "--calib", files[2], *options])
            (kept / "finding.txt").write_text(f"{command}\n\n{found}\n\n{answer}\n")
    with tally.lock:
        tally.runs += 1
        if not isinstance(answer, str):
            tally.codes[answer[0]] += 1
        for kind, signature in found:
            tally.findings.setdefault(kind, {}).setdefault(signature, []).append(case.label)


def report(tally: Tally, save: Path, out: IO[str]) -> None:
    """Prints the tally, each finding once with the number of its cases and the first of them."""
    statuses = ", ".join(f"exit {code}: {count}" for code, count in sorted(tally.codes.items()))
    print(f"{tally.runs} runs; {statuses}", file=out)
    for kind in ("traceback", "crash", "timeout", "debris"):
        print(f"{kind}: {sum(map(len, tally.findings.get(kind, {}).values()))}", file=out)
    for kind, signatures in sorted(tally.findings.items()):
        for signature, labels in sorted(signatures.items(), key=lambda item: -len(item[1])):
            print(f"  {kind} x{len(labels)}: {signature}\n    {save / labels[0].replace('/', '_')}", file=out)


def fuzz(args: argparse.Namespace) -> int:
    """Runs the control and all cases that there is time for; the exit status."""
    model, data = args.model.read_bytes(), args.calibration.read_bytes()
    save = args.save or Path(tempfile.mkdtemp(prefix="fuzz-findings-"))
    tally, stop, broken = Tally(), Stop(args.seconds), []
    waiting = cases(model, data, {"model": args.models, "data": args.data}, args.seed)

    def drain(worker: Worker) -> None:
        try:
            while not stop.reason:
                with tally.lock:
                    case = next(waiting, None)
                if case is None:
                    return
                run_case(case, worker, args.options, tally, save)
        except Stopped:
            pass
        except BaseException:  # its case went with it
            broken.append(traceback.format_exc())

    with tempfile.TemporaryDirectory(prefix="fuzz-workers-") as name:
        settings = (args.entry, args.limit_gb, args.timeout)
        workers = [Worker(*settings, Path(name) / str(k), stop) for k in range(args.workers)]
        try:
            with contextlib.suppress(Stopped):
                run_case(Case("unmutated", model, data), workers[0], args.options, tally, save)
            if not stop.reason and (tally.findings or tally.codes != {0: 1}):
                print("The unmutated pair does not pass; mutations of it would say nothing.")
                report(tally, save, sys.stdout)
                return 1
            threads = [threading.Thread(target=drain, args=(worker,)) for worker in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in workers:
                worker.stop()
    report(tally, save, sys.stdout)
    if stop.reason:
        print(f"stopped, {stop.reason}: {tally.runs} of {1 + args.models + args.data} cases had ended")
    print(*broken, sep="", end="")
    if tally.findings or broken:
        return 1
    return 128 + stop.signal if stop.signal else 0


def main() -> None:
    """Command line."""
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("calibration", type=Path, nargs="?", metavar="CALIB")
    parser.add_argument("--models", type=int, default=100, help="number of mutated models")
    parser.add_argument("--data", type=int, default=100, help="number of mutated calibration files")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all cases together (default 300; inf: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one case, a worker's start included")
    parser.add_argument("--limit-gb", type=float, default=6.0, help="memory limit of a worker, of private data")
    parser.add_argument("--save", type=Path, help="folder for the findings (default: a new one among temporary files)")
    parser.add_argument("--entry", default="onnx_optshift.cli:main", help="module:function that takes the arguments")
    parser.add_argument("--work", metavar="ENTRY", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[:split])
    args.options = argv[split + 1 :]
    if args.work:
        work(args.work, args.limit_gb)
    elif args.calibration is None:
        parser.error("MODEL and CALIB are needed")
    else:
        sys.exit(fuzz(args))


if __name__ == "__main__":
    main()
