"""The README: its commands parse and run, its options are the ones there are, and it names every module."""

import re
import shlex
from pathlib import Path

import pytest

import onnx_optshift
from onnx_optshift import cli
from onnx_optshift.arguments import COMMANDS, parse, parser_for

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = [
    "python3 -m venv .venv && .venv/bin/pip install -c .ci/constraints.txt . && .venv/bin/python -m onnx_optshift ",
    "python3 -m venv .venv && .venv/bin/pip install -c .ci/constraints.txt -e '.[test]' && .venv/bin/python -m pytest",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(title):
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def lines_of(language):
    return [line for block in blocks(language) for line in block.splitlines() if line.strip()]


def our_commands():
    """Arguments of every command line of ours, without the program."""
    words = [shlex.split(line) for line in lines_of("bash")]
    return [line[line.index("onnx_optshift") + 1 :] for line in words if "onnx_optshift" in line]


def test_there_are_commands_and_programs():
    assert len(our_commands()) >= 5
    assert len(blocks("python")) >= 2
    assert README.count("```") == 2 * len(re.findall(r"^```\w+$", README, re.MULTILINE)), "a block names no language"


def test_set_up_is_two_commands():
    found = [line for line in lines_of("bash") if "venv" in line]
    assert len(found) == 2
    assert found[0].startswith(SET_UP[0])
    assert found[1] == SET_UP[1]


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


def test_the_first_command_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    model, out, *rest = our_commands()[0]
    assert not rest
    assert Path(out).suffix == ".onnx"
    assert cli.main([model, str(tmp_path / "out.onnx")]) == 0
    assert (tmp_path / "out.onnx").stat().st_size == Path(model).stat().st_size
    assert "Verified" in capsys.readouterr().out


def test_programs_compile_and_name_what_exists():
    for program in blocks("python"):
        compile(program, "README.md", "exec")
        for name in re.findall(r"onnx_optshift\.(\w+)", program):
            assert name in onnx_optshift.__all__


def test_options_are_the_ones_there_are():
    actions = [action for command in COMMANDS for action in parser_for(command)._actions]
    known = {option for action in actions for option in action.option_strings} - {"-h", "--help"}
    table = section("Use").partition("### Options")[2]
    listed = set(re.findall(r"`(--?[a-z][a-z-]*)", table))
    assert listed - {"-h"} == known


def test_exit_statuses_are_listed():
    rows = re.findall(r"^\| (\d+) \|", section("What is promised"), re.MULTILINE)
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
    listed = listed_modules(section("One line per module"))
    assert sorted(listed) == sorted(modules)


def test_module_list_is_read_as_written():
    assert listed_modules("- `a/b.py`: does b\n- `c.py`:\n- c.py: no\n") == ["a/b.py"]


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
