"""A small model in memory with the face of a checkpoint, and what a whole forward pass says of it."""

import compiled
import jax.numpy as jnp
import numpy as np

from jprune.models import decoder
from jprune.models.config import DecoderConfig

CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab=37,
    d_model=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    d_ff=24,
    context=64,
)


class Model:
    """A model in memory with the face of a checkpoint."""

    def __init__(self, params, config=CONFIG):
        self.config, self.tree = config, params
        self.model = decoder.in_blocks(config)

    def params(self, prefix):
        tree = self.tree
        for key in prefix.split("/"):
            tree = tree[key]
        return tree

    def logits(self, tokens):
        return np.asarray(compiled.apply(self.config, self.tree, jnp.asarray(tokens)), np.float64)[:, :-1]
