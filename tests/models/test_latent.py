"""Latent attention against transformers' module, and its two orders of summation against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.checkpoints import load
from jprune.models import decoder

pytest.importorskip("torch")
hf = pytest.importorskip("hf_families")


def test_a_model_and_tokens_one_by_one(tmp_path):
    """Positions scaled, experts in groups, a dense layer first; then one token after the other, with caches that hold
    narrow vectors and no keys or values."""
    theirs = hf.make("DeepseekV3-1")
    checkpoint = load(hf.save(theirs, tmp_path))
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.params())
    tokens = hf.tokens(9)
    want = hf.logits(theirs, tokens)

    @jax.jit
    def step(params, caches, token):
        x = decoder.embed(config)(params, token)
        kept = []
        for i, cache in enumerate(caches):
            x, cache = decoder.cached_block(config, i)(params["blocks"][str(i)], x, cache)
            kept.append(cache)
        return decoder.head(config)(params, x), kept

    blocks = [params["blocks"][str(i)] for i in range(config.layers)]
    caches = [decoder.empty_cache(block, 2, 9, jnp.float32) for block in blocks]
    assert {(cache.keys.shape, cache.values.shape) for cache in caches} == {((2, 9, 1, 12), (2, 9, 1, 4))}
    caches = [cache._replace(length=jnp.asarray(0)) for cache in caches]
    for i in range(9):
        logits, caches = step(params, caches, tokens[:, i : i + 1])
        np.testing.assert_allclose(logits[:, 0], want[:, i], atol=1e-4)
    whole = jax.jit(lambda params, tokens: decoder.apply(config, params, tokens))(params, tokens)
    np.testing.assert_allclose(whole, want, atol=1e-4)
