"""The plugin that adds up what the tests compile: over two workers, by file, and with a budget."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "reference"
COMPILES = "import jax\n\ndef test():\n    assert jax.jit(lambda x: x + {})(1.0) > 0\n"


@pytest.fixture
def suite(tmp_path):
    """Two files of one test each."""
    for tier, number in (("arrays", 1), ("models", 2)):
        (tmp_path / "tests" / tier).mkdir(parents=True)
        (tmp_path / "tests" / tier / f"test_{number}.py").write_text(COMPILES.format(number))
    return tmp_path


def test_what_is_compiled_is_counted(suite):
    command = [sys.executable, "-m", "pytest", "-p", "compile_seconds", "-n", "2", "--dist", "loadfile"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--compile-budget", "1"],
        cwd=suite,
        env=environment | {"PYTHONPATH": str(REFERENCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "2 passed" in done.stdout
    rows = re.findall(r"^(\S+) +(?:[\d.]+ +){4}(\d+)$", done.stdout, re.MULTILINE)
    found = {name: int(programs) for name, programs in rows}
    assert found["arrays"] == found["tests/arrays/test_1.py"] >= 1
    assert found["models"] == found["tests/models/test_2.py"] >= 1
    assert found["all"] == found["arrays"] + found["models"]
    assert f"{found['all']} programs were compiled; --compile-budget is 1" in done.stdout
