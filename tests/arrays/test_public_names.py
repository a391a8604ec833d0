"""What `import jprune` offers, that it costs nothing, and that the docs need nothing else."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import jprune

ROOT = pathlib.Path(__file__).parents[2]
PUBLIC = pathlib.Path(jprune.__file__)
JAX = ("jax", "jaxlib", "numpy", "jaxtyping", "optax")
FILES_AND_WORDS = ("flax", "transformers", "torch", "tyro", "rich", "gguf", "orbax", "datasets", "tokenizers")
FILES_AND_WORDS += ("huggingface_hub", "safetensors", "grain", "jinja2", "jprune.checkpoints", "jprune.pipeline")


@pytest.mark.parametrize(
    ("use", "absent"),
    [
        ("jprune", (*JAX, *FILES_AND_WORDS)),
        ("jprune.prune, jprune.observe, jprune.SparseGPT(), jprune.gradual", FILES_AND_WORDS),
    ],
)
def test_import_is_light(use, absent):
    program = f"import sys, jprune; {use}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_names_are_where_they_are_said_to_be():
    for name, module in jprune._LAZY.items():
        assert getattr(jprune, name) is getattr(importlib.import_module(module), name)
    for name, module in jprune._MODULES.items():
        assert getattr(jprune, name) is importlib.import_module(module)
    assert {*jprune._LAZY, *jprune._MODULES} <= set(dir(jprune))
    with pytest.raises(AttributeError, match="has no attribute 'prune_it'"):
        _ = jprune.prune_it


def test_type_checkers_are_told_what_is_there():
    block = re.search(r"if TYPE_CHECKING:.*\n((?:    .*\n)+)", PUBLIC.read_text())
    assert block is not None
    told = {name: module for module, name in re.findall(r"from (\S+) import (\w+) as \2$", block[1], re.MULTILINE)}
    modules = {name: module.rpartition(".")[0] for name, module in jprune._MODULES.items()}
    assert told == jprune._LAZY | modules


def test_docs_import_public_names_only():
    # add-a-... are about files inside the library, which import as those do.
    docs = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not page.name.startswith("add-a-")]
    pages = [ROOT / "README.md", *docs]
    deep = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in pages
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if re.match(r"\s*(from|import) jprune\.", line)
    ]
    assert not deep
