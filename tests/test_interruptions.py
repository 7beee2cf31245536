"""Real runs that are killed, interrupted, or given no room: OUT is the old file or the whole new one, and nothing else.

The runs are processes of their own, as users start them. Deaths at every file operation share one interpreter that has
loaded everything and forks for each.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models as tiny

OLD = b"\x08the old file"  # begins as models do: others are not replaced
QUICK = ("--heldout", "none", "--quiet")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only isolated where processes fork safely")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of some KiB with data that leaves it freedom, in a folder that no run may change."""
    folder = tmp_path_factory.mktemp("model")
    proto = tiny.model("g (float[N,48] x) => (float[N,32] y) { y = MatMul(x, W) }", {"W": tiny.weight(48, 32)})
    onnx.save(proto, folder / "model.onnx")
    np.savez(folder / "calibration.npz", x=tiny.weight(24, 48))
    before = contents(folder)
    yield folder / "model.onnx"
    assert contents(folder) == before


@pytest.fixture(scope="module")
def whole(run, source, tmp_path_factory):
    """What an undisturbed run writes: digests by name; by whether the data is external."""
    found = {}
    for external in (False, True):
        folder = tmp_path_factory.mktemp("whole")
        done = run(source, folder / "out.onnx", *external * ["--save-as-external-data"])
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        found[external] = contents(folder)
    assert list(found[False]) == ["out.onnx"]
    assert len(found[True]) == 2
    return found


def contents(folder):
    """Digests by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def command(*words):
    return [sys.executable, "-m", "onnx_optshift", *map(str, words)]


# Does what a user's shell does for each line, with everything loaded once: a run of its own costs seconds to load.
SHELL = """
import json, os, sys, tempfile
import onnx_optshift.commands.shift
from onnx_optshift import cli

for line in sys.stdin:
    job = json.loads(line)
    pipes = [os.pipe() for _ in range(2)]
    child = os.fork()
    if not child:
        status = 1
        for number, (_, write) in enumerate(pipes, start=1):
            os.dup2(write, number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))
        if job["size"] is not None:
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["size"], job["size"]))
        tempfile.tempdir = job["temporary"]
        sys.argv[1:] = job["words"]
        try:
            cli.run()
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    for _, write in pipes:
        os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for read, _ in pipes:
        with open(read, encoding="utf-8") as pipe:
            texts.append(pipe.read())
    print(json.dumps([status, *texts]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """Runs the command line in a process of its own; `size` is a limit of files, in bytes, as if a disk were full."""
    words = [sys.executable, "-c", SHELL]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:

        def answer(*words, quick=QUICK, size=None, temporary=None):
            words = [str(word) for word in (*words, *quick)]
            job = {"words": words, "size": size, "temporary": temporary and str(temporary)}
            shell.stdin.write(json.dumps(job) + "\n")
            shell.stdin.flush()
            return subprocess.CompletedProcess(words, *json.loads(shell.stdout.readline()))

        yield answer
        shell.stdin.close()


# Repeats a command, each time disturbed at the next file operation in a folder, until it ends undisturbed.
# Prints what each run left, as JSON lines.
DISTURBED = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
import onnx_optshift.commands.shift  # once, for all runs
from onnx_optshift import cli
from onnx_optshift.isolation import run_isolated

folder, disturbance, old = Path(sys.argv[1]), sys.argv[2], sys.argv[3].encode()
UNDISTURBED = 200
WATCHED = {"open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "os.rmdir"}

def disturbed(at):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in WATCHED and str(args[0]).startswith(str(folder)):
            count += 1
            if count == at:
                if disturbance == "SIGINT":
                    os.killpg(0, signal.SIGINT)
                else:
                    os.kill(os.getpid(), getattr(signal, disturbance))
    sys.addaudithook(hook)
    status = cli.main(sys.argv[4:])
    return UNDISTURBED + status if count < at else status

for at in range(1, 1000):
    shutil.rmtree(folder)
    folder.mkdir()
    if old:
        (folder / "out.onnx").write_bytes(old)
    status = run_isolated(lambda: disturbed(at))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    left = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    print(json.dumps([status, left]), flush=True)
    if status >= UNDISTURBED:
        break
"""


def disturb(source, folder, disturbance, old, *words):
    """Status and what is left, for each run; the last one is undisturbed. And all messages."""
    done = subprocess.run(
        [sys.executable, "-c", DISTURBED, str(folder), disturbance, old.decode(), str(source),
         str(folder / "out.onnx"), *words, *QUICK],
        capture_output=True, text=True, timeout=300, check=True, start_new_session=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()


@linux
@pytest.mark.parametrize(
    ("disturbance", "old", "external"),
    [
        ("SIGKILL", OLD, True),
        ("SIGINT", b"", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(
            ("SIGKILL", "SIGSEGV", "SIGINT"), (OLD, b""), (False, True)
        )),
    ],
)  # fmt: skip
def test_a_death_at_any_file_operation(disturbance, old, external, source, whole, tmp_path):
    status = 130 if disturbance == "SIGINT" else 2
    folder = tmp_path / "folder"
    folder.mkdir()
    before = {"out.onnx": hashlib.sha256(old).hexdigest()} if old else {}
    runs, messages = disturb(source, folder, disturbance, old, *external * ["--save-as-external-data"])
    *disturbed, last = runs
    assert last == [200, whole[external]]
    assert [found for found, _ in disturbed] == [status] * len(disturbed)
    assert len(messages) == len(disturbed)
    early = [left for _, left in disturbed if left != whole[external]]
    assert len(early) >= (8 if external else 4)
    assert all(left == before for left in early)
    # Once it is there it stays.
    assert [left for _, left in disturbed] == early + [whole[external]] * (len(disturbed) - len(early))


def test_the_disturbances_leave_debris_where_nobody_tidies(source, tmp_path):
    """The negative control: the same deaths without isolation."""
    folder = tmp_path / "folder"
    folder.mkdir()
    code = DISTURBED.replace(
        "run_isolated(lambda: disturbed(at))",
        "os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if (pid := os.fork()) else os._exit(disturbed(at))",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "SIGKILL", "", str(source), str(folder / "out.onnx"), *QUICK],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    left = [set(json.loads(line)[1]) for line in done.stdout.splitlines()]
    assert any(name.startswith(".onnx-optshift-") for names in left for name in names)


@posix
@pytest.mark.parametrize(
    ("words", "size", "old"),
    [
        (["OUT"], 4096, OLD),
        (["OUT", "--save-as-external-data"], 4096, b""),
        (["OUT", "--save-as-external-data"], 0, OLD),
        (["--dry-run"], 4096, b""),
    ],
)
def test_a_full_disk(run, words, size, old, source, tmp_path):
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    out = folder / "out.onnx"
    if old:
        out.write_bytes(old)
    before = contents(folder)
    words = [out if word == "OUT" else word for word in words]
    done = run(source, *words, size=size, temporary=scratch)
    assert done.returncode == 2
    assert done.stdout == ""
    assert os.strerror(errno.EFBIG) in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert contents(folder) == before
    assert not [path for path in scratch.iterdir() if "onnx-optshift" in path.name]


@posix
@pytest.mark.parametrize("suffix", ["json", "html"])
def test_no_room_for_the_report(run, suffix, source, tmp_path):
    path = tmp_path / f"report.{suffix}"
    path.write_bytes(OLD)
    done = run("inspect", source, "--report", path, quick=(), size=1000)
    assert done.returncode == 2
    assert f"--report {path}: cannot be written: {os.strerror(errno.EFBIG)}" in done.stderr.splitlines()[-1]
    assert done.stderr.count("error") == 1
    assert contents(tmp_path) == {path.name: hashlib.sha256(OLD).hexdigest()}


@posix
def test_enough_room_is_enough(run, source, whole, tmp_path):
    done = run(source, tmp_path / "out.onnx", size=100_000)
    assert done.returncode == 0
    assert contents(tmp_path) == whole[False]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two pages: less than the model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("external", [False, True])
def test_a_disk_that_is_really_full(run, external, source, small_disk):
    out = small_disk / "out.onnx"
    out.write_bytes(OLD)
    before = contents(small_disk)
    done = run(source, out, *external * ["--save-as-external-data"])
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out}: cannot be written: {os.strerror(errno.ENOSPC)}. Nothing was changed")
    assert "Free some space" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(small_disk) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_on_a_full_disk(source, whole, tmp_path):
    out = tmp_path / "out.onnx"
    with open("/dev/full", "w") as full:
        for words in (["-h"], [source, out, "--heldout", "none"]):
            done = subprocess.run(
                command(*words),
                stdout=full, stderr=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": ""},
            )  # fmt: skip
            assert done.returncode == 2
            assert f"standard output cannot be written: {os.strerror(errno.ENOSPC)}" in done.stderr.splitlines()[-1]
            assert done.stderr.count("error") == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {out} was written and verified")
    assert contents(tmp_path) == whole[False]


@posix
@pytest.mark.parametrize("closed", [[1], [0, 1, 2]])
def test_closed_standard_streams(closed, source, whole, tmp_path):
    def close():
        for number in closed:
            os.close(number)

    code = subprocess.run(
        command(source, tmp_path / "out.onnx", "--heldout", "none"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=close, check=False,
    ).returncode  # fmt: skip
    assert code == 0
    assert contents(tmp_path) == whole[False]


@pytest.mark.parametrize("external", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_runs_into_one_file(external, source, whole, tmp_path):
    words = command(source, tmp_path / "out.onnx", *external * ["--save-as-external-data"], *QUICK)
    runs = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(each.communicate()[1], each.returncode) for each in runs] == [("", 0)] * 2
    assert contents(tmp_path) == whole[external]
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


@posix
@pytest.mark.parametrize("whom", ["group", "parent"])
@pytest.mark.parametrize(("name", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_a_request_to_end_while_data_is_read(name, word, whom, source, tmp_path):
    if name == "SIGTERM" and sys.platform != "linux":
        pytest.skip("only isolated where processes fork safely")
    number = getattr(signal, name)
    script, ready = tmp_path / "data.py", tmp_path / "ready"
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, time
        def load():
            pathlib.Path({str(ready)!r}).open("w").close()
            time.sleep(60)
            yield {{}}
        """)
    )
    os.mkfifo(ready)
    started = subprocess.Popen(
        command(source, tmp_path / "out.onnx", "--calib", f"{script}:load"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    ready.open().close()  # waits for the other end
    (os.killpg if whom == "group" else os.kill)(started.pid, number)
    assert started.communicate(timeout=60) == ("", f"{word}: nothing was written\n")
    assert started.returncode == 128 + number
    assert {path.name for path in tmp_path.iterdir()} == {"data.py", "ready"}


@posix
@pytest.mark.parametrize("terminal", [False, True])
def test_a_crash_in_the_middle(terminal, source, tmp_path):
    """As a user sees it, in a pipe and on a terminal."""
    import pty

    script = tmp_path / "data.py"
    script.write_text("import os\ndef load():\n    os.abort()\n    yield {}\n")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    words = command(source, tmp_path / "out.onnx", "--calib", f"{script}:load")
    code = subprocess.run(words, stdout=theirs, stderr=theirs, check=False).returncode
    os.close(theirs)
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    assert code == 2
    assert seen.count("\n") == 1
    assert "error: a native library crashed (SIGABRT) during preparation; nothing was written." in seen
    assert {path.name for path in tmp_path.iterdir()} == {"data.py"}


def test_a_model_that_may_only_be_read(run, source, whole, tmp_path):
    shutil.copytree(source.parent, tmp_path, dirs_exist_ok=True)
    model, out = tmp_path / "model.onnx", tmp_path / "new" / "out.onnx"
    out.parent.mkdir()
    for path in tmp_path.glob("*.*"):
        path.chmod(0o444)
    before = model.read_bytes()
    assert run(model, out).returncode == 0
    assert model.read_bytes() == before
    assert contents(out.parent) == whole[False]
    assert out.stat().st_mode & 0o200  # OUT is a new file, not a copy of IN's permissions


@posix
def test_a_folder_that_may_only_be_read(source, tmp_path):
    words = command(source, tmp_path / "out.onnx", *QUICK)
    if os.geteuid() == 0:  # who writes wherever it likes, unless that is taken away
        if not shutil.which("setpriv"):
            pytest.skip("root may write anywhere, and there is no setpriv")
        words = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *words]
    tmp_path.chmod(0o555)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    tmp_path.chmod(0o755)
    assert done.returncode == 2
    assert f"out.onnx: cannot be written: {os.strerror(errno.EACCES)}" in done.stderr
    assert "Choose a folder that you may write to" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.parametrize("stem", ["a\nмодель 😀", "x" * 250, "語" * 83 + "x"])
def test_names_of_any_kind_and_any_length(run, stem, source, tmp_path):
    out, report = tmp_path / f"{stem}.onnx", tmp_path / f"{stem}.json"
    done = run(source, out, "--save-as-external-data", "--report", report)
    assert (done.returncode, done.stderr) == (0, "")
    found = {path.name for path in tmp_path.iterdir()}
    data = found - {out.name, report.name}
    assert len(data) == 1
    assert data.pop().endswith(".data")
    onnx.load(out)
    assert json.loads(report.read_text(encoding="utf-8"))["model"]["output"] == str(out)


@posix
def test_a_name_that_is_too_long_is_one_message(run, source, tmp_path):
    done = run(source, tmp_path / f"{'x' * 251}.onnx")
    assert done.returncode == 2
    assert "File name too long" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
