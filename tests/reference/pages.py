"""The pages of the docs, and the Python in them."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = "foreign-models.md"
LONG = {"your-own-code.md", FOREIGN}
"""Pages whose code takes long to compile."""
BLOCK = re.compile(r"(?:<!-- (not run|needs (\S+))[^\n]*-->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str | None, str | None, str]]:
    """Of every block what is said of running it, what it needs, and the code with the line numbers of the page."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], m[2], "\n" * text.count("\n", 0, m.start(3)) + m[3]) for m in BLOCK.finditer(text)]


def installed(needed: str) -> bool:
    """Whether there is such a package, and in it the name behind the dot."""
    package, _, name = needed.partition(".")
    if importlib.util.find_spec(package) is None:
        return False
    return not name or hasattr(importlib.import_module(package), name)


def run(page: Path) -> dict[str, Any]:
    """Runs the blocks of a page one after the other, as a reader would; returns what they have defined.

    Those whose packages are not installed are left out.
    """
    names: dict[str, Any] = {"__name__": "docs"}
    promotion = "standard" if page.name == FOREIGN else "strict"  # other libraries are not as strict as our tests
    for said, needed, code in blocks(page):
        program = compile(code, str(page), "exec")
        if not said or (needed and installed(needed)):
            with jax.numpy_dtype_promotion(promotion):
                exec(program, names)
    return names
