"""BLOOM: ALiBi, a norm on the embedding, and queries, keys and values of each head side by side in one tensor."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("transformer.word_embeddings.weight", "vocab d_model"),
    "embed/norm/scale": ("transformer.word_embeddings_layernorm.weight", "d_model"),
    "embed/norm/bias": ("transformer.word_embeddings_layernorm.bias", "d_model"),
    "final_norm/scale": ("transformer.ln_f.weight", "d_model"),
    "final_norm/bias": ("transformer.ln_f.bias", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
}
BLOCK = {
    "attn_norm/scale": ("transformer.h.{i}.input_layernorm.weight", "d_model"),
    "attn_norm/bias": ("transformer.h.{i}.input_layernorm.bias", "d_model"),
    "attn/q/kernel": ("transformer.h.{i}.self_attention.query_key_value.weight", "(heads <1>+1+1 head_dim) d_model"),
    "attn/q/bias": ("transformer.h.{i}.self_attention.query_key_value.bias", "(heads <1>+1+1 head_dim)"),
    "attn/k/kernel": ("transformer.h.{i}.self_attention.query_key_value.weight", "(kv_heads 1+<1>+1 head_dim) d_model"),
    "attn/k/bias": ("transformer.h.{i}.self_attention.query_key_value.bias", "(kv_heads 1+<1>+1 head_dim)"),
    "attn/v/kernel": ("transformer.h.{i}.self_attention.query_key_value.weight", "(kv_heads 1+1+<1> head_dim) d_model"),
    "attn/v/bias": ("transformer.h.{i}.self_attention.query_key_value.bias", "(kv_heads 1+1+<1> head_dim)"),
    "attn/o/kernel": ("transformer.h.{i}.self_attention.dense.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("transformer.h.{i}.self_attention.dense.bias", "d_model"),
    "mlp_norm/scale": ("transformer.h.{i}.post_attention_layernorm.weight", "d_model"),
    "mlp_norm/bias": ("transformer.h.{i}.post_attention_layernorm.bias", "d_model"),
    "mlp/up/kernel": ("transformer.h.{i}.mlp.dense_h_to_4h.weight", "d_ff d_model"),
    "mlp/up/bias": ("transformer.h.{i}.mlp.dense_h_to_4h.bias", "d_ff"),
    "mlp/down/kernel": ("transformer.h.{i}.mlp.dense_4h_to_h.weight", "d_model d_ff"),
    "mlp/down/bias": ("transformer.h.{i}.mlp.dense_4h_to_h.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    if hf["apply_residual_connection_post_layernorm"]:
        raise JpruneError("BLOOM with apply_residual_connection_post_layernorm is not supported")
    return shared.config(
        architecture,
        hf,
        rope=None,
        alibi=True,
        embed_norm=True,
        norm="layer",
        norm_bias=True,
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


FAMILY = Family(
    architectures=("BloomForCausalLM",),
    model_type="bloom",
    names={
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "seq_length",
    },
    defaults={
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "seq_length": 2048,  # ALiBi has no longest sequence; this is what BLOOM was trained on
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
)
