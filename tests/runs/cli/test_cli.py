"""The command as a user types it: what it prints, what it writes, its exit status."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jprune
from jprune.cli import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Runs the command; gives (exit status, stdout, stderr)."""

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def with_tokenizer():
    """Gives a folder a tokenizer of words w0 to w95."""

    def add(folder):
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return add


def fails(result, *parts, status=1):
    """It failed with one line on stderr that has all the parts, and printed nothing else."""
    got, out, err = result
    assert got == status, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("jprune: ")
    for part in parts:
        assert str(part) in err, err


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_prune_prints_one_json_object(run, tiny_model, token_file, tmp_path, method):
    status, out, err = run(
        "prune", method, tiny_model(), "--pattern", "2:4", "--out", tmp_path / "out", "--calibration", token_file(),
        "--evaluate", token_file(3, seed=1), "--json", *(("--refit", 2) if method == "wanda" else ()),
    )  # fmt: skip
    assert (status, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert result["method"] == method
    assert json.loads((tmp_path / "out" / "jprune.json").read_text())["recipe"]["refit"] == 2 * (method == "wanda")
    assert result["pattern"] == "2:4"
    assert result["sparsity"]["achieved"] == 0.5
    assert result["sparsity"]["zeros"] * 2 == result["sparsity"]["prunable_parameters"]
    assert result["perplexity"]["windows"] == 3
    assert result["perplexity"]["sequence_length"] == 24
    assert result["perplexity"]["before"] > 0
    assert result["seconds"]["total"] >= result["seconds"]["solve"] > 0
    assert {"calibration", "compile", "io"} <= set(result["seconds"]) | (
        {"calibration"} if method == "magnitude" else set()
    )
    assert result["peak_memory_bytes"] > 2**20
    assert result["out"] == str(tmp_path / "out")

    status, out, _ = run("info", tmp_path / "out", "--json")
    info = json.loads(out)
    assert status == 0
    assert info["zeros"] == result["sparsity"]["zeros"]
    assert info["prunable_parameters"] == result["sparsity"]["prunable_parameters"]
    assert info["parameters"] == result["sparsity"]["total_parameters"]
    assert all("2:4" in kernel["patterns"] for kernel in info["kernels"])
    assert info["family"] == "llama"


def test_people_see_the_result(run, tiny_model, token_file, tmp_path):
    status, out, _ = run(
        "prune", "wanda", tiny_model(), "--sparsity", 0.5, "--out", tmp_path / "out", "--calibration", token_file()
    )
    assert status == 0
    assert "sparsity 50.0 % of " in out
    assert "peak memory" in out
    assert f"written to {tmp_path / 'out'}" in out
    status, out, _ = run("info", tmp_path / "out")
    assert status == 0
    assert "mlp/down/kernel" in out


def test_plan_touches_nothing(run, tiny_model, tmp_path):
    folder = tiny_model()
    before = sorted(tmp_path.rglob("*"))
    status, out, _ = run("prune", "sparsegpt", folder, "--sparsity", 0.5, "--plan", "--samples", 4)
    assert status == 0
    assert "blocks/2/mlp/down/kernel" in out
    assert "21 kernels" in out
    status, out, _ = run("prune", "sparsegpt", folder, "--sparsity", 0.5, "--plan", "--samples", 4, "--json")
    plan = json.loads(out)
    assert len(plan["kernels"]) == 21
    assert plan["sparsity"]["expected"] == 0.5
    assert plan["calibration_tokens"] == 4 * 64
    assert plan["peak_memory_bytes"] > 0
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


def test_eval_perplexity(run, tiny_model, token_file):
    text = token_file(5)
    status, out, _ = run("eval", "perplexity", tiny_model(), "--text", text, "--windows", 3, "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["windows"], result["sequence_length"], result["tokens"]) == (3, 24, 72)
    assert result["perplexity"] > 1


def test_convert_and_back_is_exact(run, tiny_model, tmp_path):
    folder = tiny_model()
    assert run("convert", folder, "--out", tmp_path / "orbax", "--format", "orbax")[0] == 0
    assert run("convert", tmp_path / "orbax", "--out", tmp_path / "hf", "--format", "hf")[0] == 0
    assert run("convert", folder, "--out", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    first, last, half = (jprune.load(f) for f in (folder, tmp_path / "hf", tmp_path / "half"))
    for path in first.shapes:
        np.testing.assert_array_equal(first.read(path), last.read(path))
        np.testing.assert_array_equal(first.read(path).astype("bfloat16"), half.read(path))


def test_generate(run, tiny_model, with_tokenizer):
    folder = with_tokenizer(tiny_model())
    status, out, _ = run("generate", folder, "--prompt", "w5 w6 w7", "--max-tokens", 6, "--json")
    result = json.loads(out)
    assert status == 0
    assert 0 < result["tokens"] <= 6
    status, text, _ = run("generate", folder, "--prompt", "w5 w6 w7", "--max-tokens", 6)
    assert text.strip() == result["text"].strip()
    words = text.split()
    term = words[len(set(words)) // 2]
    stopped = run("generate", folder, "--prompt", "w5 w6 w7", "--max-tokens", 6, "--stop", term, "--stop", "!")[1]
    assert stopped.strip() == result["text"].partition(term)[0].strip()
    several = ("--prompt", "w5 w6 w7", "--prompt", "w3", "--max-tokens", 6)
    both = json.loads(run("generate", folder, *several, "--json")[1])["continuations"]
    assert [own["prompt"] for own in both] == ["w5 w6 w7", "w3"]
    assert both[0]["text"].split() == words
    assert all(f"{own['prompt']}{own['text']}" in run("generate", folder, *several)[1] for own in both)
    sampled = [run("generate", folder, "--prompt", "w5", "--temperature", 2, "--seed", 3)[1] for _ in range(2)]
    assert sampled[0] == sampled[1]
    refused = run("generate", folder, "--prompt", "w5", "--backend", "triton")
    fails(refused, "--backend is of the packed kernels", "it has none", status=2)


def test_calibration_from_text(run, tiny_model, with_tokenizer, tmp_path):
    folder = with_tokenizer(tiny_model())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(500)))
    words = ["prune", "wanda", folder, "--sparsity", 0.5, "--out", tmp_path / "out", "--calibration", text]
    assert run(*words, "--samples", 4, "--sequence-length", 16)[0] == 0
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["calibration"] | {"sha256": ""} == {
        "source": str(text), "windows": 4, "sequence_length": 16, "seed": 0, "sha256": "",
    }  # fmt: skip
    fails(
        run(*words[:-1], text, "--overwrite", "--sequence-length", 60, "--calibration", _short(tmp_path)),
        "20 tokens",
        "61",
    )
    fails(run(*words, "--overwrite", "--sequence-length", 65), "65", "context of 64")


def _short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("w1 " * 20)
    return path


def test_recipe_files(run, tiny_model, token_file, tmp_path):
    folder, tokens = tiny_model(), token_file()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'method = "sparsegpt"\nsparsity = 0.25\ndamping = 0.1\ncalibration = "{tokens}"\n'
        'skip = ["attn/"]\n[overrides]\n"mlp/down" = "2:4"\n'
    )
    assert run("prune", "sparsegpt", folder, "--out", tmp_path / "a", "--recipe", recipe)[0] == 0
    record = json.loads((tmp_path / "a" / "jprune.json").read_text())["recipe"]
    assert record["damping"] == 0.1
    assert record["skip"] == ["attn/"]
    # The record of a run is a recipe for the same result; the command line counts more than the recipe.
    again = ["prune", "sparsegpt", folder, "--recipe", tmp_path / "a" / "jprune.json"]
    assert run(*again, "--out", tmp_path / "b")[0] == 0
    first, second = jprune.load(tmp_path / "a"), jprune.load(tmp_path / "b")
    for path in first.shapes:
        np.testing.assert_array_equal(first.read(path), second.read(path))
    status, out, _ = run(*again, "--pattern", "1:4", "--skip", "mlp/gate", "--plan", "--json")
    kernels = json.loads(out)["kernels"]
    assert status == 0
    assert {k["pattern"] for k in kernels if "attn" in k["path"]} == {"1:4"}
    fails(run("prune", "wanda", folder, "--out", tmp_path / "c", "--recipe", recipe), "sparsegpt")
    recipe.write_text("sparsity = ")
    fails(run("prune", "sparsegpt", folder, "--out", tmp_path / "c", "--recipe", recipe), "not valid TOML")


def test_bad_usage(run, tiny_model, tmp_path):
    folder, out = tiny_model(), tmp_path / "out"
    fails(run("prune", "optimal-brain-damage", folder), "optimal-brain-damage", "sparsegpt", status=2)
    fails(run("evaluate", folder), "evaluate", "eval perplexity", status=2)
    fails(run("prune", "wanda", folder, "--out", out), "--sparsity", "--pattern", status=2)
    fails(run("prune", "wanda", folder, "--sparsity", 0.5, "--pattern", "2:4", "--out", out), "either", status=2)
    fails(run("prune", "wanda", folder, "--sparsity", 0.5), "--out", status=2)
    fails(
        run("prune", "wanda", folder, "--sparsity", 0.5, "--out", out, "--override", "mlp"), "REGEX=PATTERN", status=2
    )
    assert run("prune", "wanda", folder, "--no-such-option")[0] == 2
    assert run("prune", "wanda")[0] == 2
    assert run()[0] == 2
    assert run("--help")[0] == 0
    assert run("prune", "--help")[0] == 0
    assert run("prune", "sparsegpt", "--help")[0] == 0


def test_bad_input(run, tiny_model, token_file, tmp_path):
    folder, out, tokens = tiny_model(), tmp_path / "out", token_file()

    def prune(*words, model=folder, method="wanda"):
        return run("prune", method, model, "--out", out, "--calibration", tokens, *words)

    fails(prune("--sparsity", 1.0), "[0, 1)", "1.0")
    fails(prune("--sparsity", -0.1), "[0, 1)")
    fails(prune("--pattern", "3:2"), "3:2")
    fails(prune("--pattern", "two of four"), "two of four")
    fails(prune("--pattern", "8:16"), "mlp/down/kernel", "56")
    fails(prune("--sparsity", 0.5, "--where", "mpl/dwn"), "mpl/dwn", "near misses", "mlp/down")
    fails(prune("--sparsity", 0.5, "--where", "("), "regular expression")
    fails(prune("--sparsity", 0.5, "--skip", "kernel"), "no kernel to prune")
    fails(prune("--sparsity", 0.5, "--per", "block"), "SparseGPT")
    fails(prune("--sparsity", 0.5, "--dtype", "int8"), "int8")
    fails(prune("--sparsity", 0.5, "--damping", 0, method="sparsegpt"), "damping")
    fails(prune("--sparsity", 0.5, model=tmp_path / "nothing"), "nothing")
    fails(prune("--sparsity", 0.5, "--samples", 7), "6 rows")
    fails(prune("--sparsity", 0.5, "--calibration", token_file(vocab=200)), "outside [0, 96)")
    fails(prune("--sparsity", 0.5, "--calibration", "pydoc"), "tokenizer")
    fails(prune("--sparsity", 0.5, model=_changed(folder, architectures=["NobodysForCausalLM"])), "Nobodys", "Llama")
    fails(prune("--sparsity", 0.5, model=_changed(folder, num_attention_heads=8)), "shape", "q_proj")
    fails(run("generate", folder, "--prompt", "hello"), "tokenizer")
    assert not out.exists()


def _changed(folder, **options):
    """The model with a config that does not belong to it."""
    other = folder.with_name("-".join(options))
    shutil.copytree(folder, other)
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **options}))
    return other


def test_damaged_files(run, tiny_model, tmp_path):
    def prune(model):
        return run("prune", "magnitude", model, "--sparsity", 0.5, "--out", tmp_path / "out")

    cut = tiny_model("cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails(prune(cut), "cut")
    gone = tiny_model("gone")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (gone / "model.safetensors").unlink()
    (gone / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(prune(gone), "missing")
    index["weight_map"]["model.norm.weight"] = "../cut/model.safetensors"
    (gone / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(prune(gone), "outside")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    fails(prune(tmp_path / "model.gguf"), "model.gguf")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((cut / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    fails(prune(pickled), "pickled")
    assert not (tmp_path / "out").exists()


def test_the_process_exits_with_the_status(tiny_model, tmp_path):
    words = [sys.executable, "-m", "jprune", "info", "--json"]
    good = subprocess.run([*words, str(tiny_model())], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert len(json.loads(good.stdout)["layers"]) == 3
    bad = subprocess.run([*words, str(tmp_path / "none")], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "none" in bad.stderr
