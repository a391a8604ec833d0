"""Shearing runs over a tiny model: the target is reached and had exactly, runs resume, what cannot be is refused."""

import json

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import load
from jprune.errors import JpruneError
from jprune.pipeline.training import shear_model
from jprune.structured.shape import Shape
from jprune.train.shearing import hard_concrete
from jprune.tuning import Shearing
from jprune.tuning.masked_model import MaskedModel
from jprune.tuning.masked_training import masked_loss, rounded
from jprune.tuning.shearing import count

TARGET = "layers=2,hidden=24,heads=2,kv_heads=1,intermediate=40"
QUICK = {"batch_size": 4, "micro_batch": 2, "warmup": 0, "mask_momentum": 0.0}


@pytest.fixture
def checkpoint(tiny_model):
    return load(tiny_model())


def test_training_sees_the_masked_model(checkpoint, learnable):
    """The task's loss under drawn masks, and under the expected ones, is that of the model they leave."""
    masked = MaskedModel(checkpoint, Shape(layers=2, hidden=24, heads=2, kv_heads=1, intermediate=40))
    task = Shearing(target=TARGET, steps=4).task(checkpoint, 4, masked)
    rng = np.random.default_rng(3)
    log_alpha = {k: jnp.asarray(rng.normal(0.5, 2, s), jnp.float32) for k, s in masked.shapes.items()}
    trainable = {**task.trainable, "log_alpha": log_alpha}
    batch = {"tokens": jnp.asarray(learnable[:4]), "weights": jnp.ones((4, 12), jnp.float32)}
    got, weight = jax.jit(task.evaluation)(trainable, {}, batch)
    assert weight == 4 * 11
    left = np.count_nonzero(rounded(log_alpha)["mlp"], axis=-1)
    np.testing.assert_array_equal(left, np.round(hard_concrete.expected(log_alpha["mlp"]).sum(-1)))
    masks = {k: hard_concrete.deterministic(log_alpha[k], masked.targets[k]) for k in log_alpha}
    params = trees.unflatten(dict(masked.sheared(jax.tree.map(jnp.asarray, checkpoint.params()), masks)))
    scores = jax.nn.log_softmax(compiled.apply(masked.left(masks).config, params, batch["tokens"])[:, :-1])
    want = -np.take_along_axis(np.asarray(scores), learnable[:4, 1:, None], axis=-1).sum()
    same = jax.jit(masked_loss(masked, jnp.float32))(task.trainable["model"], masks, batch)[0]
    np.testing.assert_allclose(same, want, rtol=1e-5)
    read = dict(task.result(trainable).leaves)["blocks/1/mlp/down/kernel"]
    np.testing.assert_array_equal(read, params["blocks"]["1"]["mlp"]["down"]["kernel"])
    assert np.isfinite(got)
    drawn = [float(jax.jit(task.loss)(trainable, {}, batch, jax.random.key(i))[0]) for i in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_targets(tmp_path):
    """A config.json as target, and a number of parameters."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    model = load(tmp_path, weights=False)
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    (smaller / "config.json").write_text(json.dumps(LLAMA_2_7B | {"num_hidden_layers": 20, "hidden_size": 1024}))
    expected = Shape(layers=20, hidden=1024, heads=32, kv_heads=32, intermediate=11008)
    assert Shearing(target=str(smaller)).shape(model) == Shearing(target=str(smaller / "config.json")).shape(model)
    assert Shearing(target=str(smaller)).shape(model) == expected
    solved = Shearing(parameters="1.3B").shape(model)
    assert 1.287e9 < count(model.config)(solved) <= 1.3e9


def test_refusals(checkpoint, learnable, tmp_path):
    def fails(match, **options):
        with pytest.raises(JpruneError, match=match):
            shear_model(
                checkpoint, tmp_path / "out", method=Shearing(**{"steps": 3, **QUICK, **options}), data=learnable
            )

    fails("say how small")
    fails("say how small", target=TARGET, parameters="1M")
    fails("the target has hidden 64 and the model 32", target="hidden=64")
    fails("multiple of kv_heads", target="heads=3,kv_heads=2")
    fails("cannot be read as the first", target="nowhere/config.json")
    fails("got 'width=3'", target="width=3")
    fails("nothing to prune", parameters="1B")
    run_away = {"multiplier_learning_rate": 1e7, "target": "hidden=24"}
    fails("have run away .* lower `multiplier_learning_rate`", **run_away)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.run").exists()


def test_a_tenth_of_the_steps_is_warm_up():
    """320 of the authors' 3200, from nearly nothing to the whole rate, for weights and masks alike."""
    method = Shearing(parameters="1B")
    for adamw, highest in ((method.adamw(), 1e-4), (method._mask_adamw(1.0), 1.0)):
        rate = adamw.rate(3200)
        np.testing.assert_allclose(
            [rate(0), rate(160), rate(320)], np.array([1 / 321, 161 / 321, 1]) * highest, rtol=1e-4
        )
