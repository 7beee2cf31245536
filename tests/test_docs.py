"""The documents: every command in them parses, and runs; translations show the same commands; links lead somewhere."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import rounding_table

from onnx_optshift.arguments import COMMANDS, parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What sets up an environment is tested by setting one up, in CI.
SET_UP = re.compile(r"\bpip install\b|-m venv\b|\.ci/run\b")


def bash_blocks(text):
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(path):
    """Every command line of a document that does not set up an environment."""
    lines = [line for block in bash_blocks(path.read_text(encoding="utf-8")) for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#") and not SET_UP.search(line)]


WITH_COMMANDS = [path for path in DOCUMENTS if command_lines(path)]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_guides_have_commands():
    assert {"README.md", "guide.md", "guide.ja.md"} <= {path.name for path in WITH_COMMANDS}


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_our_commands_parse(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ours = [words for words in map(shlex.split, command_lines(path)) if words[:3] == ["python", "-m", "onnx_optshift"]]
    assert ours or path.parent.name == "docs"
    assert {parse(words[3:]).command for words in ours} <= set(COMMANDS)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.*.md")), ids=name_of)
def test_translations_show_the_same_commands_and_figures(path):
    original = path.with_name(path.name.split(".")[0] + ".md").read_text(encoding="utf-8")
    translated = path.read_text(encoding="utf-8")
    assert bash_blocks(translated) == bash_blocks(original)
    for pattern in (r"\d+\.\d\d %", r"\| 0\.\d{3}", r"^#+ ", r"^- \[ \]", r"^\|---"):
        found = [re.findall(pattern, text, re.MULTILINE) for text in (original, translated)]
        assert found[0] == found[1], pattern
        assert found[0]


def headings(path):
    """Anchors of a document's headings, as they are made on the web: lower case, no signs, dashes for spaces."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8"))
    found = [(path.parent / target if target else path, place) for target, place in links]
    assert [target for target, _ in found if not target.exists()] == []
    assert [(target, place) for target, place in found if place and place not in headings(target)] == []


def test_set_up_is_told_from_use():
    assert SET_UP.search("python3 -m venv .venv && .venv/bin/pip install .")
    assert not SET_UP.search("python -m onnx_optshift in.onnx out.onnx --calib pip.npz")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory as after a clone, with the files that the README's examples call their own."""
    for folder in ("models", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = ROOT / "models" / "digits_mlp"
    model = onnx.load(source / "model.onnx")
    # The README leaves out what is called head.
    last = model.graph.node[-1]
    old, last.input[1] = last.input[1], "head.weight"
    next(tensor for tensor in model.graph.initializer if tensor.name == old).name = "head.weight"
    onnx.save(model, tmp_path / "in.onnx")
    for name in ("calibration", "heldout"):
        shutil.copy(source / f"{name}.npz", tmp_path)
    with np.load(source / "calibration.npz") as data:
        for name, part in (("a", slice(0, None, 2)), ("b", slice(1, None, 2))):
            np.savez(tmp_path / f"{name}.npz", **{key: data[key][part] for key in data})
    # Blocks of Python that begin with a file name are that file.
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for name, program in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            (tmp_path / name).write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def installed(words):
    """Whether a command can be run here: other tools' commands only where they are installed."""
    beside = Path(sys.executable).with_name(words[0]).exists()
    return words[0] == "python" or beside or importlib.util.find_spec(words[0]) is not None


def run(line):
    words = shlex.split(line)
    # Beside the interpreter, as its packages put them; the environment need not be an active one.
    program = sys.executable if words[0] == "python" else str(Path(sys.executable).with_name(words[0]))
    command = [program, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def unmeasured(text, printed):
    """Figures of a document's tables (per cent of answers, losses) that no tool has printed, or printed otherwise."""
    cells = re.findall(r"\| (\d+\.\d\d)(?= %)|\| (0\.\d{3})(?= \|)", text)
    shown = {float(percent or loss) for percent, loss in cells}
    assert shown
    found = [float(number) for number in re.findall(r"\d+\.\d+", printed)]
    # One answer in four hundred, and a loss by as much as another processor's rounding moves it.
    return [a for a in sorted(shown) if not any(abs(a - b) <= (0.26 if a > 1 else 0.01) for b in found)]


def test_figures_that_were_not_measured_are_noticed():
    text = "| a | 84.67 % | 0.796 |\n| b | 91.46 % | 0.351 |\n"
    assert unmeasured(text, "model.onnx 84.67% 0.7957 | 91.71 | 0.3512") == []
    assert unmeasured(text, "model.onnx 84.67% 0.7957 | 92.71 | 0.3912") == [0.351, 91.46]


@pytest.mark.slow
# A translation has the commands of its original.
@pytest.mark.parametrize("path", [path for path in WITH_COMMANDS if path.name.count(".") == 1], ids=name_of)
def test_commands_run_in_order(path, clone):
    printed, ran = [], [line for line in command_lines(path) if installed(shlex.split(line))]
    for line in ran:
        done = run(line)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    assert printed
    if path.name == "guide.md":
        assert {"shifted.onnx", "shifted.html", "shifted.json", "narrow.onnx"} <= {p.name for p in clone.iterdir()}
        measured = [out for line, out in zip(ran, printed, strict=True) if line.startswith("python tools/")]
        assert unmeasured(path.read_text(encoding="utf-8"), "\n".join(measured)) == []


@pytest.mark.slow
def test_the_readmes_program_runs(clone):
    (program,) = re.findall(
        r"^```python\n(.*?)^```", DOCUMENTS[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "layers" in done.stdout
    assert (clone / "out.onnx").exists()


@pytest.mark.slow
def test_a_command_that_fails_is_noticed(clone):
    assert run("python -m onnx_optshift in.onnx out.onnx --calib nowhere.npz").returncode == 2
    assert run("python -m onnx_optshift verify in.onnx models/digits_cnn/model.onnx").returncode == 2


@pytest.mark.slow
def test_the_quantization_table_is_what_its_script_finds():
    page = rounding_table.PAGE.read_text(encoding="utf-8")
    for line in rounding_table.lines("digits_mlp", None):
        head = " | ".join(line.split(" | ")[:2])
        (written,) = [row for row in page.splitlines() if row.startswith(head)]
        found, said = (re.findall(r"\d+\.\d+", row.partition(head)[2]) for row in (line, written))
        np.testing.assert_allclose([float(x) for x in said], [float(x) for x in found], rtol=0.05, atol=0.002)
