"""The tool that kills runs tells a broken OUT from a good one, and finds none."""

import hashlib
import subprocess
import sys
from pathlib import Path

import kills
import pytest

TOOL = Path(__file__).parents[1] / "tools" / "kills.py"
OLD = b"\x08the old file"  # begins as models do: others are not replaced


@pytest.mark.parametrize(
    ("case", "found", "expected"),
    [
        ("old", {"out.onnx": OLD}, ("old", "clean")),
        ("old", {"out.onnx": b"new", "out.data": b"data"}, ("new complete", "clean")),
        ("old", {"out.onnx": OLD, ".onnx-optshift-x.new": b""}, ("old", "hidden file left")),
        ("old", {"out.onnx": OLD, "out.data": b"data"}, ("old", "data file left")),
        ("absent", {}, ("absent", "clean")),
        ("absent", {".onnx-optshift-x.new": b""}, ("absent", "hidden file left")),
        ("old", {}, ("BROKEN", "clean")),
        ("old", {"out.onnx": b"ne"}, ("BROKEN", "clean")),
        ("old", {"out.onnx": b"new"}, ("BROKEN", "clean")),
        ("absent", {"out.onnx": OLD}, ("BROKEN", "clean")),
        ("absent", {"out.onnx": b"new", "out.data": b"da"}, ("BROKEN", "data file left")),
    ],
)
def test_it_knows_what_is_broken(case, found, expected, tmp_path):
    whole = {"out.onnx": b"new", "out.data": b"data"}
    finished = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
    assert kills.look(tmp_path / "out.onnx", case, finished) == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only isolated where processes fork safely")
def test_nothing_is_broken():
    done = subprocess.run([sys.executable, str(TOOL), "--kills", "9"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only isolated where processes fork safely")
def test_runs_that_keep_what_they_do_end_with_the_same_bytes():
    words = [sys.executable, str(TOOL), "--kills", "9", "--checkpoint"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " 0 broken" in done.stdout
