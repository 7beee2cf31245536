"""Files whole or not at all; what a death leaves, and that nothing of it stays nor anything else goes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_optshift import journal
from onnx_optshift.errors import InputError
from onnx_optshift.write import atomic, leftovers
from onnx_optshift.write.atomic import Written, check_target, digest, system_errors, write_text
from onnx_optshift.write.leftovers import part, scratch_folder, work_name

NAMES = ["out.onnx", "m", "a b\nc.onnx", "模型" * 40 + ".onnx", "ü" * 127, "x" * 255, "😀" * 63, "back\udcffslash"]
posix = pytest.mark.skipif(os.name != "posix", reason="elsewhere asking whether a process lives may end it")


@pytest.fixture
def record(monkeypatch):
    """Has this process keep a journal, and reads it."""
    file = journal.open_new()
    monkeypatch.setattr(journal, "_file", file)
    monkeypatch.setattr(journal, "_record", journal.Record())
    yield lambda: journal.read(file)
    os.close(file)


@pytest.fixture(scope="module")
def dead():
    """Number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    return process.pid


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfinished(out, data=b"data", location="sub/out.data"):
    """A written file with a data file in a folder of its own, not committed."""
    written = Written(out)
    written.temp_data.write_bytes(data)
    written.place_data(location)
    written.temp_path.write_bytes(b"refers to " + location.encode())
    return written


def left_by(process, written):
    """Renames what is unfinished as if this process had left it."""
    for path in written.final_path.parent.glob(f"{written._name.name}*"):
        path.rename(path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{process}-")))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_written(name, tmp_path):
    write_text(tmp_path / name, "first")
    write_text(tmp_path / name, "second")
    assert contents(tmp_path) == {name: b"second"}
    hidden = work_name(tmp_path).name
    assert hidden.startswith(".")
    assert len(os.fsencode(hidden)) <= 120  # encrypting file systems allow 143


def test_nothing_stays_of_what_is_discarded(tmp_path):
    with unfinished(tmp_path / "out.onnx") as written:
        assert len(contents(tmp_path)) == 3  # the file, its data, and the claim
        assert written.temp_path.parent == tmp_path
    written.commit()  # too late
    assert not list(tmp_path.iterdir())


def test_commit_is_final(tmp_path):
    with unfinished(tmp_path / "out.onnx") as written:
        written.commit()
    written.discard()
    assert set(contents(tmp_path)) == {"out.onnx", str(Path("sub", "out.data"))}


def test_data_never_replaces_other_data(tmp_path):
    (tmp_path / "out.data").write_bytes(b"other")
    with Written(tmp_path / "out.onnx") as written:
        written.temp_data.write_bytes(b"data")
        with pytest.raises(InputError, match="exists with other content"):
            written.place_data("out.data")
    assert contents(tmp_path) == {"out.data": b"other"}


def test_equal_data_that_was_there_stays_there(tmp_path):
    (tmp_path / "out.data").write_bytes(b"data")
    inode = (tmp_path / "out.data").stat().st_ino
    unfinished(tmp_path / "out.onnx", location="out.data").discard()
    assert contents(tmp_path) == {"out.data": b"data"}
    assert (tmp_path / "out.data").stat().st_ino == inode


def test_data_that_another_run_has_come_to_need_stays(tmp_path):
    """Two runs with the same result: the one that placed the data is interrupted after the other has finished."""
    first = unfinished(tmp_path / "out.onnx")
    unfinished(tmp_path / "out.onnx").commit()
    whole = {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")}
    first.discard()
    assert contents(tmp_path) == whole
    assert len(whole) == 2


def test_data_that_somebody_has_replaced_stays(tmp_path):
    written = unfinished(tmp_path / "out.onnx", location="out.data")
    (tmp_path / "new").write_bytes(b"somebody else's")
    (tmp_path / "new").replace(tmp_path / "out.data")
    written.discard()
    assert contents(tmp_path) == {"out.data": b"somebody else's"}


def test_a_rename_that_fails_leaves_nothing(tmp_path, monkeypatch):
    written = unfinished(tmp_path / "out.onnx")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "refused")))
    with pytest.raises(InputError, match="refused"):
        written.commit()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EACCES, "Choose a folder that you may write to"),
        (errno.EROFS, "Choose a folder that you may write to"),
        (errno.EIO, "Choose another output path"),
    ],
)
def test_the_hint_fits_the_error(number, hint):
    with pytest.raises(InputError) as caught, system_errors(Path("out.onnx")):
        raise OSError(number, os.strerror(number))
    assert f"out.onnx: cannot be written: {os.strerror(number)}. Nothing was changed there. {hint}" in str(caught.value)
    assert ("space" in str(caught.value).replace(os.strerror(number), "")) == ("space" in hint)


def test_a_name_that_is_too_long_is_known_before_the_work(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        check_target(tmp_path / ("x" * 300))


# --- deaths ---


@posix
def test_what_dead_processes_left_goes_and_the_rest_stays(tmp_path, dead, monkeypatch):
    kept = set()
    for process in (os.getpid(), 1, 2**40):
        alive = Written(tmp_path / "other.onnx").temp_path
        alive = alive.with_name(alive.name.replace(f"-{os.getpid()}-", f"-{process}-"))
        alive.touch()
        kept.add(alive.name)
    work = unfinished(tmp_path / "out.onnx")
    part(work._name, "").mkdir()
    (part(work._name, "") / "inside").touch()
    work.temp_data.touch()
    left_by(dead, work)
    name = work._name.name.replace(f"-{os.getpid()}-", f"-{dead}-")
    names = {"sub", name, *(f"{name}{suffix}" for suffix in (".new", ".data", ".claims"))}
    for lookalike in (f".onnx-optshift-00000000-{dead}-{'0' * 12}.new", f"x{name}", f"{name}.old", f"{name}.new.new"):
        (tmp_path / lookalike).touch()
        kept.add(lookalike)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(leftovers.os, "readlink", lambda _: "pid:[another container]")
        Written(tmp_path / "out.onnx")
        assert {path.name for path in tmp_path.iterdir()} == names | kept
    Written(tmp_path / "any other.onnx")
    assert {path.name for path in tmp_path.iterdir()} == kept


@posix
@pytest.mark.parametrize("renamed", [False, True])
def test_a_death_around_the_rename(renamed, tmp_path, dead):
    work = unfinished(tmp_path / "out.onnx")
    if renamed:
        os.replace(work.temp_path, work.final_path)
    left_by(dead, work)
    Written(tmp_path / "out.onnx")
    assert set(contents(tmp_path)) == ({"out.onnx", str(Path("sub", "out.data"))} if renamed else set())


@posix
def test_claims_of_somebody_else_are_not_followed(tmp_path, dead, monkeypatch):
    work = unfinished(tmp_path / "out.onnx")
    left_by(dead, work)
    before = contents(tmp_path)
    with monkeypatch.context() as other_user:
        other_user.setattr(leftovers.os, "geteuid", lambda: os.getuid() + 1)
        Written(tmp_path / "out.onnx")
        assert contents(tmp_path) == before
    Written(tmp_path / "out.onnx")
    assert not contents(tmp_path)


@posix
def test_a_claim_that_was_cut_off_does_not_count(tmp_path, dead):
    work = unfinished(tmp_path / "out.onnx", location="out.data")
    with part(work._name, leftovers.CLAIMS).open("a") as file:
        file.write('["other", 12')
    left_by(dead, work)
    Written(tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the state of a process is read from /proc")
def test_a_process_whose_status_nobody_asked_for_is_dead(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        left_by(process.pid, unfinished(tmp_path / "out.onnx"))
        Written(tmp_path / "out.onnx")
        assert contents(tmp_path)  # it lives
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the list of processes
        Written(tmp_path / "out.onnx")
        assert not contents(tmp_path)


def test_a_folder_that_cannot_be_read_is_no_error(tmp_path):
    assert Written(tmp_path / "none" / "out.onnx").temp_path.parent == tmp_path / "none"


@posix
def test_scratch_folders_of_the_dead_go_too(tmp_path, dead, monkeypatch):
    monkeypatch.setattr(leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = scratch_folder()
    (folder / "model.onnx").touch()
    folder.rename(folder.with_name(folder.name.replace(f"-{os.getpid()}-", f"-{dead}-")))
    assert [path.name for path in tmp_path.iterdir()] != [scratch_folder().name]
    assert len(list(tmp_path.iterdir())) == 1


# --- the journal ---


def test_an_empty_journal(record):
    assert record() == journal.Record("at the start", [], [])


def test_without_a_journal_nothing_is_recorded(tmp_path):
    with journal.stage("capture"):
        journal.unfinished(tmp_path)
    assert journal._file is None
    assert journal._record == journal.Record()


def test_a_line_that_was_cut_off_does_not_count(record, tmp_path):
    journal.unfinished(tmp_path / "whole")
    os.write(journal._file, b'{"place": "during')
    assert record().unfinished == [str(tmp_path / "whole")]


def test_a_journal_that_is_full_is_no_error(record, monkeypatch, tmp_path):
    monkeypatch.setattr(journal, "_file", os.open("/dev/full", os.O_WRONLY) if os.path.exists("/dev/full") else 10**6)
    assert Written(tmp_path / "out.onnx").temp_path.parent == tmp_path  # which is recorded too


def test_a_python_without_nameless_files_in_memory(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)  # as in builds for old systems
    file = journal.open_new()
    os.write(file, b'{"place": "during capture"}\n')
    assert journal.read(file).place == "during capture"
    os.close(file)


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_whole_and_absolute(name, record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal.unfinished(Path(name))
    monkeypatch.chdir("/")
    assert record().unfinished == [str(tmp_path / name)]


def test_stages_within_stages(record):
    with journal.stage("a"):
        with journal.stage("b"):
            assert record().place == "during b"
        assert record().place == "during a"
    assert record().place == "after a"


def test_what_was_placed_is_known_and_what_was_not_is_not(record, tmp_path, monkeypatch):
    unfinished(tmp_path / "out.onnx").commit()
    assert record().placed == [str(tmp_path / "out.onnx")]
    with monkeypatch.context() as failing:
        failing.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "refused")))
        with pytest.raises(InputError, match="refused"):
            write_text(tmp_path / "report.json", "text")
    assert record().placed == [str(tmp_path / "out.onnx")]
    assert len(record().unfinished) == 2
    assert digest(tmp_path / "sub" / "out.data")
