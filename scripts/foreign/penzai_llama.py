"""A Llama of penzai: its axes have names, and its parameters are a list of variables that are bound to their places."""

import jax
from penzai import pz
from penzai.models.transformer.variants.llamalike_common import LlamalikeTransformerConfig, build_llamalike_transformer


def made():
    config = LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=32,
        projection_dim=8,
        mlp_hidden_dim=96,
        num_decoder_blocks=2,
        vocab_size=64,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    model, variables = pz.unbind_params(build_llamalike_transformer(config, jax.random.key(0)), freeze=True)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)

    def logits(params, tokens):
        bound = pz.bind_variables(model, params.values())
        return bound(pz.nx.wrap(tokens).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return logits, {variable.label: variable for variable in variables}, (tokens,)
