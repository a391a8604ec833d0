"""Shearing, LLM-Pruner and random weights, compared by the script behind docs/results.md: every row is there."""

import json
import pathlib
import subprocess
import sys

import numpy as np

from jprune.checkpoints import load

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def test_the_comparison(tiny_model, token_file, tmp_path):
    words = ["--model", tiny_model(), "--data", token_file(16, 12), "--text", token_file(2, 12, seed=1)]
    words += ["--target", "layers=2,hidden=28,heads=2,intermediate=48"]
    words += ["--evaluate-length", "12", "--windows", "2", "--steps", "3", "--train-steps", "2", "--length", "12"]
    out = tmp_path / "rows.json"
    words += ["--work", tmp_path / "work", "--out", out]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "reproduce_shearing.py", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "dense", "shearing, mask phase", "shearing", "llm-pruner, not trained", "llm-pruner",
        "random weights, not trained", "random weights",
    ]  # fmt: skip
    assert rows["shearing"]["tokens"] == rows["llm-pruner"]["tokens"] == rows["random weights"]["tokens"] == 5 * 2 * 12
    small = load(tmp_path / "work" / "sheared").config
    assert (small.layers, small.d_model, small.heads, small.kv_heads, small.d_ff) == (2, 28, 2, 1, 48)
    assert rows["llm-pruner"]["parameters"]["after"] <= rows["shearing"]["parameters"]["after"]
    assert all(np.isfinite(row["perplexity"]) for row in rows.values())
