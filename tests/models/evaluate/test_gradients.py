"""Gradients block by block are those of the whole model, and of each example by itself."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.checkpoints import load
from jprune.evaluate import gradients


def whole_model_loss(config, params, ids):
    """Mean cross-entropy of one example, from the logits of the whole model."""
    logits = compiled.apply(config, params, ids[None])[0, :-1]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], axis=-1))


@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_whole_model(tiny_model, rng, tied):
    checkpoint = load(tiny_model(tie_word_embeddings=tied))
    tokens = rng.integers(0, 96, (5, 12), dtype=np.int32)
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    whole = jax.jit(jax.value_and_grad(lambda p, x: whole_model_loss(checkpoint.config, p, x)))
    losses, per_example = zip(*(whole(params, jnp.asarray(ids)) for ids in tokens))
    stacked = jax.tree.map(lambda *x: np.stack(x), *per_example)
    mean = trees.flatten(jax.tree.map(lambda g: g.mean(0), stacked))
    square = trees.flatten(jax.tree.map(lambda g: (g * g).mean(0), stacked))
    seen = {}

    def visit(g):
        for path, value in trees.flatten(g.mean).items():
            full = f"{g.prefix}/{path}" if g.prefix else path
            assert full not in seen
            seen[full] = True
            np.testing.assert_allclose(value, mean[full], rtol=2e-4, atol=2e-6, err_msg=full)
            np.testing.assert_allclose(trees.flatten(g.square)[path], square[full], rtol=5e-4, atol=1e-9, err_msg=full)
            np.testing.assert_array_equal(trees.flatten(g.params)[path], trees.flatten(params)[full])

    loss = gradients.stream(checkpoint, tokens, visit=visit, squares=True, ends=True)
    assert set(seen) == set(mean)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_without_squares_and_ends(tiny_model, rng):
    checkpoint = load(tiny_model())
    visited, steps = [], []
    gradients.stream(
        checkpoint,
        rng.integers(0, 96, (2, 8), dtype=np.int32),
        visit=lambda g: visited.append((g.prefix, g.square)),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert visited == [("blocks/2", None), ("blocks/1", None), ("blocks/0", None)]
    assert steps == [(i, 8) for i in range(1, 9)]
