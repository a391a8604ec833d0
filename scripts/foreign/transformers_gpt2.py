"""FlaxGPT2 of transformers 4: kernels are [out, in], query, key and value in one, and the embedding is the head."""

import jax
from transformers import FlaxGPT2LMHeadModel, GPT2Config


def made():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = FlaxGPT2LMHeadModel(config, seed=0)
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    return lambda params, tokens: model(tokens, params=params).logits, model.params, (tokens,)
