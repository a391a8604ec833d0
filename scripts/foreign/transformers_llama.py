"""FlaxLlama of transformers 4: kernels are [in, out], and what multiplies the queries is a table of angles."""

import jax
from transformers import FlaxLlamaForCausalLM, LlamaConfig


def made():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = FlaxLlamaForCausalLM(config, seed=0)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    return lambda params, tokens: model(tokens, params=params).logits, model.params, (tokens,)
