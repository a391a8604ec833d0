"""MaxText's own decoder, small: a scan over layers that lie on axis 1, with boxes around its parameters."""

import functools
import tempfile

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from maxtext.configs import pyconfig
from maxtext.models.models import transformer_as_linen
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR
from maxtext.utils.maxtext_utils import create_device_mesh

SIZES = {
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_mlp_dim": 96,
    "base_num_decoder_layers": 3,
    "vocab_size": 64,
    "max_target_length": 16,
    "per_device_batch_size": 8,
    "dtype": "float32",
    "attention": "dot_product",
}
RUN = {
    "run_name": "account",
    "base_output_directory": tempfile.gettempdir(),
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "log_config": False,
}


@functools.cache
def configured(**more):
    return pyconfig.initialize(["", f"{MAXTEXT_CONFIGS_DIR}/base.yml"], **{**SIZES, **RUN, **more})


def made(config=None):
    config = config or configured()
    model = transformer_as_linen(config, Mesh(create_device_mesh(config), config.mesh_axes), quant=None)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    positions = jnp.broadcast_to(jnp.arange(16), (8, 16))
    keys = dict(zip(("params", "dropout", "aqt"), jax.random.split(jax.random.key(0), 3)))
    variables = nn.unbox(model.init(keys, tokens, positions, enable_dropout=False))

    def logits(variables, tokens, positions):
        return model.apply(variables, tokens, positions, enable_dropout=False, rngs=keys)

    return logits, variables, (tokens, positions)
