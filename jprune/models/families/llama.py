"""Llama 1, 2 and 3.x, SmolLM2, and the table that families of the same shape share."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("model.embed_tokens.weight", "vocab d_model"),
    "final_norm/scale": ("model.norm.weight", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
}
BLOCK = {
    "attn_norm/scale": ("model.layers.{i}.input_layernorm.weight", "d_model"),
    "attn/q/kernel": ("model.layers.{i}.self_attn.q_proj.weight", "(heads head_dim) d_model"),
    "attn/q/bias": ("model.layers.{i}.self_attn.q_proj.bias", "(heads head_dim)"),
    "attn/q_norm/scale": ("model.layers.{i}.self_attn.q_norm.weight", "head_dim"),
    "attn/k/kernel": ("model.layers.{i}.self_attn.k_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/k/bias": ("model.layers.{i}.self_attn.k_proj.bias", "(kv_heads head_dim)"),
    "attn/k_norm/scale": ("model.layers.{i}.self_attn.k_norm.weight", "head_dim"),
    "attn/v/kernel": ("model.layers.{i}.self_attn.v_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/v/bias": ("model.layers.{i}.self_attn.v_proj.bias", "(kv_heads head_dim)"),
    "attn/o/kernel": ("model.layers.{i}.self_attn.o_proj.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("model.layers.{i}.self_attn.o_proj.bias", "d_model"),
    "mlp_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "d_model"),
    "mlp/gate/kernel": ("model.layers.{i}.mlp.gate_proj.weight", "d_ff d_model"),
    "mlp/gate/bias": ("model.layers.{i}.mlp.gate_proj.bias", "d_ff"),
    "mlp/up/kernel": ("model.layers.{i}.mlp.up_proj.weight", "d_ff d_model"),
    "mlp/up/bias": ("model.layers.{i}.mlp.up_proj.bias", "d_ff"),
    "mlp/down/kernel": ("model.layers.{i}.mlp.down_proj.weight", "d_model d_ff"),
    "mlp/down/bias": ("model.layers.{i}.mlp.down_proj.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["attention_bias"])
    return shared.config(architecture, hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf["mlp_bias"]))


DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    defaults=DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    config=_config,
    model=MODEL,
    block=BLOCK,
    variants=({}, {"attention_bias": True, "mlp_bias": True}),
)
