"""A decoder layer of Haiku."""

import haiku as hk
import jax


def forward(tokens):
    x = hk.Embed(64, 32)(tokens)
    norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)
    h = norm(x)
    x = x + hk.MultiHeadAttention(4, 8, w_init=hk.initializers.VarianceScaling(), model_size=32)(h, h, h)
    x = x + hk.nets.MLP([96, 32], activation=jax.nn.gelu)(x)
    return hk.Linear(64, name="head")(x)


def made():
    model = hk.without_apply_rng(hk.transform(forward))
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    return model.apply, model.init(jax.random.key(0), tokens), (tokens,)
