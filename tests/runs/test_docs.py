"""The Python in README and docs runs: the blocks of a page one after the other, as a reader would."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from jprune.cli.prune import Prune

main = importlib.import_module("jprune.cli.main")  # the package has a function of this name

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run[^\n]*-->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Whether it is run, and the code, of every block; blank lines in front keep the line numbers of the page."""
    text = page.read_text(encoding="utf-8")
    return [(not m[1], "\n" * text.count("\n", 0, m.start(2)) + m[2]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_of_the_docs_runs(page, capsys):
    names = {"__name__": "docs"}
    for run, code in blocks(page):
        program = compile(code, str(page), "exec")
        if run:
            exec(program, names)
    if page.name == "README.md":  # shows what it prints
        printed = capsys.readouterr().out
        assert printed
        assert f"```text\n{printed}```" in page.read_text(encoding="utf-8")


def test_commands_of_the_docs_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    for recipe in re.findall(r"^```toml\n# (\S+)\n", text, re.MULTILINE):
        Path(recipe).write_text(re.search(rf"# {recipe}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1])
    Path("pruned").mkdir()
    Path("pruned/jprune.json").write_text(json.dumps({"recipe": {"method": "sparsegpt", "samples": 8}}))
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^(?:.*&& )?jprune (.*)$", shell, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        name, words = main._find(shlex.split(line, comments=True))
        command = main._parse(name, words)
        if isinstance(command, Prune) and "--recipe" not in words:
            assert command.pattern.made()
