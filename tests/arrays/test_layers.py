"""The house stands: imports point down.

Floors and rooms are those of the design. Every import counts: at the top of a module, inside functions, and for type
checkers only, because what may not be known may not be known there either.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

FLOORS = [
    ["__main__"],
    ["cli"],
    ["pipeline"],
    ["tuning"],
    ["anatomy", "data", "runs"],
    ["evaluate", "checkpoints"],
    ["sparse", "bridge"],
    ["models"],
    ["train", "structured"],
    ["scores", "allocations"],
    ["methods"],
    ["trace", "solvers"],
]
GROUND = [
    *("patterns", "masks", "counts", "statistics", "sorted_rows", "cross_gram", "weighting", "evidence", "places"),
    "positions",
    *("trees", "devices", "errors", "paths", "settings", "annotations", "packages", "texts"),
]
"""Modules of one room: they may know each other, but not in a circle."""
FLOOR = {room: level for level, rooms in enumerate([*FLOORS, GROUND]) for room in rooms}

PIPELINE = {
    "rounds": {"oneshot", "training", "forecast", "recipe"},
    "auto": {"recipe"},
    "compare": {"tasks"},
    "page": {"compare"},
    "sweep": {"auto", "compare", "oneshot", "recipe"},
    "tasks": set(),
    "oneshot": {"auto", "forecast", "job", "recipe"},
    "forecast": {"job", "recipe"},
    "job": {"auto", "recipe"},
    "recipe": set(),
    "training": set(),
    "shrink": {"oneshot", "forecast", "job", "recipe"},
    "pack": set(),
    "registry": {"auto", "oneshot", "training", "shrink", "rounds"},
    "options": set(),
    "": {"oneshot", "rounds", "recipe"},
}
"""Whom each room of the pipeline may know, beside `options` and `registry`."""
BLIND = {"runs": {"methods", "solvers", "structured", "patterns", "masks", "scores", "statistics", "train", "trace"}}
"""Rooms that must not know others though these lie below: a run knows no method and no pattern."""

LINES, BODY, PARAMETERS = 350, 60, 12
"""The most that a file, the body of a function and a signature have."""
LONG: dict[str, str] = {}
"""Files that may be longer, and why."""
WIDE = {
    "jprune.structured.function.shrink_function": "each is a question of its own; there is no run with options to ask",
    "jprune.train.loop.train": "a loop is given functions one by one; who calls it has dataclasses of options",
}
"""Functions that may be longer or take more, and why."""


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
            blind = room(module) in BLIND.get(room(name), ())
            if blind or (not same_room and FLOOR[room(module)] <= FLOOR[room(name)]):
                wrong.append(f"line {line}: {room(name)} must not import {module}")
        elif module.split(".")[0] in ("tests", "scripts"):
            wrong.append(f"line {line}: the library never imports {module}")
        elif module.split(".")[0] in ("torch", "torchax") and room(name) != "bridge":
            wrong.append(f"line {line}: only the bridge knows {module}")
        elif module.startswith("jprune.bridge.") and room(name) != "bridge":
            wrong.append(f"line {line}: the bridge has one door, jprune.bridge itself")
        elif module.split(".")[0] == "pallas_kernels" and room(name) not in ("sparse", "pipeline", "cli"):
            wrong.append(f"line {line}: only sparse execution uses the kernels")
        elif module.split(".")[0] == "jaxtyping" and name != "jprune.annotations":
            wrong.append(f"line {line}: take it from jprune.annotations; jaxtyping need not be there")
    assert not wrong, f"{JPRUNE[name].relative_to(ROOT)}\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in JPRUNE if name.startswith("jprune.pipeline")])
def test_rooms_of_the_pipeline(name):
    def inner(module: str) -> str:
        return ".".join(module.split(".")[2:3])

    allowed = PIPELINE[inner(name)] | {"options", "registry", inner(name)}
    wrong = [
        f"line {line}: {inner(name)} must not import {module}"
        for line, module in imported(name, JPRUNE[name], JPRUNE)
        if module.startswith("jprune.pipeline") and inner(module) not in allowed
    ]
    assert not wrong, f"{JPRUNE[name].relative_to(ROOT)}\n" + "\n".join(wrong)


def test_modules_do_not_import_in_circles():
    """Wherever the imports stand: also those inside functions and for type checkers only."""
    graph = {
        name: {m for _, m in imported(name, path, JPRUNE) if m in JPRUNE and m != name} for name, path in JPRUNE.items()
    }
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " imports ".join([*above[above.index(name) :], name])
        if name not in done:
            for module in sorted(graph[name]):
                visit(module, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def too_long(name: str) -> dict[str, str]:
    """What of a module is longer or wider than it may be, by the name in `LONG` or `WIDE`, and by how much."""
    text = JPRUNE[name].read_text()
    found = {}
    if (lines := len(text.splitlines())) > LINES:
        found[name] = f"{lines} lines; at most {LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            taken = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            taken = [arg for arg in taken if arg not in ("self", "cls")]
            if lines > BODY:
                found[f"{name}.{node.name}"] = f"line {node.lineno}: a body of {lines} lines; at most {BODY}"
            if len(taken) > PARAMETERS:
                found[f"{name}.{node.name}"] = f"line {node.lineno}: {len(taken)} parameters; at most {PARAMETERS}"
    return found


@pytest.mark.parametrize("name", JPRUNE)
def test_files_and_functions_are_short(name):
    wrong = [f"{what}: {why}" for what, why in too_long(name).items() if what not in LONG | WIDE]
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_needed():
    """What has become short leaves `LONG` and `WIDE`."""
    assert set(LONG | WIDE) <= {what for name in JPRUNE for what in too_long(name)}


def test_no_module_waits_for_a_device():
    """Finding the devices takes seconds and fixes their number: never while importing."""
    left = ("__main__", "configuration_decilm", "pipeline.tasks")  # the last needs a package that may be missing
    names = [name for name in JPRUNE if not name.endswith(left) and not name.startswith("jprune.bridge.")]
    program = (
        f"import importlib; [importlib.import_module(name) for name in {names!r}]; "
        "from jax._src import xla_bridge; print(list(xla_bridge._backends))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


KERNELS = modules("pallas_kernels")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_stand_alone(name):
    allowed = {"jax", "jaxlib", "jax_triton", "jaxtyping", "numpy", "pallas_kernels", "triton"}
    allowed |= set(sys.stdlib_module_names)
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
