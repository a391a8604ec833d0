"""Tuning runs over a tiny model: what is trained, what is written, what is refused."""

import json

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_model import sparse

import jprune
from jprune import trees
from jprune.checkpoints.record import damaged
from jprune.data import windows
from jprune.errors import JpruneError
from jprune.pipeline.training import tune_model
from jprune.tuning import Full, Lora

SHORT = {"steps": 4, "batch_size": 4, "micro_batch": 4, "warmup": 0}


def kernels(model):
    return {p: model.read(p) for p in model.shapes if p.startswith("blocks") and p.endswith("kernel")}


def test_lora_recovers_and_keeps_zeros(tiny_model, learnable, tmp_path):
    folder = sparse(tiny_model())
    seen = []
    report = tune_model(
        folder, tmp_path / "out", method=Lora(**SHORT | {"steps": 8}, learning_rate=0.02, rank=2), data=learnable,
        evaluate=learnable[:4], evaluate_every=4, progress=seen.append,
    )  # fmt: skip
    before, after = jprune.load(folder), jprune.load(tmp_path / "out")
    for path, old in kernels(before).items():
        new = after.read(path)
        assert (new[old == 0] == 0).all(), path
        assert (new != old).any(), path
    for path in set(before.shapes) - set(kernels(before)):
        np.testing.assert_array_equal(before.read(path), after.read(path))
    assert report.losses[-1] < report.losses[0]
    assert report.after.value < report.before.value
    assert report.trainable_parameters == 3 * 2 * (32 + 32 + 2 * (32 + 16) + 32 + 32 + 3 * (32 + 56))
    assert set(report.evaluation_losses) == {4, 8}
    assert not (tmp_path / "out.run").exists()
    record = json.loads((tmp_path / "out" / "jprune.json").read_text())
    assert record["recipe"]["method"] == "lora"
    assert record["recipe"]["rank"] == 2
    assert len(record["losses"]) == 8
    assert damaged(tmp_path / "out") == []
    assert record["perplexity"]["after"] == report.after.value
    assert record["data"]["windows"] == 12
    assert record["tokens_per_second"] > 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 8
    phases = [p.phase for p in seen]
    assert phases.index("evaluate before") < phases.index("train") < phases.index("evaluate after")
    assert any("tokens/s" in p.text for p in seen)


def logits(config, params, tokens):
    return compiled.apply(config, jax.tree.map(jnp.asarray, params), jnp.asarray(tokens))


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
def test_merged_is_adapted(tiny_model, learnable, base):
    """What training saw is what the merged model computes, up to the base's rounding."""
    checkpoint = jprune.load(tiny_model())
    method = Lora(**SHORT, rank=3, base_dtype=base, targets="q,down")
    task = method.task(checkpoint, 4)
    assert {p.split("/", 2)[2] for p in trees.flatten(task.trainable)} == {
        f"{name}/kernel/{part}" for name in ("attn/q", "mlp/down") for part in "ab"
    }
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), task.trainable)
    batch = {"tokens": jnp.asarray(learnable[:4]), "weights": jnp.ones((4, 12), jnp.float32)}
    got, weight = jax.jit(task.evaluation)(trained, task.frozen, batch)
    merged = trees.unflatten(dict(task.result(trained).leaves))
    scores = jax.nn.log_softmax(logits(checkpoint.config, merged, learnable[:4])[:, :-1])
    want = -np.take_along_axis(np.asarray(scores), learnable[:4, 1:, None], axis=-1).sum()
    np.testing.assert_allclose(got, want, rtol=1e-5 if base == "float32" else 0.03)
    assert weight == 4 * 11
    unchanged = jax.jit(task.evaluation)(task.trainable, task.frozen, batch)[0]
    assert abs(unchanged - got) > 0.01 * got


def test_kept_apart_for_peft(tiny_model, learnable, tmp_path):
    """The adapters' file beside the model's own tensors, by PEFT's formula."""
    from safetensors.numpy import load_file

    folder = tiny_model()
    method = Lora(**SHORT, rank=2, alpha=6.0, keep_adapters=True, targets="o,up", learning_rate=0.01)
    report = tune_model(folder, tmp_path / "out", method=method, data=learnable, evaluate=learnable[:4])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "jprune.json", "metrics.jsonl",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6.0, str(folder))
    assert "model.layers.1.self_attn.o_proj" in config["target_modules"]
    assert report.after.value < report.before.value
    adapters = load_file(tmp_path / "out" / "adapter_model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for key in [k for k in adapters if k.endswith("lora_A.weight")]:
        a, b = adapters[key], adapters[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        tensors[name] = tensors[name] + 3.0 * b @ a
    merged = tiny_model("merged", change=lambda t: t.update(tensors))
    rows = windows.evaluation(learnable[:4], None).tokens
    from jprune.evaluate.perplexity import perplexity

    np.testing.assert_allclose(perplexity(jprune.load(merged), rows).value, report.after.value, rtol=1e-4)


def test_full_keeps_zeros_in_the_file(tiny_model, learnable, tmp_path):
    import ml_dtypes

    folder = sparse(tiny_model(dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16"))
    method = Full(**SHORT, learning_rate=0.01, weight_decay=0.1)
    report = tune_model(folder, tmp_path / "out", method=method, data=learnable)
    before, after = jprune.load(folder), jprune.load(tmp_path / "out")
    for path, shape in before.shapes.items():
        old, new = before.read(path), after.read(path)
        assert new.dtype == shape.dtype == ml_dtypes.bfloat16
        assert (new != old).any(), path
        if path.startswith("blocks") and path.endswith("kernel"):
            np.testing.assert_array_equal(new == 0, old == 0)
    assert report.trainable_parameters == report.parameters
    assert report.before is None
    assert report.losses[-1] < report.losses[0]


def test_bad_input(tiny_model, learnable, tmp_path):
    folder = tiny_model()

    def refused(match, method=None, **options):
        with pytest.raises(JpruneError, match=match):
            tune_model(folder, tmp_path / "out", method=method or Lora(**SHORT), **{"data": learnable} | options)
        assert not (tmp_path / "out").exists()

    refused("too little to train on: it has 3 windows", data=learnable[:3])
    refused("'w' matches no kernel of this model; there are down, gate, k, o, q, up, v", Lora(**SHORT, targets="q,w"))
    refused("blocks/9.* matches none", Lora(**SHORT, targets="blocks/9/"))
    refused("a warm-up of 9 steps leaves none of the 4", Lora(**SHORT | {"warmup": 9}))
    for kind, options, match in [
        (Lora, {"rank": 0}, "`rank` must be at least 1"),
        (Lora, {"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        (Lora, {"steps": 1, "epochs": 1}, "either `steps` or `epochs`"),
        (Full, {"temperature": 2.0}, "give `teacher`"),
        (Full, {"teacher": "x", "temperature": 0.0}, "`temperature` must be above 0"),
        (Full, {"batch_size": 0}, "`batch_size` must be at least 1"),
    ]:
        with pytest.raises(JpruneError, match=match):
            kind(**options)
