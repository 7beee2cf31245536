"""The measuring tools notice what they are there to notice."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import bench_memory
import mutations
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "digits_cnn"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("pass", ""),
        ("bytearray(10**9)", "out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory"),
        ("while True: pass", "timeout"),
        ("raise ValueError('this one')", "exit 1"),
    ],
)
def test_measure_tells_endings_apart(code, failure):
    timeout = 0.5 if failure == "timeout" else 20
    run = bench_memory.measure([sys.executable, "-S", "-c", code], limit_gb=0.5, timeout=timeout)
    assert run.failure == failure
    if failure == "exit 1":
        assert run.detail == "ValueError: this one"


def test_measure_sees_the_memory_of_the_child():
    # In a process of its own: a parent as large as this one would show in its child's peak (Linux keeps it over exec).
    code = """
import sys, bench_memory
assert not {"numpy", "onnx", "torch"} & set(sys.modules)
run = lambda size: bench_memory.measure([sys.executable, "-c", f"size = {size}; b'x' * size"], limit_gb=2, timeout=10)
print(run(200_000_000).peak - run(1).peak)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=True, capture_output=True, text=True)
    assert int(run.stdout) == pytest.approx(200_000_000, rel=0.02)


@pytest.mark.parametrize("group", [1, 2])
def test_naive_patches_are_the_rows_of_a_convolution(group):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 4, 7, 6)), rng.normal(size=(6, 4 // group, 3, 2))
    attributes = {"pads": [1, 0, 1, 0], "strides": [2, 1], "dilations": [1, 2]}
    rows = bench_memory.patches(np.pad(x, [(0, 0)] * 4), (3, 2), attributes)
    kernels = weight.reshape(group, 6 // group, -1)
    products = [
        part.reshape(len(part), -1) @ k.T for part, k in zip(np.split(rows, group, axis=1), kernels, strict=True)
    ]
    expected = torch.nn.functional.conv2d(
        *map(torch.from_numpy, (x, weight)), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=group
    ).numpy()
    np.testing.assert_allclose(np.hstack(products), np.moveaxis(expected, 1, -1).reshape(-1, 6), atol=1e-12)


def test_mutations_are_seeded_and_change_the_file():
    model, data = ((DIGITS / name).read_bytes() for name in ("model.onnx", "heldout.npz"))
    first, again, other = (list(mutations.cases(model, data, {"model": 20, "data": 20}, s)) for s in (0, 0, 1))
    assert [c.label for c in first[:5]] == [f"model-{k}-{m.__name__}" for k, m in enumerate(mutations.MUTATIONS)]
    assert first == again
    assert first != other
    changed = [case.model != model or case.data != data for case in first]
    assert sum(changed) >= 38  # zeros over zeros, or a bit flipped twice, may leave one as it was


FAKE = """
    import os, signal, sys, time
    from pathlib import Path

    def main(argv):
        model, out = map(Path, argv[:2])
        content, original = model.read_bytes(), Path(ORIGINAL).read_bytes()
        print("some message", file=sys.stderr)
        if content == original:
            out.write_bytes(content)
            return 0
        FAULT
        return 2
"""
FAULTS = {
    "": None,
    "raise KeyError('boom')": "traceback",
    "print('Traceback (most recent call last):\\n  File x\\nE: y')": "traceback",
    "os.kill(os.getpid(), signal.SIGSEGV)": "crash",
    "time.sleep(60)": "timeout",
    "out.write_bytes(b'half')": "debris",
    "Path(os.environ['TMPDIR'], 'left').touch()": "debris",
    "model.write_bytes(b'')": "input changed",
    "return 7": "undocumented status",
    "sys.stderr.flush(); os.ftruncate(2, 0)": "no message",
    "out.write_bytes(b'no model'); return 0": "output does not load",
}


def fuzz_command(tmp_path, fault, *options):
    """Of a fuzz run, in the folder, of a command line that has a fault on every mutated model."""
    shutil.copy(DIGITS / "model.onnx", tmp_path / "in.onnx")
    source = textwrap.dedent(FAKE).replace("ORIGINAL", repr(str(tmp_path / "in.onnx"))).replace("FAULT", fault)
    (tmp_path / "fake_cli.py").write_text(source)
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), "in.onnx", str(DIGITS / "heldout.npz")]
    return [*command, "--data", "0", "--workers", "1", "--save", "found", "--entry", "fake_cli:main", *options]


@pytest.mark.parametrize("fault", FAULTS)
def test_fuzz_finds_each_fault(fault, tmp_path):
    timeout = "3" if FAULTS[fault] == "timeout" else "30"
    command = fuzz_command(tmp_path, fault, "--models", "1", "--timeout", timeout)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not run.stderr
    expected = FAULTS[fault]
    assert run.returncode == (expected is not None), run.stdout
    assert run.stdout.startswith("2 runs")
    if expected:
        assert f"  {expected} x1" in run.stdout
        saved = tmp_path / "found" / "model-0-flip_bits"
        assert (saved / "model.onnx").read_bytes() != (tmp_path / "in.onnx").read_bytes()
        assert "python -m onnx_optshift" in (saved / "finding.txt").read_text()


SLOW_FAULT, HANGS = "time.sleep(0.2); raise KeyError('boom')", "Path('under-way').touch(); time.sleep(60)"


def test_fuzz_prints_what_it_found_when_its_budget_has_run_out(tmp_path):
    command = fuzz_command(tmp_path, SLOW_FAULT, "--models", "100000", "--seconds", "5")
    start = time.monotonic()
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 5 <= time.monotonic() - start < 15
    assert (run.returncode, run.stderr) == (1, "")
    found = int(re.search(r"  traceback x(\d+): KeyError", run.stdout)[1])
    assert f"stopped, the budget of 5 s ran out: {1 + found} of 100001 cases had ended" in run.stdout


def test_fuzz_does_not_count_a_case_that_its_budget_cuts_short(tmp_path):
    command = fuzz_command(tmp_path, HANGS, "--models", "1", "--seconds", "5")
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert (run.returncode, run.stderr) == (0, "")
    assert "stopped, the budget of 5 s ran out: 1 of 2 cases had ended" in run.stdout
    assert "timeout: 0" in run.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("fault", "begun"), [(SLOW_FAULT, "found/model-1-*/finding.txt"), (HANGS, "under-way")])
def test_fuzz_prints_what_it_found_when_it_is_stopped(number, fault, begun, tmp_path):
    command = fuzz_command(tmp_path, fault, "--models", "100000", "--seconds", "600")
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while time.monotonic() < end and not any(tmp_path.glob(begun)):
        time.sleep(0.1)
    run.send_signal(number)
    output, errors = run.communicate(timeout=20)
    finds = fault == SLOW_FAULT
    assert not errors
    assert ("  traceback x" in output) == finds
    assert f"stopped, {number.name}: " in output
    assert run.returncode == (1 if finds else 128 + number)


def test_fuzz_refuses_a_pair_that_fails_unmutated(tmp_path):
    (tmp_path / "fake_cli.py").write_text("def main(argv):\n    print('no')\n    return 2\n")
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), str(DIGITS / "model.onnx"), str(DIGITS / "heldout.npz")]
    run = subprocess.run(
        [*command, "--entry", "fake_cli:main"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "unmutated pair does not pass" in run.stdout
