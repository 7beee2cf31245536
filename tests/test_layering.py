"""Imports run one way, and each library stays behind the border that it belongs to."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "onnx_optshift"

# A row may import from rows above it; entries of one row never import each other. An entry that is a directory is
# its whole sub-package, whose modules may import each other.
ROWS = [
    ["errors"],
    ["journal", "launcher"],
    ["geometry", "report.diagnosis", "report.progress", "tensorfile", "write.atomic"],
    ["report", "settings", "isolation", "completion"],
    ["options"],
    ["graph", "calibration", "stats", "quantize"],
    ["write", "capture", "solve", "prove.compare", "prove.static"],
    ["run", "arguments"],
    ["prove"],
    ["decide"],
    ["diagnosis"],
    ["report.build"],
    ["commands"],
    ["api", "cli"],
    ["__init__"],
    ["torch"],
    ["integrations", "__main__"],
]
# Who may import which library, anywhere in the module.
BORDERS = {
    "torch": {"capture", "stats", "solve", "quantize", "run", "decide", "diagnosis", "torch"},
    "onnxruntime": {"capture.session"},
    "onnx_graphsurgeon": {"graph"},
    "onnx": {
        "graph",
        "calibration",
        "write",
        "prove.static",
        "prove.floor",
        "run.prepare",
        "commands",
        "api",
        "integrations",
    },
    "psutil": {"run.budget"},
    "jinja2": {"report.htmlpage"},
    "rich": {"report.terminal", "report.progress"},
    "shtab": {"completion"},
    "olive": {"integrations"},
    "polygraphy": {"integrations"},
    "transformers": {"integrations"},
    "lightning": {"integrations"},
}
LEVELS = {name: level for level, row in enumerate(ROWS) for name in row}


def modules():
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def entry(module):
    """The row entry that a module belongs to: the longest prefix that is one."""
    parts = module.split(".")
    prefixes = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LEVELS), None)


def imported(source, known):
    """Modules of the package, and names of libraries, that a source imports, under `if` and in functions too."""
    ours, libraries = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "onnx_optshift":
            names = [f"onnx_optshift.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which row they reach"
            # A module imported from its sub-package, or a name from a module.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("onnx_optshift.") in known else node.module for name in full]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "onnx_optshift":
                ours.add(rest if rest in known else "__init__")
            else:
                libraries.add(top)
    return ours, libraries


def violations(module, source, known):
    here = entry(module)
    ours, libraries = imported(source, known)
    for target in sorted(ours):
        there = entry(target)
        allowed = there is not None and (there == here or LEVELS[there] < LEVELS[here])
        if not allowed and target != "__init__":
            yield f"{module} imports {target}"
    for library, owners in BORDERS.items():
        if library in libraries and not any(module == o or module.startswith(f"{o}.") for o in owners):
            yield f"{module} imports {library}"


def test_every_module_has_a_row():
    homeless = [module for module in modules() if entry(module) is None]
    assert not homeless


def test_every_row_entry_exists():
    missing = [name for name in LEVELS if not any(m == name or m.startswith(f"{name}.") for m in modules())]
    assert not missing


def test_imports_run_one_way():
    known = modules()
    found = [
        line for module, path in known.items() for line in violations(module, path.read_text(encoding="utf-8"), known)
    ]
    assert not found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graph.conv", "from onnx_optshift.solve.shift import Shift"),
        ("graph.conv", "from onnx_optshift.calibration import source"),
        ("graph.conv", "import torch"),
        ("stats.rows", "def f():\n    import onnxruntime"),
        ("solve.shift", "from onnx_optshift.capture.session import Session"),
        ("errors", "import onnx_optshift.geometry"),
        ("report.terminal", "if TYPE_CHECKING:\n    from onnx_optshift import api"),
    ],
)
def test_violations_are_noticed(module, source):
    assert list(violations(module, source, modules()))


def test_allowed_imports_pass():
    source = (
        "import torch\nfrom onnx_optshift.stats.moments import InputMoments\nfrom onnx_optshift.solve import spectrum"
    )
    assert not list(violations("solve.shift", source, modules()))


def test_subpackages_re_export_nothing():
    for path in PACKAGE.glob("*/__init__.py"):
        if path.parent.name == "torch":
            continue  # what users of it import, as from the package itself
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{path.parent.name} holds more than a docstring"
        assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("argv", [["-h"], ["inspect", "-h"], ["verify", "-h"], ["--version"], ["--tolerence"]])
def test_help_loads_neither_torch_nor_onnxruntime(argv):
    code = (
        f"import sys; from onnx_optshift.cli import main; main({argv}); "
        "print('loaded:', *sorted({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1].strip() == "loaded:"
