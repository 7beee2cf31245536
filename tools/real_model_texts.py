"""English text that every machine has: what the docstrings of Python and of numpy say."""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
from pathlib import Path

PACKAGES = ("numpy",)
OTHERS = {"site-packages", "test", "tests", "idlelib"}
LARGEST_FILE = 300_000
# Signatures, tables and doctests are no prose.
CODE = re.compile(r"[=>{}\\|]{2}|:param|>>>|\.\. |``|__")


def paragraphs(shortest: int, longest: int) -> list[str]:
    """Different paragraphs of so many characters, in an order that a seed fixes."""
    found = set()
    for path in _sources():
        for text in _docstrings(path):
            for part in re.split(r"\n\s*\n", text):
                words = " ".join(part.split())
                if shortest <= len(words) <= longest and _is_prose(words):
                    found.add(words)
    order = sorted(found)
    random.Random(0).shuffle(order)
    return order


def _is_prose(text: str) -> bool:
    return text[0].isupper() and text.endswith(".") and text.isascii() and not CODE.search(text)


def _sources() -> list[Path]:
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        folders += [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [
        path for folder in folders for path in folder.rglob("*.py") if not OTHERS & set(path.relative_to(folder).parts)
    ]
    return sorted(path for path in files if path.stat().st_size <= LARGEST_FILE)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):  # files that tests of a compiler keep broken
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
