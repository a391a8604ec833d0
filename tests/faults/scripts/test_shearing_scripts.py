"""Shearing's scripts: the published recipes fit the published sizes, a step for a 7B source compiles without a weight
in memory, and the comparison behind docs/results.md has every row."""

import json
import pathlib
import tomllib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jprune.checkpoints import load
from jprune.cli.main import parse
from jprune.pipeline.training import plan_shearing
from jprune.tuning import Shearing
from jprune.tuning.shearing import count

SCRIPTS = pathlib.Path(__file__).parents[3] / "scripts"
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
PUBLISHED = {"sheared-llama-1.3b": 1_345_423_360, "sheared-llama-2.7b": 2_701_560_320}


@pytest.fixture
def shear(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import shear

    return shear


def recipe_of(name):
    return tomllib.loads((SCRIPTS / "recipes" / f"{name}.toml").read_text())


@pytest.fixture
def seven_billion(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return load(tmp_path, weights=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes(shear, seven_billion, name, tmp_path):
    """The commands of both phases are understood, and say what was published."""
    recipe = recipe_of(name)
    method = shear.method(recipe)
    assert count(seven_billion.config)(method.shape(seven_billion)) == PUBLISHED[name]
    rate = method.adamw().rate(3200)
    np.testing.assert_allclose([rate(320), rate(3200)], [1e-4, 1e-5], rtol=1e-5)
    assert method.target_rise(3200) == 640
    data = [f"{domain}={domain}.npy" for domain in recipe["proportions"]]
    for phase, words in (("prune", 2), ("train", 2)):
        line = shear.command(phase, "model", recipe, tmp_path, data, fsdp=8)
        command = parse(" ".join(line[:words]), line[words:])
        options = command.options()
        assert len(options["data"]) == len(options["proportions"]) == 7
        assert options["dynamic_loading"].reference_losses == recipe["reference_loss"]
        assert options["sequence_length"] == 4096
        assert options["resume"]
        tokens = command.method.steps * command.method.batch_size * 4096
        assert tokens == pytest.approx({"prune": 0.42e9, "train": 50.3e9}[phase], rel=0.01)
    assert sum(recipe["proportions"].values()) == pytest.approx(1)


def test_a_step_for_seven_billion(shear, seven_billion):
    """Four devices hold a quarter of parameters and moments each: 3 numbers of 4 bytes a parameter."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 4), ("data", "fsdp"))
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
        found = shear.cost(seven_billion, recipe_of("sheared-llama-1.3b"), mesh, rows=4, length=32)
    assert found["parameters"] == {"before": 6_738_415_616, "after": 1_345_423_360}
    assert found["masks"] == {"layer": [32], "hidden": [4096], "attention": [32, 32], "mlp": [32, 11008]}
    assert found["argument_bytes_per_device"] == pytest.approx(3 * 4 * 6_738_415_616 / 4, rel=0.01)
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert found["flops_per_device"] > 6 * 32 * block  # at least one turn of the loop over layers, of a window


def test_published_sizes(tmp_path):
    """From config.json alone; by hand: embedding and head, 4 d h 128 + 3 d i + 2 d a layer, the last norm."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    model = load(tmp_path, weights=False)
    for layers, d, h, i, published in [
        (24, 2048, 16, 5504, 1_345_423_360),
        (32, 2560, 20, 6912, 2_701_560_320),
        (24, 1024, 8, 2816, 373_867_520),
    ]:
        assert published == 64000 * d + layers * (4 * d * h * 128 + 3 * d * i + 2 * d) + d
        target = f"layers={layers},hidden={d},heads={h},intermediate={i}"
        assert count(model.config)(Shearing(target=target).shape(model)) == published
    plan = plan_shearing(tmp_path, method=Shearing(target="layers=24,hidden=2048,heads=16,intermediate=5504"))
    assert plan.parameters == (6_738_415_616, 1_345_423_360)
    assert plan.sizes == ({"d_model": 2048, "heads": 16, "kv_heads": 16, "d_ff": 5504},) * 24


def test_the_comparison(run_script, tiny_model, token_file, tmp_path):
    words = ["--model", tiny_model(), "--data", token_file(16, 12), "--text", token_file(2, 12, seed=1)]
    words += ["--target", "layers=2,hidden=28,heads=2,intermediate=48"]
    words += ["--evaluate-length", "12", "--windows", "2", "--steps", "3", "--train-steps", "2", "--length", "12"]
    out = tmp_path / "rows.json"
    words += ["--work", tmp_path / "work", "--out", out]
    run_script("reproduce_shearing", *words)
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
