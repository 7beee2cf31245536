"""Names beside a final place, the journal that a crash leaves, and what becomes of the leftovers of dead processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_optshift import journal, temporary
from onnx_optshift.graph.atomic import Written
from onnx_optshift.temporary import beside, cut

NAMES = ["out.onnx", "m", "a b\nc.onnx", "模型" * 40 + ".onnx", "ü" * 127, "x" * 255, "😀" * 63, "back\udcffslash"]


@pytest.fixture
def record(monkeypatch):
    """Has this process keep a journal, and reads it."""
    file = journal.open_new()
    monkeypatch.setattr(journal, "_file", file)
    yield lambda: journal.read(file)
    os.close(file)


def left(path, process):
    """A file as a process of this number would have left it."""
    own = beside(path).name
    found = path.with_name(own.replace(f"-{os.getpid()}-", f"-{process}-"))
    assert found.name != own or process == os.getpid()
    found.touch()
    return found


@pytest.fixture(scope="module")
def dead():
    """Number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize("name", NAMES)
def test_a_temporary_name_fits_wherever_the_final_one_does(name, tmp_path):
    path = tmp_path / name
    path.touch()
    found = beside(path)
    found.touch()
    assert found.parent == tmp_path
    assert found != beside(path)
    assert found.name.startswith(".")
    assert len(os.fsencode(found.name)) <= 140  # encrypting file systems allow 143


def test_cutting_counts_bytes_and_keeps_characters_whole():
    assert cut("abc", 2) == "ab"
    assert cut("aüb", 2) == "a"
    assert cut("aüb", 3) == "aü"
    assert cut("😀😀", 7) == "😀"
    assert cut("short", 100) == "short"


@pytest.mark.skipif(os.name != "posix", reason="elsewhere asking whether a process lives may end it")
def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path, dead, monkeypatch):
    out = tmp_path / "out.onnx"

    long_a, long_b = tmp_path / ("x" * 200 + "a"), tmp_path / ("x" * 200 + "b")
    stale = left(out, dead), left(long_a, dead)
    kept = [left(out, os.getpid()), left(out, 1), left(out, 2**40), left(tmp_path / "other", dead), left(long_b, dead)]
    name = stale[0].name
    for lookalike in (name[1:], f"{name}.old", name.replace(".tmp", ".txt"), name.replace(f"-{dead}-", "-")):
        kept.append(tmp_path / lookalike)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(temporary.os, "readlink", lambda _: "pid:[another container]")
        kept.append(left(out, dead))
    for path in (out, *kept):
        path.touch()
    beside(out)
    beside(long_a)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (out, *kept)}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the state of a process is read from /proc")
def test_a_process_whose_status_nobody_asked_for_is_dead(tmp_path):
    out = tmp_path / "out.onnx"
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        stale = left(out, process.pid)
        beside(out)
        assert stale.exists()  # it lives
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the list of processes
        beside(out)
        assert not stale.exists()


def test_a_folder_that_cannot_be_read_is_no_error(tmp_path):
    assert beside(tmp_path / "none" / "out.onnx").parent == tmp_path / "none"


def test_an_empty_journal(record):
    assert record() == journal.Record("at the start", set(), None)


def test_without_a_journal_nothing_is_recorded(tmp_path):
    with journal.stage("capture"):
        journal.unfinished(tmp_path)
    assert journal._file is None


def test_a_record_that_was_cut_off_does_not_count(record, tmp_path):
    journal.unfinished(tmp_path / "whole")
    os.write(journal._file, b'["unfinished", "/half')
    assert record().unfinished == {tmp_path / "whole"}


def test_a_journal_that_is_full_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(journal, "_file", os.open("/dev/full", os.O_WRONLY) if os.path.exists("/dev/full") else 10**6)
    journal.unfinished(Path("a"))
    assert beside(tmp_path / "out.onnx").parent == tmp_path  # which is recorded too


@pytest.mark.parametrize("name", NAMES)
def test_any_name_comes_back(record, tmp_path, name):
    journal.unfinished(tmp_path / name)
    assert record().unfinished == {tmp_path / name}


def test_names_are_kept_absolute(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal.unfinished(Path("a"))
    monkeypatch.chdir("/")
    assert record().unfinished == {tmp_path / "a"}


def test_stages_within_stages(record):
    with journal.stage("a"):
        with journal.stage("b"):
            assert record().place == "during b"
        assert record().place == "during a"
    assert record().place == "after a"


def files(folder):
    written = Written(beside(folder / "out.onnx"), folder / "out.onnx")
    written.temp_path.touch()
    written.claim(folder / "out.data")
    (folder / "out.data").touch()
    return written


def test_written_files_are_unfinished_until_they_are_in_place(record, tmp_path):
    written = files(tmp_path)
    assert record() == journal.Record("at the start", {written.temp_path, tmp_path / "out.data"}, None)
    written.commit()
    after = record()
    assert after.placed == tmp_path / "out.onnx"
    assert tmp_path / "out.data" not in after.unfinished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.data", "out.onnx"]


def test_discarded_files_are_nobody_s(record, tmp_path):
    files(tmp_path).discard()
    assert record() == journal.Record("at the start", set(), None)


def test_a_rename_that_fails_is_no_placing(record, tmp_path, monkeypatch):
    written = files(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("refused")))
    with pytest.raises(Exception, match="refused"):
        written.commit()
    assert record() == journal.Record("at the start", set(), None)
    assert not list(tmp_path.iterdir())
