"""Distances of two models from whole models' logits in NumPy, token by token."""

import jax
import numpy as np
import pytest
from in_memory import CONFIG, Model

from jprune.errors import JpruneError
from jprune.evaluate import distance as module
from jprune.evaluate.distance import Reference
from jprune.evaluate.perplexity import mean_nll
from jprune.models import decoder
from jprune.models.config import DecoderConfig


@pytest.fixture
def models(getkey):
    """Two that lie near each other; large weights, or every token would be as likely as another."""
    params = jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, decoder.init_params(CONFIG, getkey()))
    other = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(getkey(), x.shape), params)
    return Model(params), Model(other)


@pytest.mark.parametrize("rows", [None, 5])
def test_every_token_from_whole_logits(models, rng, monkeypatch, four_devices, rows):
    """In chunks of rows that do not fit, on several devices, and with windows that fill up a micro-batch."""
    dense, pruned = models
    tokens = rng.integers(0, 37, (5, 12), dtype=np.int32)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (dense.logits(tokens), pruned.logits(tokens)))
    if rows:
        monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 4 * 37 * rows)
        with four_devices():
            found = Reference(dense, tokens).to(pruned)
    else:
        reference = Reference(dense, tokens)
        found, same = reference.to(pruned), reference.to_itself()
        assert same.agrees.all()
        np.testing.assert_array_equal(same.divergence, 0)
        np.testing.assert_allclose(same.nll, mean_nll(dense, tokens), rtol=1e-6)
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum(-1), rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(found.agrees, p.argmax(-1) == q.argmax(-1))
    assert 0.1 < found.agrees.mean() < 0.95
    nll = -np.take_along_axis(q, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nll, nll.mean(1), rtol=1e-5)


def test_models_that_have_nothing_to_do_with_each_other(models, getkey):
    other = DecoderConfig(**{**vars(CONFIG), "vocab": 38})
    reference = Reference(models[0], np.zeros((1, 3), np.int32))
    with pytest.raises(JpruneError, match="one vocabulary, got 37 tokens and 38"):
        reference.to(Model(decoder.init_params(other, getkey()), other))


def test_no_head_is_in_memory_beside_blocks(models, rng):
    """Neither model's, which in a small model of a large vocabulary would be most of what is in memory."""
    dense, pruned = (Model(jax.tree.map(np.asarray, model.tree)) for model in models)

    def heads():
        return {id(x) for x in jax.live_arrays() if x.shape == (16, 37)}

    fixtures, beside = heads(), []
    reference = Reference(dense, rng.integers(0, 37, (2, 6), dtype=np.int32))
    reference.to_itself()
    reference.to(pruned, progress=lambda done, total: beside.append(heads() - fixtures))
    assert beside == [set()] * CONFIG.layers
