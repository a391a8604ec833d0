"""A decoder layer of Flax NNX, with the caches of its attention."""

import jax
from flax import nnx


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=True, rngs=rngs)
        self.up = nnx.Linear(32, 96, rngs=rngs)
        self.down = nnx.Linear(96, 32, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def made():
    model = Decoder(nnx.Rngs(0))
    for layer in model.layers:
        layer.attention.init_cache((64, 8, 32))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(1), (64, 1), 0, 64)  # one a step, as decoding goes
    return lambda params, rest, tokens: nnx.merge(graph, params, rest)(tokens), params, (rest, tokens)
