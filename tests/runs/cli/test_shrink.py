"""`jprune prune llm-pruner`, `jprune prune experts`, `jprune prune layers` and `jprune groups`, as typed."""

import importlib
import json
import re

import numpy as np
import pytest

from jprune.checkpoints import load

main = importlib.import_module("jprune.cli.main")  # the package has a function of this name
OPEN = ["--protect-first", "0", "--protect-last", "0", "--no-compensate"]


@pytest.fixture
def call(capsys):
    """A function that runs the command and returns its exit status, the last line's JSON (or stdout), and stderr."""

    def run(*words):
        status = main.main([str(word) for word in words])
        told = capsys.readouterr()
        return status, json.loads(told.out.splitlines()[-1]) if "--json" in words else told.out, told.err

    return run


def test_prunes_and_prunes_again_from_the_record(call, tiny_model, token_file, tmp_path):
    model, tokens = tiny_model(), token_file(4, 12)
    words = ["--json", "--calibration", tokens, "--evaluate", token_file(2, 16, seed=1)]
    status, said, _ = call(
        "prune", "llm-pruner", model, "--ratio", 0.5, "--taylor", "param_mix", *OPEN, "--out", tmp_path / "a", *words
    )
    assert status == 0
    smaller = load(tmp_path / "a")
    assert said["parameters"]["after"] == sum(np.prod(s.shape) for s in smaller.shapes.values())
    assert said["perplexity"]["before"] != said["perplexity"]["after"]
    status, again, _ = call(
        "prune", "llm-pruner", model, "--recipe", tmp_path / "a/jprune.json", "--json", "--out", tmp_path / "b"
    )
    assert status == 0
    assert again["sizes"] == said["sizes"]
    for path in smaller.shapes:
        np.testing.assert_array_equal(load(tmp_path / "b").read(path), smaller.read(path))


def test_experts(call, tiny_model, token_file, tmp_path):
    """The plan has the sizes that come out, and the record makes the same again."""
    sizes = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    model = tiny_model(**sizes, num_hidden_layers=2)
    words = ["prune", "experts", model, "--remove", 1, "--by", "frequency"]
    status, planned, _ = call(*words, "--plan")
    assert status == 0
    assert planned.splitlines()[1].split() == ["0", "to", "1", "32", "4", "2", "56", "3", "56"]
    status, told, _ = call(*words, "--calibration", token_file(), "--out", tmp_path / "out")
    assert status == 0
    assert told.startswith("experts: 8 before, 6 after (25.0 % less)\nparameters: ")
    words = ["prune", "experts", model, "--recipe", tmp_path / "out/jprune.json", "--out", tmp_path / "again", "--json"]
    status, said, _ = call(*words)
    assert status == 0
    assert said["experts"] == json.loads((tmp_path / "out/jprune.json").read_text())["experts"]
    status, _, error = call("prune", "experts", model, "--remove", 3, "--out", tmp_path / "no")
    assert (status, "remove 2 at most" in error) == (1, True)


def test_layers(call, tiny_model, token_file, tmp_path):
    status, told, _ = call(
        "prune", "layers", tiny_model(), "--drop", 1, "--calibration", token_file(), "--out", tmp_path / "out"
    )
    assert status == 0
    assert "layers that stay" in told
    assert load(tmp_path / "out").config.layers == 2


def test_plans_of_a_config_alone(call, tiny_config, tmp_path):
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config))
    status, said, _ = call("prune", "llm-pruner", folder, "--ratio", 0.5, *OPEN, "--plan", "--json")
    assert status == 0
    assert said["parameters"]["after"] < said["parameters"]["before"]
    assert [s["d_ff"] for s in said["sizes"]] == [28, 28, 28]
    assert call("prune", "layers", folder, "--drop", 2, "--plan", "--json")[1]["sizes"] == [
        {"d_model": 32, "heads": 4, "kv_heads": 2, "d_ff": 56}
    ]
    status, told, _ = call("prune", "llm-pruner", folder, "--ratio", 0.5, "--global", *OPEN, "--plan")
    assert status == 0
    assert "depends on the importance" in told
    status, said, _ = call("groups", folder, "--json")
    assert status == 0
    by_name = {g["name"]: g for g in said["groups"]}
    assert by_name["blocks/1/attn/k/kernel[1]"]["size"] == 2
    assert {(m["path"], m["axis"]) for m in by_name["blocks/1/attn/k/kernel[1]"]["members"]} == {
        *((f"blocks/1/attn/{name}/kernel", 1) for name in "qkv"),
        ("blocks/1/attn/o/kernel", 0),
    }
    assert by_name["embed/embedding[0]"]["frozen"]
    assert sum(g["renormalised"] for g in said["groups"]) == 1
    status, told, _ = call("groups", folder)
    assert status == 0
    assert "blocks/*/mlp" in told


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["llm-pruner", "--ratio", "0.5"], 2, "--out"),
        (["llm-pruner", "--ratio", "0.5", "--parameters", "100", "--out", "x"], 2, "only one of"),
        (["llm-pruner", "--out", "x"], 1, "how small"),
        (["llm-pruner", "--ratio", "1.5", "--out", "x"], 1, "between 0 and 1|in \\(0, 1\\)"),
        (["llm-pruner", "--ratio", "0.5", "--out", "x"], 1, "protect fewer"),
        (["llm-pruner", "--ratio", "0.99", *OPEN, "--out", "x"], 1, "nothing of its"),
        (["llm-pruner", "--ratio", "0.5", "--round-to", "64", *OPEN, "--out", "x"], 1, "lower --round-to"),
        (["llm-pruner", "--parameters", "10", *OPEN, "--out", "x"], 1, "can only go down to"),
        (
            [
                "llm-pruner",
                "--ratio",
                "0.5",
                "--protect-first",
                "1",
                "--protect-last",
                "0",
                "--format",
                "hf",
                "--out",
                "x",
            ],
            1,
            "--format jprune",
        ),
        (["layers", "--drop", "3", "--out", "x"], 1, "at least one must stay"),
    ],
)
def test_bad_input(call, tiny_model, token_file, tmp_path, monkeypatch, words, status, message):
    monkeypatch.chdir(tmp_path)
    kind, *rest = words
    got, _, told = call("prune", kind, tiny_model(), "--calibration", token_file(), *rest)
    assert got == status
    assert len(told.splitlines()) == 1

    assert re.search(message, told), told
    assert not (tmp_path / "x").exists()
