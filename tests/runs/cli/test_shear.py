"""`jprune prune shearing` as a user types it."""

import json

import jax
import pytest

from jprune.cli import main


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command; gives (exit status, stdout, stderr). Nothing is written into the user's cache."""
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "cache"))

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_plan_and_run(run, tiny_model, token_file, tmp_path):
    """Two domains whose weights follow their losses."""
    folder = tiny_model()
    command = ("prune", "shearing", folder, "--target", "layers=2,intermediate=40")
    status, out, err = run(*command, "--plan", "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 64
    rest = 2 * 96 * 32 + 32
    expected = {"before": rest + 3 * (block + 3 * 32 * 56), "after": rest + 2 * (block + 3 * 32 * 40)}
    assert plan["parameters"] == expected
    status, out, err = run(
        *command, "--data", f"a={token_file(12, 12)}", "--data", f"b={token_file(12, 12, seed=1)}",
        "--dynamic-loading", "--reference-loss", "a=4.5,b=4.6", "--steps", "2", "--batch-size", "4",
        "--micro-batch", "4", "--evaluate-every", "1", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    assert result["parameters"] == expected
    assert set(result["domains"]) == {"a", "b"}
    assert result["target"] == {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 40}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_bad_words(run, tiny_model, token_file, tmp_path):
    command = ("prune", "shearing", tiny_model(), "--data", token_file(8, 12), "--out", tmp_path / "out")
    for words, match in [
        ((), "say how small"),
        (("--target", "hidden=64"), "the model 32"),
        (("--target", "layers=2", "--mask-momentum", "1"), "b1 1.0"),
    ]:
        status, out, err = run(*command, *words)
        assert (status, out) == (1, "")
        assert match in err
        assert err.count("\n") == 1
    assert run(*command[:-2], "--target", "layers=2")[0] == 2  # no --out
