"""GPT-NeoX and Pythia: attention and MLP side by side, a quarter of each head turned, q, k, v of each head together."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("gpt_neox.embed_in.weight", "vocab d_model"),
    "final_norm/scale": ("gpt_neox.final_layer_norm.weight", "d_model"),
    "final_norm/bias": ("gpt_neox.final_layer_norm.bias", "d_model"),
    "head/kernel": ("embed_out.weight", "vocab d_model"),
}
BLOCK = {
    "attn_norm/scale": ("gpt_neox.layers.{i}.input_layernorm.weight", "d_model"),
    "attn_norm/bias": ("gpt_neox.layers.{i}.input_layernorm.bias", "d_model"),
    "attn/q/kernel": ("gpt_neox.layers.{i}.attention.query_key_value.weight", "(heads <1>+1+1 head_dim) d_model"),
    "attn/q/bias": ("gpt_neox.layers.{i}.attention.query_key_value.bias", "(heads <1>+1+1 head_dim)"),
    "attn/k/kernel": ("gpt_neox.layers.{i}.attention.query_key_value.weight", "(kv_heads 1+<1>+1 head_dim) d_model"),
    "attn/k/bias": ("gpt_neox.layers.{i}.attention.query_key_value.bias", "(kv_heads 1+<1>+1 head_dim)"),
    "attn/v/kernel": ("gpt_neox.layers.{i}.attention.query_key_value.weight", "(kv_heads 1+1+<1> head_dim) d_model"),
    "attn/v/bias": ("gpt_neox.layers.{i}.attention.query_key_value.bias", "(kv_heads 1+1+<1> head_dim)"),
    "attn/o/kernel": ("gpt_neox.layers.{i}.attention.dense.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("gpt_neox.layers.{i}.attention.dense.bias", "d_model"),
    "mlp_norm/scale": ("gpt_neox.layers.{i}.post_attention_layernorm.weight", "d_model"),
    "mlp_norm/bias": ("gpt_neox.layers.{i}.post_attention_layernorm.bias", "d_model"),
    "mlp/up/kernel": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight", "d_ff d_model"),
    "mlp/up/bias": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias", "d_ff"),
    "mlp/down/kernel": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight", "d_model d_ff"),
    "mlp/down/bias": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        rope=shared.rope({"rope_theta": hf["rotary_emb_base"], **hf}, partial=hf["rotary_pct"]),
        norm="layer",
        norm_bias=True,
        parallel=bool(hf["use_parallel_residual"]),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
    )


FAMILY = Family(
    architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "attention_bias": True,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    variants=({}, {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}),
)
