"""The Python in README and docs runs, and its commands parse; what takes long to compile is in tests/faults."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pages
import pytest

from jprune.cli.prune import Prune

main = importlib.import_module("jprune.cli.main")  # the package has a function of this name


@pytest.mark.parametrize(
    "page", [p for p in pages.PAGES if pages.blocks(p) and p.name not in pages.LONG], ids=lambda p: p.name
)
def test_python_of_the_docs_runs(page, capsys):
    pages.run(page)
    if page.name == "README.md":  # shows what it prints
        printed = capsys.readouterr().out
        assert printed
        assert f"```text\n{printed}```" in page.read_text(encoding="utf-8")


def test_commands_of_the_docs_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(p.read_text(encoding="utf-8") for p in pages.PAGES)
    for recipe in re.findall(r"^```toml\n# (\S+)\n", text, re.MULTILINE):
        Path(recipe).write_text(re.search(rf"# {recipe}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1])
    Path("pruned").mkdir()
    Path("pruned/jprune.json").write_text(json.dumps({"recipe": {"method": "sparsegpt", "samples": 8}}))
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^(?:.*&& )?jprune (.*)$", shell, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        name, words = main._find(shlex.split(line, comments=True))
        command = main.parse(name, words)
        if isinstance(command, Prune) and "--recipe" not in words:
            assert command.pattern.made()
