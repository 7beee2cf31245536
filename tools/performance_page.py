"""The sections of docs/performance.md that tools write: everything between two comments is theirs."""

from __future__ import annotations

import re
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
