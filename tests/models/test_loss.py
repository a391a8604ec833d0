"""Losses against torch's cross-entropy of Hugging Face's LLaMA, and against whole logits."""

import dataclasses

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.errors import JpruneError
from jprune.models import decoder, families, loss, stacked
from jprune.models.config import DecoderConfig

CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM", vocab=40, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=4, d_ff=24,
    context=64,
)  # fmt: skip


def a_batch(rng, size=3, length=11, vocab=40):
    return {
        "tokens": jnp.asarray(rng.integers(0, vocab, (size, length)), jnp.int32),
        "weights": jnp.asarray(rng.random((size, length)).round(1), jnp.float32),
    }


def by_hand(config, params, batch):
    logits = jax.nn.log_softmax(compiled.apply(config, params, batch["tokens"])[:, :-1])
    each = -jnp.take_along_axis(logits, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(each * batch["weights"][:, 1:])


def large(params):
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)


@pytest.mark.parametrize(("tied", "tokens_at_once"), [(True, 12), (False, 1), (False, 10**6)])
def test_equals_whole_logits(getkey, rng, monkeypatch, tied, tokens_at_once):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 40 * tokens_at_once)
    config = dataclasses.replace(CONFIG, tied=tied)
    params, batch = large(decoder.init_params(config, getkey())), a_batch(rng)
    want = by_hand(config, params, batch)
    got, weight = loss.causal_lm(config)(params, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(weight, batch["weights"][:, 1:].sum(), rtol=1e-6)
    if not tied:
        return
    grads = jax.jit(jax.grad(lambda p: by_hand(config, p, batch)))(params)
    mine = jax.jit(jax.grad(lambda p: loss.causal_lm(config)(p, batch)[0]))(params)
    for path, g in trees.flatten(grads).items():
        np.testing.assert_allclose(trees.flatten(mine)[path], g, rtol=1e-3, atol=1e-5, err_msg=path)
    both = stacked.stack(params, stacked.runs(config, params))
    np.testing.assert_allclose(loss.causal_lm(config)(both, batch)[0], want, rtol=1e-5)


def test_equals_torch(rng):
    """Mean loss with ignored labels, and its gradients, of Hugging Face's own model."""
    torch = pytest.importorskip("torch")
    import transformers

    options = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(options)
    config = families.config({"architectures": ["LlamaForCausalLM"]} | options.to_dict())
    table = families.table(config)

    def ours(tensors):
        return {path: jnp.asarray(e.read(tensors[e.key].detach().numpy().copy())) for path, e in table.items()}

    params = trees.unflatten(ours(dict(model.named_parameters())))
    tokens = rng.integers(0, 96, (3, 17)).astype(np.int32)
    learn = rng.random((3, 17)) < 0.6
    learn[:, 0] = False
    labels = torch.from_numpy(np.where(learn, tokens, -100)).long()
    theirs = model(torch.from_numpy(tokens).long(), labels=labels).loss
    theirs.backward()
    batch = {"tokens": jnp.asarray(tokens), "weights": jnp.asarray(learn, jnp.float32)}

    def mean(p):
        total, weight = loss.causal_lm(config)(p, batch)
        return total / weight

    got, grads = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(got, theirs.item(), rtol=1e-5)
    want = ours({name: p.grad for name, p in model.named_parameters()})
    for path, g in trees.flatten(grads).items():
        np.testing.assert_allclose(g, want[path], rtol=1e-3, atol=2e-5, err_msg=path)


def test_logits_never_exist_whole():
    """Forward and backward of a model with a large vocabulary take much less than its logits."""
    config = dataclasses.replace(CONFIG, vocab=50_000, layers=1, windows=(), heads=1, kv_heads=1, tied=True)
    params = decoder.abstract_params(config)
    batch = {
        "tokens": jax.ShapeDtypeStruct((8, 512), jnp.int32),
        "weights": jax.ShapeDtypeStruct((8, 512), jnp.float32),
    }

    def f(p, b):
        return jax.grad(lambda p: loss.causal_lm(config)(p, b)[0])(p)

    used = jax.jit(f).lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    whole = 4 * 1024 * config.vocab * 4
    assert used < whole / 3


@pytest.mark.parametrize(("weight", "hidden"), [(1.0, 0.0), (0.25, 0.5)])
def test_distillation_by_hand(getkey, rng, weight, hidden):
    """A student of half the layers: its blocks learn from every second of the teacher's."""
    teacher_config = dataclasses.replace(CONFIG, layers=4, windows=())
    params, teacher = large(decoder.init_params(CONFIG, getkey())), large(decoder.init_params(teacher_config, getkey()))
    batch, t = a_batch(rng), 2.0
    f = loss.distillation(CONFIG, teacher_config, temperature=t, teacher_weight=weight, hidden_weight=hidden)
    got, total = jax.jit(f)(params, teacher, batch)
    logits = compiled.apply(CONFIG, params, batch["tokens"])[:, :-1]
    theirs = compiled.apply(teacher_config, teacher, batch["tokens"])[:, :-1]
    p, q = jax.nn.softmax(theirs / t), jax.nn.softmax(logits / t)
    kl = t * t * jnp.sum(p * jnp.log(p / q), axis=-1)
    want = jnp.sum(kl * batch["weights"][:, 1:]) * weight + (1 - weight) * by_hand(CONFIG, params, batch)
    x, y = compiled.embed(CONFIG)(params, batch["tokens"]), compiled.embed(teacher_config)(teacher, batch["tokens"])
    for i in range(4):
        y = compiled.block(teacher_config, i)(teacher["blocks"][str(i)], y)
        if i % 2:
            x = compiled.block(CONFIG, i // 2)(params["blocks"][str(i // 2)], x)
            distance = jnp.sum((x - y) ** 2, -1) / jnp.sum(y**2, -1)
            want += hidden / 2 * jnp.sum(distance[:, :-1] * batch["weights"][:, 1:])
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(total, batch["weights"][:, 1:].sum(), rtol=1e-6)
    same = loss.distillation(CONFIG, CONFIG, temperature=t, hidden_weight=1.0)(params, params, batch)[0]
    np.testing.assert_allclose(same, 0, atol=1e-4)


def test_teachers_that_do_not_fit():
    with pytest.raises(JpruneError, match="teacher's vocabulary has 41 tokens and the model's 40"):
        loss.distillation(CONFIG, dataclasses.replace(CONFIG, vocab=41))
    wide = dataclasses.replace(CONFIG, d_model=20)
    loss.distillation(CONFIG, wide)
    with pytest.raises(JpruneError, match="the hidden size is 16 and the teacher's 20"):
        loss.distillation(CONFIG, wide, hidden_weight=0.1)
