"""Whole models as one program each: one operation after the other, every one of them would be compiled by itself."""

import jax

from jprune.models import decoder, stacked

apply = jax.jit(decoder.apply, static_argnums=0)
"""(config, params, tokens) -> logits."""
apply_stacked = jax.jit(stacked.apply, static_argnums=0)
"""Likewise, of equal blocks stacked."""


def embed(config):
    """(params, tokens) -> what the first block reads."""
    return jax.jit(decoder.embed(config))


def block(config, index):
    """(the block's params, x) -> x."""
    return jax.jit(decoder.block(config, index))
