"""A Llama of Tunix: a Flax NNX module whose kernels are read by einsums."""

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig


def made():
    config = ModelConfig(
        num_layers=2,
        vocab_size=64,
        embed_dim=32,
        hidden_dim=96,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    graph, params = nnx.split(Llama3(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)  # feed-forward kernels are zeros before they are loaded
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [jax.random.normal(key, x.shape) / 32**0.5 if not x.any() else x for key, x in zip(keys, leaves)]
    params = jax.tree.unflatten(tree, drawn)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    positions = jnp.broadcast_to(jnp.arange(16), (8, 16))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((16, 16), bool)), (8, 16, 16))

    def logits(params, tokens, positions, mask):
        return nnx.merge(graph, params)(tokens, positions, None, mask)[0]

    return logits, params, (tokens, positions, mask)
