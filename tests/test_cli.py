"""The command line: what it accepts, what it hands on, and one message with the right status for everything else."""

import itertools
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
import warnings
from datetime import datetime
from importlib import import_module
from pathlib import Path

import pytest
from reports import output, report

import onnx_optshift
from onnx_optshift import cli
from onnx_optshift.arguments import parse
from onnx_optshift.errors import DeviceError, InputError, ToleranceError
from onnx_optshift.report import progress
from onnx_optshift.report.model import Verification
from onnx_optshift.report.progress import Lines
from onnx_optshift.run.layers import Layers
from onnx_optshift.run.world import ALONE
from onnx_optshift.settings import Settings

FILES = ["in.onnx", "out.onnx"]


@pytest.fixture
def called(monkeypatch):
    """Stands in for the commands: records what they are called with and returns a finished report."""
    calls = types.SimpleNamespace(args=None, options=None, raises=None, report=report())

    def answer(*args, **options):
        calls.args, calls.options = args, options
        if calls.raises:
            raise calls.raises
        return calls.report

    def shift(*args, **options):
        return types.SimpleNamespace(report=answer(*args, **options))

    for name in ("inspect", "verify", "diagnose"):
        monkeypatch.setattr(import_module(f"onnx_optshift.commands.{name}"), name, answer)
    monkeypatch.setattr(import_module("onnx_optshift.commands.shift"), "run", shift)
    return calls


def refused(argv):
    with pytest.raises(InputError) as caught:
        parse(argv)
    return str(caught.value)


def test_two_files_alone_mean_the_defaults(called, capsys):
    assert cli.main(FILES) == 0
    model, out, calibration, heldout, settings, shown = called.args
    assert isinstance(shown, Lines)
    assert called.options == {"reports": [], "world": ALONE}
    assert (model, out) == (Path("in.onnx"), Path("out.onnx"))
    assert calibration is heldout is None
    assert settings == Settings()
    out, err = capsys.readouterr()
    assert "1 of 2 layers shifted." in out
    assert not err


def test_every_option_arrives():
    args = parse([
        *FILES,
        *("--calib", "a.npz", "b.npz", "--heldout", "h.npz", "--labels", "y"),
        *("--max-samples", "9", "--tolerance", "0.25", "--objective", "range", "-ni", "a*", "-ne", "b", "re:c"),
        *("--op-types", "Gemm", "Conv", "--dry-run", "--save-as-external-data", "--device", "cuda:1"),
        *("--providers", "cuda", "cpu", "--batch-size", "4", "--max-memory", "2G", "--seed", "5"),
        *("--custom-op-library", "ops.so"),
    ])  # fmt: skip
    assert args.calibration == ["a.npz", "b.npz"]
    assert args.heldout == ["h.npz"]
    assert parse([*FILES, "--heldout-fraction", "0.3"]).settings == Settings(heldout_fraction=0.3)
    assert args.settings == Settings(
        labels="y",
        max_samples=9,
        tolerance=0.25,
        objective="range",
        nodes_to_include=("a*",),
        nodes_to_exclude=("b", "re:c"),
        op_types=("Gemm", "Conv"),
        dry_run=True,
        save_as_external_data=True,
        device="cuda:1",
        providers=("cuda", "cpu"),
        batch_size=4,
        max_memory=2 * 2**30,
        seed=5,
        custom_op_library="ops.so",
    )


def test_the_report_on_standard_output_is_all_that_is_there(capsys):
    model = Path(__file__).parent.parent / "models" / "digits_mlp" / "model.onnx"
    assert cli.main(["inspect", str(model), "--report", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "inspect"
    assert [line.partition(":")[0] for line in err.splitlines()] == ["preparation", "capture", "solve"]
    assert cli.main(["inspect", str(model), "--report", "-", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] == 1
    assert not err


def test_every_setting_but_none_has_an_option():
    reachable = vars(parse([*FILES, "--stochastic", "--dry-run"])).keys()
    assert {"stochastic", "dry_run"} <= reachable
    text = capture_help("shift") + capture_help("verify")
    for name in Settings.__dataclass_fields__:
        option = name.replace("_", "-")
        assert re.search(rf"--(no-)?{option}\b", text), name


def capture_help(command):
    argv = ["-h"] if command == "shift" else [command, "-h"]
    done = subprocess.run([sys.executable, "-m", "onnx_optshift", *argv], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("flag", ["--calib", "--calibration-data", "--calibration_data", "-d"])
def test_names_of_the_calibration_option(flag):
    assert parse([*FILES, flag, "a", flag, "b", "c"]).calibration == ["a", "b", "c"]
    assert parse([flag, "a", "--seed", "1", *FILES]).calibration == ["a"]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", ["--max_memory", "--max-memory"])
def test_underscores_are_dashes_in_names_and_not_in_values(name, joined):
    words = [f"{name}=1K"] if joined else [name, "1K"]
    assert parse([*FILES, *words, "--labels=my_labels", "-ni", "a_b"]).settings == Settings(
        max_memory=1024, labels="my_labels", nodes_to_include=("a_b",)
    )


def test_options_may_stand_anywhere():
    options = [["--seed", "3"], ["--dry-run"], ["in.onnx"], ["out.onnx"]]
    for order in itertools.permutations(options):
        args = parse(list(itertools.chain(*order)))
        assert {p.name for p in args.files} == set(FILES)
        assert args.settings == Settings(seed=3, dry_run=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", 1000), ("2G", 2**31), ("1.5K", 1536), ("512m", 2**29), ("3GiB", 3 * 2**30), ("1T", 2**40)],
)
def test_sizes(text, expected):
    assert parse([*FILES, "--max-memory", text]).settings.max_memory == expected


@pytest.mark.parametrize(("words", "expected"), [([], 0), (["64"], 64)])
def test_stochastic_batch_is_optional(words, expected):
    assert parse([*FILES, "--stochastic", *words]).settings.stochastic == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected the files IN OUT, found none"),
        (["in.onnx"], "expected the files IN OUT, found in.onnx"),
        ([*FILES, "third"], "found in.onnx out.onnx third"),
        (["--calib", "a.npz", *FILES], "Files come before options that take several values, such as --calib"),
        ([*FILES, "--tolerence", "0.1"], "unknown option '--tolerence'. Close matches: '--tolerance'"),
        ([*FILES, "--tolerence=0.1"], "unknown option '--tolerence'"),
        ([*FILES, "--max_memroy", "1"], "Close matches: '--max-memory'"),
        ([*FILES, "--tol", "0.1"], "unknown option '--tol'"),
        ([*FILES, "-x"], "unknown option '-x'"),
        ([*FILES, "--tolerance", "much"], "argument --tolerance: expected auto or a number, found 'much'"),
        ([*FILES, "--tolerance", "-1"], "tolerance: expected 'auto' or a relative deviation"),
        ([*FILES, "--tolerance", "nan"], "found nan"),
        ([*FILES, "--tolerance"], "expected one argument"),
        ([*FILES, "--seed", "1.5"], "expected a whole number, found '1.5'"),
        ([*FILES, "--max-memory", "2GB"], "expected bytes, or a size such as 512M or 2G, found '2GB'"),
        (["--stochastic", *FILES], "found 'in.onnx'; a file must come before this option"),
        ([*FILES, "--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N"),
        ([*FILES, "--objective", "rang"], "Close matches: 'range'"),
        ([*FILES, "--no-snap"], "only has a meaning with the objective 'range'"),
        ([*FILES, "--log-level", "loud"], "invalid choice: 'loud'"),
        ([*FILES, "--report", "r.txt"], "ends in .json or .html"),
        ([*FILES, "--report", "nowhere/r.json"], "does not exist"),
        (["inspect"], "expected the files IN, found none"),
        (["inspect", "a", "--dry-run"], "unknown option '--dry-run'"),
        (["verify", "a"], "expected the files A B, found a"),
        (["verify", "a", "b", "--tolerance", "auto"], "expected a number"),
        (["verify", "a", "b", "--objective", "norm"], "unknown option '--objective'"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(called, capsys, argv, message):
    assert message in refused(argv)
    assert cli.main(argv) == 2
    assert called.args is None
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_quiet_and_verbose_contradict_each_other(called):
    assert "--quiet and --verbose contradict each other" in refused([*FILES, "--quiet", "--verbose"])
    assert cli.main([*FILES, "--verbose", "--quiet"]) == 2
    assert called.args is None


def test_dry_run_needs_no_out():
    assert parse(["in.onnx", "--dry-run"]).files == [Path("in.onnx"), None]
    assert parse([*FILES, "--dry-run"]).files == [Path("in.onnx"), Path("out.onnx")]


def test_commands_are_words_and_files_of_that_name_are_not(called):
    assert parse(["inspect", "m.onnx"]).command == "inspect"
    assert parse(["./inspect", "out.onnx"]).command == "shift"
    assert parse(["in.onnx", "inspect"]).files == [Path("in.onnx"), Path("inspect")]
    assert cli.main(["inspect", "m.onnx", "--calib", "c.npz"]) == 0
    assert called.args[:3] == (Path("m.onnx"), ["c.npz"], Settings())


def test_verify_passes_and_fails_by_status(called, capsys):
    assert cli.main(["verify", "a.onnx", "b.onnx", "--tolerance", "0.01"]) == 0
    assert called.args[:4] == (Path("a.onnx"), Path("b.onnx"), None, Settings(tolerance=0.01))
    proof = called.report.verification
    failed = Verification(passed=False, outputs=(output(passed=False, rel=0.5),), noise_floor=proof.noise_floor)
    for verification, message in ((failed, "'logits' by 0.5 (allowed 3e-06)"), (None, "nothing was compared")):
        called.report = report(verification=verification)
        capsys.readouterr()
        assert cli.main(["verify", "a.onnx", "b.onnx"]) == 3
        out, err = capsys.readouterr()
        assert "1 of 2 layers" in out
        assert message in err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("model in.onnx: no"), 2, "error: model in.onnx: no\n"),
        (DeviceError("no cuda"), 2, "error: no cuda\n"),
        (ToleranceError("left"), 3, "error: left\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written\n"),
        (MemoryError(), 2, "error: out of memory; nothing was written. Lower"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), 2, "error: out of memory; nothing was"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: out of memory; nothing was written. Lower"),
        (RuntimeError("no such thing"), 2, "error: internal error: RuntimeError: no such thing; run with"),
        (ValueError("a\nb"), 2, "error: internal error: ValueError: a b; run with --verbose for the traceback\n"),
    ],
)
def test_errors_are_one_message_with_a_status(called, capsys, error, status, message):
    called.raises = error
    assert cli.main(FILES) == status
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert cli.main([*FILES, "--verbose"]) == status
    assert ("Traceback" in capsys.readouterr().err) == (status != 130)


def test_reports_are_written_and_the_page_printed(called, tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    assert cli.main([*FILES, "--report", str(paths[0]), "--report", str(paths[1])]) == 0
    saved = json.loads(paths[0].read_text())
    assert json.loads(paths[1].read_text()) == saved
    tool = saved.pop("tool")
    assert shlex.split(tool.pop("command"))[:3] == ["python", "-m", "onnx_optshift"]
    assert datetime.fromisoformat(tool.pop("finished")).utcoffset() is not None
    expected = called.report.to_dict()
    assert tool == {key: expected["tool"][key] for key in tool}
    del expected["tool"]
    assert saved == expected
    assert capsys.readouterr().out
    assert cli.main([*FILES, "--quiet", "--report", str(paths[0])]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_report_that_fails_late_says_that_the_model_stands(called, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise InputError("--report r.json: cannot be written: full.")

    monkeypatch.setattr("onnx_optshift.report.files.write", fail)
    argv = [*FILES, "--report", str(tmp_path / "r.json")]
    assert cli.main(argv) == 2
    assert "out.onnx was written and verified, its report was not: --report" in capsys.readouterr().err
    assert cli.main([*argv, "--dry-run"]) == 2
    assert "was written and verified" not in capsys.readouterr().err


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_kept_quiet_and_left_as_they_were(called, monkeypatch, capsys, verbose):
    logger = logging.getLogger("onnx_optshift")
    before = (logger.level, list(logger.handlers))

    def noisy(*_):
        warnings.warn("a library's warning", stacklevel=1)
        logger.info("a log line")
        return called.report

    monkeypatch.setattr("onnx_optshift.commands.inspect.inspect", noisy)
    argv = ["inspect", "m.onnx", "--log-level", "info"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        if verbose:
            with pytest.warns(UserWarning, match="a library's"):
                assert cli.main([*argv, "--verbose"]) == 0
        else:
            assert cli.main(argv) == 0
    assert capsys.readouterr().err == "INFO onnx_optshift: a log line\n"
    assert (logger.level, logger.handlers) == before


def test_help_and_version():
    text = capture_help("shift")
    assert text.startswith("usage: onnx-optshift IN OUT [options]")
    assert max(map(len, text.splitlines())) <= 100
    assert all(command in text for command in ("inspect", "verify", "diagnose"))
    for command in ("inspect", "verify"):
        assert command in text
        assert capture_help(command).startswith(f"usage: onnx-optshift {command}")
    for command in ("shift", "inspect", "verify", "diagnose"):
        example = capture_help(command).rstrip().rpartition("\n\nexample:\n  ")[2].split()
        assert example[0] == "onnx-optshift"
        assert parse(example[1:]).command == command
    done = subprocess.run(
        [sys.executable, "-m", "onnx_optshift", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"onnx-optshift {onnx_optshift.__version__}\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_commands_options_values_and_files(tmp_path, capsys):
    assert cli.main(["--print-completion", "bash"]) == 0
    script, folder = tmp_path / "script", tmp_path / "folder"
    script.write_text(capsys.readouterr().out)
    folder.mkdir()
    (folder / "model.onnx").touch()

    def bash(text):
        text = f"source {shlex.quote(str(script))}; {text}"
        return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=True).stdout

    def completed(*words):
        """What is offered for the last of these words."""
        place = f"COMP_WORDS=(onnx-optshift {shlex.join(words)}) COMP_CWORD={len(words)}"
        return set(bash(f"{place}; _shtab_onnx_optshift onnx-optshift; echo ${{COMPREPLY[@]}}").split())

    assert completed("insp") == {"inspect"}
    assert completed("--tol") == {"--tolerance"}
    assert completed("inspect", "--tol") == set()
    assert completed("verify", "--max-d") == {"--max-drift"}
    assert completed("--objective", "") == {"norm", "range", "curvature"}
    assert completed("inspect", "--range-scope", "c") == {"channel"}
    assert completed("inspect", "mod") == completed("--calib", "mod") == {"model.onnx"}
    # Neither a command nor an option: then bash is asked to look for files itself.
    assert completed("mod") == completed("other.onnx", "mod") == set()
    assert " -o default " in bash("complete -p onnx-optshift")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_their_scripts(shell, capsys):
    assert cli.main(["verify", "--print-completion", shell]) == 0
    out = capsys.readouterr().out
    assert {word for word in ("inspect", "diagnose", "tolerance", "max-drift") if word in out} > {"tolerance"}


def test_completion_that_cannot_be_had_says_why(capsys, monkeypatch):
    assert "expected one of bash, " in refused(["--print-completion", "nosh"])
    monkeypatch.setitem(sys.modules, "shtab", None)  # as if it were not installed
    assert cli.main(["--print-completion", "bash"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "pip install 'onnx-optshift[completion]'" in err
    assert err.count("\n") == 1


@pytest.fixture
def slow(monkeypatch):
    """Solving a layer takes long, in comparison to the time after which a run must not be silent."""
    solve = Layers.solve

    def slowly(self, weight, tolerance):
        time.sleep(0.3)
        return solve(self, weight, tolerance)

    monkeypatch.setattr(Layers, "solve", slowly)
    monkeypatch.setattr(progress, "EVERY", 0.1)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_piped_run_is_never_silent_for_long_while_it_solves(quiet, slow, capsys):
    model = Path(__file__).parent.parent / "models" / "digits_mlp" / "model.onnx"
    assert cli.main([str(model), "--dry-run", "--heldout", "none", *quiet * ["--quiet"]]) == 0
    lines = capsys.readouterr().err.splitlines()
    if quiet:
        assert not lines
        return
    stages = [line for line in lines if re.fullmatch(r"(preparation|capture|solve|verify): [\d.]+ s", line)]
    assert list(dict.fromkeys(line.partition(":")[0] for line in stages)) == [
        "preparation", "capture", "solve", "verify"
    ]  # fmt: skip
    # Two or three for each of three layers, and how many of them are solved.
    counts = [re.fullmatch(r"solve: (\d) of 3, [\d.]+ s", line) for line in lines]
    assert {match[1] for match in counts if match} == {"0", "1", "2"}


def test_a_reader_that_goes_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "onnx_optshift", "-h"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_any_name_prints_on_an_ascii_terminal(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "onnx_optshift", "naïve.onnx", "--dry-run", "--device", "ß"],
        env=environment, cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"\\xdf" in done.stderr
    assert b"Traceback" not in done.stderr
