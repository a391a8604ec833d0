"""What works on functions and pytrees needs jax, optax and numpy alone."""

import os
import pathlib
import re
import subprocess
import sys
from importlib import metadata

ROOT = pathlib.Path(__file__).parents[2]


def needed(*names):
    """Installed packages and what they need, by name."""
    found, todo = {}, list(names)
    while todo:
        name = re.split(r"[^\w.-]", todo.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        todo += [line for line in found[name].requires or () if "extra ==" not in line]
    return found


def test_beside_jax_optax_and_numpy(tmp_path):
    """A folder of links to these and to what they need is all that Python finds."""
    for package in needed("jax", "optax", "numpy").values():
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(package.locate_file(name))
    (tmp_path / "jprune").symlink_to(ROOT / "jprune")
    assert not (tmp_path / "flax").exists()
    program = ROOT / "tests/reference/core_alone.py"
    done = subprocess.run(
        [sys.executable, "-S", "-P", str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
