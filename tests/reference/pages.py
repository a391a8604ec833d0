"""The pages of the docs, and the Python in them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = {"your-own-code.md"}
"""Pages whose code takes long to compile."""
BLOCK = re.compile(r"(<!-- not run[^\n]*-->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Whether it is run, and the code, of every block; blank lines in front keep the line numbers of the page."""
    text = page.read_text(encoding="utf-8")
    return [(not m[1], "\n" * text.count("\n", 0, m.start(2)) + m[2]) for m in BLOCK.finditer(text)]


def run(page: Path) -> dict[str, Any]:
    """Runs the blocks of a page one after the other, as a reader would; returns what they have defined."""
    names: dict[str, Any] = {"__name__": "docs"}
    for is_run, code in blocks(page):
        program = compile(code, str(page), "exec")
        if is_run:
            exec(program, names)
    return names
