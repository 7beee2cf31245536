"""Progress: a bar on a terminal, lines elsewhere that never fall silent for long, nothing if quiet."""

import io
import re
import time

import pytest

from onnx_optshift import journal
from onnx_optshift.report.progress import SILENT, Bar, Lines, progress_for


def test_silence_is_silent(capsys):
    with SILENT.stage("capture", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_a_stage_ends_with_a_line_on_standard_error(capsys):
    with Lines().stage("capture", 5) as advance:
        advance(2)
        advance(3)
    with Lines().stage("check"):
        pass
    out, err = capsys.readouterr()
    assert not out
    assert err == "capture: 5 of 5, 0.0 s\ncheck: 0.0 s\n"
    with pytest.raises(KeyError), Lines().stage("capture", 5):
        raise KeyError
    assert not capsys.readouterr().err


def lines_after(stream, count, seconds=20):
    """The lines so far, once there are so many; what waits for a thread waits for its work, not for a time."""
    end = time.monotonic() + seconds
    while stream.getvalue().count("\n") < count and time.monotonic() < end:
        time.sleep(0.005)
    return stream.getvalue().splitlines()


def test_a_stage_that_never_advances_speaks():
    stream = io.StringIO()
    with Lines(stream, every=0.01).stage("solve", 7) as advance:
        first = lines_after(stream, 2)
        advance(4)
        later = lines_after(stream, len(first) + 3)
    assert len(first) >= 2
    assert all(line.startswith("solve: 0 of 7, ") for line in first)
    assert later[-1].startswith("solve: 4 of 7, ")
    ended = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == ended  # nobody speaks for a stage that has ended


def test_nested_stages_share_their_lines():
    stream = io.StringIO()
    progress = Lines(stream, every=0.01)
    with progress.stage("outer"):
        with progress.stage("inner", 5) as advance:
            advance(2)
            assert {line.partition(" s")[0][:-3] for line in lines_after(stream, 3)} == {"outer: inner, 2 of 5, "}
        before = stream.getvalue().splitlines()
        later = lines_after(stream, len(before) + 2)[len(before) :]
        assert all(re.fullmatch(r"outer: [\d.]+ s", line) for line in later)
    assert "outer: " in stream.getvalue().splitlines()[-1]


def test_stages_are_noted_for_whoever_tells_where_a_run_died(monkeypatch):
    monkeypatch.setattr(journal, "_shared", None)
    journal.share()
    for progress in (SILENT, Lines(io.StringIO()), Bar(io.StringIO())):
        with progress.stage("outer"), progress.stage("inner", 3):
            assert journal.read().stage == "during inner"
        assert journal.read().stage == "after outer"


def test_a_reader_that_has_gone_ends_no_run():
    stream = io.StringIO()
    with Lines(stream).stage("capture", 1):
        stream.close()


def test_bar_draws_and_cleans_up_when_stages_nest_and_fail(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal gets no bar
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = Bar(stream)

    def run():
        with bar.stage("outer", 2) as advance:
            with bar.stage("inner [red]", None) as inner:
                inner(1)
            advance(1)
            raise KeyError

    for _ in range(2):  # the second time shows that the first cleaned up
        with pytest.raises(KeyError):
            run()
    assert "outer" in stream.getvalue()
    assert "inner [red]" in stream.getvalue()


def test_progress_suits_the_place():
    pipe, screen = io.StringIO(), io.StringIO()
    screen.isatty = lambda: True
    assert isinstance(progress_for(file=pipe), Lines)
    assert isinstance(progress_for(file=screen), Bar)
    assert progress_for(file=pipe, quiet=True) is progress_for(file=screen, quiet=True) is SILENT
