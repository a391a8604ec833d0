"""A decoder layer of Flax Linen."""

import jax
from flax import linen as nn


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        h = nn.Dense(96, use_bias=False)(nn.LayerNorm()(x))
        return x + nn.Dense(32)(nn.gelu(h))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32)(tokens)
        x = Layer()(Layer()(x))
        return nn.Dense(64, name="head")(x)


def made():
    model, tokens = Decoder(), jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    return model.apply, model.init(jax.random.key(0), tokens), (tokens,)
