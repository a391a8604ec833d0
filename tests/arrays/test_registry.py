"""The list of methods: each is where the list says, named as it says, and reading the list imports none of them."""

import pathlib
import re
import subprocess
import sys

import pytest

from jprune.methods import Method
from jprune.pipeline import registry

ROOT = pathlib.Path(__file__).parents[2]
LISTED = registry.PRUNERS | registry.TUNERS


@pytest.mark.parametrize("name", LISTED)
def test_each_is_where_the_list_says(name):
    method = LISTED[name]
    module, _, member = LISTED.place(name).partition(":")
    assert (method.__module__, method.__qualname__) == (module, member), "name the module that defines it"
    assert LISTED.summary(name) == method.__doc__.splitlines()[0]


@pytest.mark.parametrize("name", [name for name in LISTED if isinstance(LISTED[name], type)])
def test_a_method_is_called_by_its_name(name):
    # Not by its constructor, which may want an option.
    assert registry.name_of(object.__new__(LISTED[name])) == name
    assert registry.name_of(object.__new__(type("Mine", (LISTED[name],), {}))) == "Mine"


def test_what_is_not_listed_is_called_by_its_class():
    assert registry.name_of(object()) == "object"
    assert issubclass(registry.ONE_SHOT["wanda"], Method)
    with pytest.raises(KeyError):
        LISTED["wandb"]


def test_the_readme_has_a_row_for_every_pruner():
    table = re.search(r"^## Methods\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| `([a-z-]+)` \|", table[1], re.MULTILINE)
    assert sorted(rows) == sorted(registry.PRUNERS)
    for name in registry.TUNERS:
        assert f"`jprune tune {name}`" in table[1]


def test_reading_the_list_imports_no_method():
    program = (
        "import sys, jprune; before = set(sys.modules); from jprune.pipeline import registry; "
        "names = [(n, registry.PRUNERS.summary(n)) for n in registry.PRUNERS]; "
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('jprune')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['jprune.pipeline', 'jprune.pipeline.registry']"
