"""The README and the pages it hands over to: commands run, options are the ones there are, modules have their line."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import before_after
import pytest

import onnx_optshift
from onnx_optshift import cli
from onnx_optshift.arguments import COMMANDS, parse, parser_for

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST_LINES = 150
SET_UP = [
    "python3 -m venv .venv && .venv/bin/pip install -c .ci/constraints.txt . && .venv/bin/python -m onnx_optshift ",
    "python3 -m venv .venv && .venv/bin/pip install -c .ci/constraints.txt -e '.[test]' && .venv/bin/python -m pytest",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def lines_of(language):
    return [line for block in blocks(language) for line in block.splitlines() if line.strip()]


def our_commands():
    """Arguments of every command line of ours, without the program."""
    words = [shlex.split(line) for line in lines_of("bash")]
    return [line[line.index("onnx_optshift") + 1 :] for line in words if "onnx_optshift" in line]


def test_it_is_short_and_has_commands_and_programs():
    assert len(README.splitlines()) <= MOST_LINES
    assert len(our_commands()) >= 5
    assert blocks("python")
    assert README.count("```") == 2 * len(re.findall(r"^```\w+$", README, re.MULTILINE)), "a block names no language"


def test_set_up_is_two_commands():
    found = [line for line in lines_of("bash") if "venv" in line]
    assert len(found) == 2
    assert found[0].startswith(SET_UP[0])
    assert found[1] == SET_UP[1]
    assert SET_UP[1] in CONTRIBUTING


def test_ci_takes_the_second_set_up_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    _, install, test = SET_UP[1].split(" && ")
    for command in (install, test):
        binary, _, arguments = command.partition(" ")
        assert f'"$bin/{Path(binary).name}" {arguments}' in script.replace(" --quiet", "")


@pytest.mark.parametrize("argv", our_commands(), ids=" ".join)
def test_commands_parse(argv, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse(argv).command in COMMANDS


def test_the_first_command_shows_a_gain_worth_showing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    model, out, *rest = our_commands()[0]
    assert Path(out).suffix == ".onnx"
    assert cli.main([model, str(tmp_path / "out.onnx"), *rest]) == 0
    assert (tmp_path / "out.onnx").stat().st_size == Path(model).stat().st_size
    printed = capsys.readouterr().out
    assert "Verified" in printed
    before, after = re.search(r"^held-out accuracy +(\S+) -> (\S+) %", printed, re.MULTILINE).groups()
    assert float(after) > float(before) + 5


def test_programs_compile_and_name_what_exists():
    for program in blocks("python"):
        compile(program, "README.md", "exec")
        for name in re.findall(r"onnx_optshift\.(\w+)", program):
            assert name in onnx_optshift.__all__


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def same(shown, printed, rel=0.1):
    """Whether two lines differ in nothing but figures, and in these by little: another processor rounds otherwise."""
    if NUMBER.sub("#", " ".join(shown.split())) != NUMBER.sub("#", " ".join(printed.split())):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    # Percentages of change are differences of two figures: three points more.
    return all(float(a) == pytest.approx(float(b), rel=rel, abs=3 if abs(float(a)) > 1 else 0) for a, b in pairs)


@pytest.mark.slow
def test_the_annotated_run_is_what_is_printed(tmp_path):
    (block,) = [block for block in blocks("text") if block.startswith("$ python")]
    command, *shown = block.splitlines()
    words = shlex.split(command.removeprefix("$ python "))
    assert "..." in shown
    (tmp_path / "models").symlink_to(ROOT / "models")
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=wide, capture_output=True, text=True, check=True)
    printed = iter(done.stdout.splitlines())
    # In the same order, with nothing left out but where it says so.
    skipping = False
    for line in shown:
        if line == "...":
            skipping = True
            continue
        found = next(printed)
        while skipping and not same(line, found):
            found = next(printed)
        assert same(line, found), f"{line}\n{found}"
        skipping = False


def test_lines_are_compared_by_words_and_figures():
    assert same("error  0.087 -> 0.0395 (-55 %)", "error 0.0869 -> 0.040 (-54 %)")
    assert not same("error  0.087 -> 0.0395 (-55 %)", "error 0.0869 -> 0.060 (-31 %)")
    assert not same("layers shifted  8 of 8", "layers left  8 of 8")


def test_the_picture_shows_the_figures_that_it_describes():
    picture = before_after.PICTURE.read_text(encoding="utf-8")
    figures = before_after.figures_of(picture)
    assert len(figures) == 12
    shown = [float(value) for value in re.findall(r'class="value"[^>]*>([\d.]+)<', picture)]
    accuracies, errors = shown[1:7], shown[7:]
    described = [100 * figures[k] for k in (0, 1, 4, 5, 8, 9)], [figures[k] for k in (2, 3, 6, 7, 10, 11)]
    assert (accuracies, errors) == (pytest.approx(described[0]), pytest.approx(described[1]))
    assert "prefers-color-scheme: dark" in picture
    assert before_after.PICTURE.relative_to(ROOT).as_posix() in README


def test_figures_of_a_picture_are_read_as_written():
    described = '<desc id="d">4 bits: accuracy 95.0 to 95.5 %, error 0.083 to 0.036</desc>'
    assert before_after.figures_of(described) == pytest.approx([0.95, 0.955, 0.083, 0.036])
    assert before_after.figures_of("<svg/>") == []


@pytest.mark.slow
def test_the_picture_is_what_runs_give_now(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["before_after.py", "--check"])
    assert before_after.main() == 0


def listed_options(text):
    """Commands by option, of the rows of tables: an option may have other names in brackets."""
    rows = re.findall(r"^\| (`-[^|]*(?:\\\|[^|]*)*) \| ([a-z, ]+) \|", text, re.MULTILINE)
    found = {}
    for names, commands in rows:
        which = set(COMMANDS) if commands == "all" else set(commands.split(", "))
        found |= dict.fromkeys(re.findall(r"`(--?[a-z][a-z-]*)", names), which)
    return found


def test_options_are_the_ones_there_are():
    known = {}
    for command in COMMANDS:
        for action in parser_for(command)._actions:
            for option in action.option_strings:
                known.setdefault(option, set()).add(command)
    assert listed_options(OPTIONS) == {name: which for name, which in known.items() if name not in {"-h", "--help"}}


def test_options_are_read_as_written():
    text = "| `--a X\\|Y` (`-a`) | all | b |\n| `--c` | shift, verify | `--d` |\n"
    assert listed_options(text) == {"--a": set(COMMANDS), "-a": set(COMMANDS), "--c": {"shift", "verify"}}


def test_exit_statuses_are_listed():
    rows = re.findall(r"^\| (\d+) \|", PROMISES, re.MULTILINE)
    assert rows == ["0", "2", "3", "130", "143"]


def listed_modules(text):
    return re.findall(r"^- `([^`]+\.py)`: \S", text, re.MULTILINE)


def test_one_line_per_module():
    tree = [*(ROOT / "onnx_optshift").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    # A sub-package's own file holds a docstring only (tests/test_layering.py).
    modules = {
        str(path.relative_to(ROOT))
        for path in tree
        if path.name != "__init__.py" or path.parent.name == "onnx_optshift"
    }
    assert sorted(listed_modules(CONTRIBUTING.partition("\n## One line per module\n")[2])) == sorted(modules)


def test_module_list_is_read_as_written():
    assert listed_modules("- `a/b.py`: does b\n- `c.py`:\n- c.py: no\n") == ["a/b.py"]


def test_files_that_contributing_names_exist():
    named = set(re.findall(r"`(?:python )?([\w/]+\.py)\b", CONTRIBUTING.partition("\n## One line per module\n")[0]))
    assert len(named) > 20
    files = named - {"solve/NAME.py"}  # stands for any
    places = (ROOT, ROOT / "onnx_optshift", ROOT / "tools")
    assert [name for name in sorted(files) if not any((place / name).exists() for place in places)] == []


def test_every_page_is_linked():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} | {"CONTRIBUTING.md"}
    links = set(re.findall(r"\]\((?!https?://)([^)#]+)", README))
    assert pages <= links
    assert [link for link in links if not (ROOT / link).exists()] == []
