"""Damaged files of every kind end in a result or in one of our errors; so do those that once did not."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
FOUND = pathlib.Path(__file__).parent / "found"


def fuzz(*words):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fuzz.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ten_thousand_inputs(tmp_path):
    told = json.loads(fuzz("--inputs", "10000", "--processes", "1", "--found", tmp_path).splitlines()[-1])
    assert sum(told["inputs"].values()) == 10000
    assert min(told["inputs"].values()) > 40


def test_what_was_found(tmp_path):
    assert len(list(FOUND.iterdir())) >= 9
    fuzz("--again", FOUND)
