"""What the tools behind docs/performance.md share: its sections, its pictures, and models in processes of their own.

Everything between two comments of the page, `<!-- NAME -->` and `<!-- end of NAME -->`, is written by a tool.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"


def put(section: str, text: str) -> None:
    """Replaces one section of the page.

    Raises:
        SystemExit: The page has no such section.
    """
    page = PAGE.read_text(encoding="utf-8")
    found = re.compile(rf"(<!-- {section} -->\n).*?(<!-- end of {section} -->)", re.DOTALL)
    if not found.search(page):
        raise SystemExit(f"{PAGE}: no section {section!r}: expected <!-- {section} --> ... <!-- end of {section} -->")
    PAGE.write_text(found.sub(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", page), encoding="utf-8")


def picture(name: str, text: str) -> None:
    """Writes a picture of the page, `docs/performance_NAME.svg`."""
    (DOCS / f"performance_{name}.svg").write_text(text, encoding="utf-8")


def make_model(name: str, folder: Path, samples: int, sizes: Mapping[str, int] | None = None) -> None:
    """Writes a model of `bench_models.py` and its data, by a process of its own: callers stay small."""
    words = [str(Path(__file__).with_name("bench_models.py")), name, str(folder), str(samples), json.dumps(sizes or {})]
    subprocess.run([sys.executable, *words], check=True)
