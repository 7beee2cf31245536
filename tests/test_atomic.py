"""Files whole or not at all; what a death leaves, and that nothing of it stays nor anything else goes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_optshift import journal
from onnx_optshift.errors import InputError
from onnx_optshift.write import atomic
from onnx_optshift.write.atomic import Written, check_target, digest, system_errors, write_text

NAMES = ["out.onnx", "m", "a b\nc.onnx", "模型" * 40 + ".onnx", "ü" * 127, "x" * 255, "😀" * 63, "back\udcffslash"]
posix = pytest.mark.skipif(os.name != "posix", reason="nothing is locked elsewhere")


@pytest.fixture
def record(monkeypatch):
    """Has this process keep a journal, and reads it."""
    monkeypatch.setattr(journal, "_shared", None)
    journal.share()
    return journal.read


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfinished(out, data=b"data", location="sub/out.data"):
    """A written file with a data file in a folder of its own, not committed."""
    written = Written(out)
    written.temp_data.write_bytes(data)
    written.place_data(location)
    written.temp_path.write_bytes(b"refers to " + location.encode())
    return written


def die(work):
    """What a dead process leaves: everything but the lock."""
    work._file.close()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_written(name, tmp_path):
    write_text(tmp_path / name, "first")
    write_text(tmp_path / name, "second")
    assert contents(tmp_path) == {name: b"second"}
    with Written(tmp_path / name) as written:
        hidden = written.temp_folder.name
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
def test_what_dead_processes_left_goes_and_the_rest_stays(tmp_path, monkeypatch):
    living = unfinished(tmp_path / "other.onnx", location="other.data")
    kept = set(contents(tmp_path))
    work = unfinished(tmp_path / "out.onnx")
    work.temp_folder.mkdir()
    (work.temp_folder / "inside").touch()
    work.temp_data.touch()
    die(work)
    name = work._record.name
    names = {"sub", name, *(f"{name}{suffix}" for suffix in (".new", ".data", ".folder"))}
    elsewhere = f".onnx-optshift-{'0' * 8}-{'0' * 12}"
    for lookalike in (elsewhere, f"{elsewhere}.new", f"x{name}", f"{name}.old", f"{name}.new.new"):
        (tmp_path / lookalike).touch()
        kept.add(lookalike)
    assert {path.name for path in tmp_path.iterdir()} == names | kept
    Written(tmp_path / "any other.onnx").discard()
    assert {path.name for path in tmp_path.iterdir()} == kept
    living.commit()
    assert (tmp_path / "other.onnx").exists()


@posix
def test_locks_of_other_processes_count_until_they_die(tmp_path):
    """Nobody waits for it, so that it is still in the list of processes when its lock is gone."""
    code = (
        "import sys, pathlib; from onnx_optshift.write.atomic import Written; "
        "written = Written(pathlib.Path(sys.argv[1])); written.temp_path.touch(); print('ready', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out.onnx")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"ready\n"
        before = contents(tmp_path)
        assert len(before) == 2
        Written(tmp_path / "out.onnx").discard()
        assert contents(tmp_path) == before  # it lives
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        Written(tmp_path / "out.onnx").discard()
        assert not contents(tmp_path)


@posix
def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", fail)
    work = unfinished(tmp_path / "out.onnx")
    before = contents(tmp_path)
    Written(tmp_path / "out.onnx").discard()
    assert contents(tmp_path) == before
    work.commit()
    assert set(contents(tmp_path)) == {"out.onnx", str(Path("sub", "out.data"))}


@posix
def test_a_sweep_that_comes_before_the_lock(tmp_path, monkeypatch):
    lock, swept = atomic.lock, []

    def late(file, *, wait):
        if wait and not swept:
            swept.append(Path(file.name))
            with swept[0].open("r+b") as other:  # as a sweep does
                lock(other, wait=False)
                atomic.remove(swept[0])
        lock(file, wait=wait)

    monkeypatch.setattr(atomic, "lock", late)
    work = unfinished(tmp_path / "out.onnx")
    assert work._record not in swept
    assert work._record.exists()
    work.discard()


@posix
@pytest.mark.parametrize("renamed", [False, True])
def test_a_death_around_the_rename(renamed, tmp_path):
    work = unfinished(tmp_path / "out.onnx")
    if renamed:
        os.replace(work.temp_path, work.final_path)
    die(work)
    Written(tmp_path / "out.onnx").discard()
    assert set(contents(tmp_path)) == ({"out.onnx", str(Path("sub", "out.data"))} if renamed else set())


@posix
def test_records_of_somebody_else_are_not_followed(tmp_path, monkeypatch):
    die(unfinished(tmp_path / "out.onnx"))
    before = contents(tmp_path)
    with monkeypatch.context() as other_user:
        other_user.setattr(atomic.os, "geteuid", lambda: os.getuid() + 1)
        Written(tmp_path / "out.onnx").discard()
        assert contents(tmp_path) == before
    Written(tmp_path / "out.onnx").discard()
    assert not contents(tmp_path)


@posix
def test_a_claim_that_was_cut_off_does_not_count(tmp_path):
    work = unfinished(tmp_path / "out.onnx", location="out.data")
    (tmp_path / "other").touch()
    work._file.write(b'["other", 12')
    die(work)
    Written(tmp_path / "out.onnx").discard()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# --- the journal ---


def test_an_empty_journal(record):
    assert record() == journal.Record("at the start", [], [])


def test_without_a_journal_nothing_is_recorded(tmp_path):
    with journal.stage("capture"):
        journal.hidden(tmp_path)
    assert journal._shared is None
    assert journal.read() == journal.Record()


def test_a_line_that_was_cut_off_does_not_count(record, tmp_path):
    journal.hidden(tmp_path / "whole")
    journal._shared.write(b'["stage", "during')
    assert record().hidden == [str(tmp_path / "whole")]


def test_a_journal_that_is_full_is_no_error(record, tmp_path):
    journal.hidden(tmp_path / "first")
    journal._shared.write(b" " * (len(journal._shared) - journal._shared.tell() - 5))
    Written(tmp_path / "out.onnx").discard()  # which is recorded too
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_whole_and_absolute(name, record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal.hidden(Path(name))
    monkeypatch.chdir("/")
    assert record().hidden == [str(tmp_path / name)]


def test_stages_within_stages(record):
    with journal.stage("a"):
        with journal.stage("b"):
            assert record().stage == "during b"
        assert record().stage == "during a"
    assert record().stage == "after a"


def test_what_was_placed_is_known_and_what_was_not_is_not(record, tmp_path, monkeypatch):
    unfinished(tmp_path / "out.onnx").commit()
    assert record().written == f"{tmp_path / 'out.onnx'} was written before"
    with monkeypatch.context() as failing:
        failing.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "refused")))
        with pytest.raises(InputError, match="refused"):
            write_text(tmp_path / "report.json", "text")
    assert record().written == f"{tmp_path / 'out.onnx'} was written before"
    assert len(record().hidden) == 2
    assert digest(tmp_path / "sub" / "out.data")
