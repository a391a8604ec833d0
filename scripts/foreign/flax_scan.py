"""Layers of Flax Linen as one scan over stacked kernels, the layers on axis 1 as MaxText has them."""

import jax
from flax import linen as nn


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        q, k, v = (nn.DenseGeneral((4, 8), use_bias=False, name=name)(nn.RMSNorm()(x)) for name in ("q", "k", "v"))
        x = x + nn.DenseGeneral(32, axis=(-2, -1), use_bias=False, name="out")(nn.dot_product_attention(q, k, v))
        h = nn.RMSNorm()(x)
        gated = nn.silu(nn.Dense(96, use_bias=False, name="wi_0")(h)) * nn.Dense(96, use_bias=False, name="wi_1")(h)
        return x + nn.Dense(32, use_bias=False, name="wo")(gated), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32, name="token_embedder")(tokens)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(64, use_bias=False, name="logits_dense")(nn.RMSNorm()(x))


def made():
    model, tokens = Decoder(), jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    return model.apply, model.init(jax.random.key(0), tokens), (tokens,)
