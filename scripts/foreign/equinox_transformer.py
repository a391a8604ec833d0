"""An encoder layer of equinox: kernels are [out, in], and functions lie among the parameters."""

import equinox as eqx
import jax


class Encoder(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(64, 32, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(4, 32, key=keys[1])
        self.norm = eqx.nn.LayerNorm(32)
        self.mlp = eqx.nn.MLP(32, 32, 96, 1, activation=jax.nn.gelu, key=keys[2])
        self.head = eqx.nn.Linear(32, 32, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return jax.vmap(self.head)(x + jax.vmap(self.mlp)(x))


def made():
    params, static = eqx.partition(Encoder(jax.random.key(0)), eqx.is_inexact_array)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    return lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens), params, (tokens,)
