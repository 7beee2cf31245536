"""Work in a process of its own: statuses pass, signals pass, and a death leaves one message and no debris.

Everything that forks does so in a Python of its own, never in the one that runs the tests.
"""

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from onnx_optshift import isolation, journal

pytestmark = pytest.mark.skipif(sys.platform in {"win32", "darwin"}, reason="nothing is isolated there")

HEAD = """
import atexit, ctypes, os, signal, sys, time
from pathlib import Path
from onnx_optshift import journal
from onnx_optshift.isolation import run_isolated
from onnx_optshift.write.atomic import Written

def ready():
    os.write(1, b"ready\\n")

def wait():
    ready()
    for _ in range(600):
        time.sleep(0.1)

def work():
"""
TAIL = "\nsys.exit(run_isolated(work))\n"


def script(body, before=""):
    """A program that does `body` isolated."""
    return HEAD + textwrap.indent(textwrap.dedent(body), "    ") + f"\n    return 0\n{before}" + TAIL


def ended(body, folder, before="", **options):
    """A finished program: status, output and messages."""
    return subprocess.run(
        [sys.executable, "-c", script(body, before)],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def started(body, folder, **options):
    """A running program in a session of its own, once its work has said that it is ready."""
    run = subprocess.Popen(
        [sys.executable, "-c", script(body)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options,
    )  # fmt: skip
    assert run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize("status", [0, 1, 2, 3, 130, 255])
def test_a_status_passes(status, tmp_path):
    done = ended(f"return {status}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_nothing_is_printed_twice(tmp_path):
    before = "print('before'); atexit.register(print, 'parent ends')"
    done = ended("print('work'); atexit.register(print, 'work ends')", tmp_path, before)
    assert done.stdout.splitlines() == ["before", "work", "work ends", "parent ends"]


def test_an_error_is_a_traceback_once(tmp_path):
    done = ended("raise ValueError('this one')", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: this one") == 1


@pytest.mark.parametrize(
    ("death", "words"),
    [
        ("ctypes.string_at(0)", "a native library crashed (SIGSEGV)"),
        ("os.abort()", "a native library crashed (SIGABRT)"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "a native library crashed (SIGBUS)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed (SIGKILL)"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "ended by a signal (SIGXCPU)"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 5)", f"ended by a signal (signal {signal.SIGRTMIN + 5})"),
    ],
)
def test_a_death_is_one_message_and_status_2(death, words, tmp_path):
    done = ended(f"with journal.stage('capture'):\n    {death}", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {words} during capture; nothing was written. ")
    assert done.stderr.count("\n") == 1
    assert ("--max-memory" in done.stderr) == ("SIGKILL" in words)
    assert ("ONNX Runtime alone" in done.stderr) == ("native" in words)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("DIE", "at the start"),
        ("with journal.stage('capture'):\n    with journal.stage('flatness'):\n        DIE", "during flatness"),
        (
            "with journal.stage('capture'):\n    with journal.stage('flatness'):\n        pass\n    DIE",
            "during capture",
        ),
        ("with journal.stage('capture'):\n    pass\nDIE", "after capture"),
    ],
)
def test_the_message_names_the_stage(body, place, tmp_path):
    done = ended(body.replace("DIE", "os.kill(os.getpid(), signal.SIGKILL)"), tmp_path)
    assert done.stderr.startswith(f"error: killed (SIGKILL) {place}; ")


FILES = """
Path("left alone").touch()
written = Written(Path.cwd() / "out")
written.temp_data.touch()
written.place_data("data")
written.temp_path.write_text("refers to data")
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)", ""])
def test_what_was_unfinished_is_removed_and_nothing_else(end, tmp_path):
    ended(FILES + end, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"left alone"}


def test_without_isolation_it_would_have_stayed(tmp_path):
    code = script(FILES + "os.kill(os.getpid(), signal.SIGKILL)").replace(TAIL, "\nwork()\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
    assert {path.name for path in tmp_path.iterdir()} > {"data", "left alone"}


@pytest.mark.parametrize("renamed", [False, True])
def test_a_death_around_the_rename(renamed, tmp_path):
    death = f"""
replace = os.replace
def dying(old, new):
    if {renamed}:
        replace(old, new)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
written.commit()
"""
    done = ended(FILES + death, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"left alone", *(("out", "data") if renamed else ())}
    assert (f"{tmp_path / 'out'} was written before" in done.stderr) == renamed
    assert ("nothing was written" in done.stderr) != renamed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_requests_to_end_reach_the_work_and_end_both(name, tmp_path):
    number = getattr(signal, name)
    run = started(FILES + "wait()", tmp_path)
    run.send_signal(number)
    assert run.communicate(timeout=60) == ("", "terminated: nothing was written\n")
    assert run.returncode == 128 + number
    assert {path.name for path in tmp_path.iterdir()} == {"left alone"}


def test_the_work_may_answer_a_request(tmp_path):
    run = started("signal.signal(signal.SIGTERM, lambda *_: os._exit(7)); wait()", tmp_path)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 7


def test_ignored_signals_stay_ignored(tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = started("ready(); sys.stdin.readline()", tmp_path, stdin=subprocess.PIPE, preexec_fn=nohup)
    os.killpg(run.pid, signal.SIGHUP)
    run.communicate("go on\n", timeout=60)
    assert run.returncode == 0


def test_a_caller_that_ignores_its_children(tmp_path):
    def ignore():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    assert ended("return 3", tmp_path, preexec_fn=ignore).returncode == 3


CLEARING_UP = """
try:
    wait()
except KeyboardInterrupt:
    print("clearing up", flush=True)
    time.sleep(0.3)
    print("done", flush=True)
    return 130
"""


@pytest.mark.parametrize("whom", ["group", "parent"])
def test_an_interrupt_comes_once(whom, tmp_path):
    run = started(CLEARING_UP, tmp_path)
    # A terminal's reaches both processes, and the parent passes its own on.
    (os.killpg if whom == "group" else os.kill)(run.pid, signal.SIGINT)
    assert run.communicate(timeout=60) == ("clearing up\ndone\n", "")
    assert run.returncode == 130


def test_a_second_interrupt_later_on_counts(tmp_path):
    run = started(CLEARING_UP.replace("0.3", "60"), tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    assert run.stdout.readline() == "clearing up\n"
    select.select([], [], [], isolation._ECHO + 0.1)
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=60) == ("", "interrupted\n")
    assert run.returncode == 130


def test_work_that_leaves_interrupts_to_the_system(tmp_path):
    done = ended("signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)", tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing was written\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_work_ends_with_its_parent(tmp_path):
    run = started("wait(); print('survived')", tmp_path)
    run.kill()
    assert run.communicate(timeout=30) == ("", "")  # returns once nobody holds the pipe any more
    assert run.returncode == -signal.SIGKILL


def test_a_terminal_gets_its_cursor_back(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    code = script("sys.stderr.write('\\x1b[?25l  0% ----'); sys.stderr.flush(); os.abort()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 2
    hidden, _, message = seen.partition("\x1b[?25h")
    assert "\x1b[?25l" in hidden
    assert message.startswith("error: a native library crashed (SIGABRT) at the start")


def test_a_reader_that_has_gone_costs_nothing_but_the_message(tmp_path):
    read, write = os.pipe()
    os.close(read)
    # Buffered, as streams are unless somebody asks otherwise: the interpreter flushes once more at its end.
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    crash = [sys.executable, "-c", script("os.abort()")]
    done = subprocess.run(crash, cwd=tmp_path, stderr=write, env=buffered, check=False)
    os.close(write)
    assert done.returncode == 2


def fail(*_):
    raise OSError("no more")


@pytest.mark.parametrize("lacking", ["safe forks", "processes"])
def test_without_a_second_process_it_runs_here(lacking, monkeypatch):
    if lacking == "safe forks":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(os, "fork", fail)
    monkeypatch.setattr(journal, "_shared", None)  # as it was, afterwards
    here = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGTERM)
    assert isolation.run_isolated(lambda: here.append(os.getpid()) or 5) == 5
    assert here == [os.getpid()]
    assert before == (signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGTERM))


def test_without_memory_for_a_journal_there_is_still_one_message(tmp_path):
    done = ended("os.abort()", tmp_path, "def fail(*_):\n    raise OSError\njournal.mmap.mmap = fail")
    assert done.returncode == 2
    assert done.stderr.startswith("error: a native library crashed (SIGABRT) at the start; nothing was written.")


@pytest.mark.parametrize(
    "argv", [["-h"], ["inspect", "no.onnx"], ["verify", "no.onnx", "no.onnx"], ["no.onnx", "o.onnx"]]
)
def test_every_command_is_isolated(argv, tmp_path):
    """Both entries fork, and the parent loads nothing heavy."""
    code = f"""
import os, sys
from onnx_optshift import cli
fork, children = os.fork, []
os.fork = lambda: children.append(fork()) or children[-1]
sys.argv[1:] = {argv!r}
try:
    cli.run()
finally:
    if children[0]:
        print("forked", sorted({{"torch", "numpy", "onnx", "onnxruntime", "rich"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "forked []"
    assert done.returncode == (0 if argv == ["-h"] else 2)
    assert "Traceback" not in done.stderr


def test_the_installed_script_is_the_isolated_one():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'onnx-optshift = "onnx_optshift.cli:run"' in text
