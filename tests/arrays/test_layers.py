"""The house stands: imports point down.

Floors and rooms are those of the design. Every import counts: at the top of a module, inside functions, and for type
checkers only, because what may not be known may not be known there either.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

FLOORS = [
    ["__main__"],
    ["cli"],
    ["pipeline"],
    ["evaluate", "data", "checkpoints"],
    ["models"],
    ["train", "structured", "sparse"],
    ["methods"],
    ["trace", "solvers"],
]
GROUND = ["devices", "patterns", "masks", "scores", "statistics", "trees", "errors"]
"""Modules of one room: they may know each other, but not in a circle."""
FLOOR = {room: level for level, rooms in enumerate([*FLOORS, GROUND]) for room in rooms}


def modules(package: str) -> dict[str, pathlib.Path]:
    """All modules of a package, by dotted name."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imported(name: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> list[tuple[int, str]]:
    """(line, module) of every import of a module; of `from a import b`, a.b where that is a known module, else a."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                found.append((node.lineno, inside if inside in known else base))
    return found


JPRUNE = modules("jprune")


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("name", [name for name in JPRUNE if name != "jprune"])
def test_imports_point_down(name):
    assert room(name) in FLOOR, f"{name} is in none of the rooms of the design"
    wrong = []
    for line, module in imported(name, JPRUNE[name], JPRUNE):
        if module == "jprune":
            wrong.append(f"line {line}: imports the public names, and so everything; import the module itself")
        elif module.startswith("jprune.") and room(module) != room(name):
            same_room = room(module) in GROUND and room(name) in GROUND
            if not same_room and FLOOR[room(module)] <= FLOOR[room(name)]:
                wrong.append(f"line {line}: {room(name)} must not import {module}")
        elif module.split(".")[0] in ("tests", "scripts", "torch"):
            wrong.append(f"line {line}: the library never imports {module}")
        elif module.split(".")[0] == "pallas_kernels" and room(name) not in ("sparse", "pipeline", "cli"):
            wrong.append(f"line {line}: only sparse execution uses the kernels")
    assert not wrong, f"{JPRUNE[name].relative_to(ROOT)}\n" + "\n".join(wrong)


def test_modules_do_not_import_in_circles():
    """Imports inside functions left out: those are how a module may be read late."""
    graph = {}
    for name, path in JPRUNE.items():
        tree = ast.parse(path.read_text())
        top = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        graph[name] = {m for line, m in imported(name, path, JPRUNE) if line in top and m in JPRUNE and m != name}
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " imports ".join([*above[above.index(name) :], name])
        if name not in done:
            for module in sorted(graph[name]):
                visit(module, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


KERNELS = modules("pallas_kernels")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_stand_alone(name):
    allowed = {"jax", "jaxlib", "jax_triton", "jaxtyping", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    roots = {module.split(".")[0] for _, module in imported(name, KERNELS[name], KERNELS)}
    assert roots <= allowed, f"{name} imports {sorted(roots - allowed)}"


def test_the_walk_sees_every_kind_of_import(tmp_path):
    """The test above would pass if it saw nothing."""
    path = tmp_path / "x.py"
    path.write_text(
        "import jprune.data\nfrom jprune import trees, NM\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from jprune.cli.main import main\n"
        "def f():\n    from . import y\n    from ..methods import prune\n"
    )
    seen = [module for _, module in sorted(imported("jprune.models.x", path, {"jprune.trees": path}))]
    assert seen == [
        "jprune.data",
        "jprune",
        "jprune.trees",
        "typing",
        "jprune.cli.main",
        "jprune.models",
        "jprune.methods",
    ]
