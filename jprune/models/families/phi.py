"""Phi-1, 1.5, 2: attention and MLP side by side behind one LayerNorm, part of each head turned, biases everywhere."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("model.embed_tokens.weight", "vocab d_model"),
    "final_norm/scale": ("model.final_layernorm.weight", "d_model"),
    "final_norm/bias": ("model.final_layernorm.bias", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
    "head/bias": ("lm_head.bias", "vocab"),
}
BLOCK = llama.BLOCK | {
    "attn_norm/bias": ("model.layers.{i}.input_layernorm.bias", "d_model"),
    "attn/q_norm/scale": ("model.layers.{i}.self_attn.q_layernorm.weight", "head_dim"),
    "attn/q_norm/bias": ("model.layers.{i}.self_attn.q_layernorm.bias", "head_dim"),
    "attn/k_norm/scale": ("model.layers.{i}.self_attn.k_layernorm.weight", "head_dim"),
    "attn/k_norm/bias": ("model.layers.{i}.self_attn.k_layernorm.bias", "head_dim"),
    "attn/o/kernel": ("model.layers.{i}.self_attn.dense.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("model.layers.{i}.self_attn.dense.bias", "d_model"),
    "mlp/up/kernel": ("model.layers.{i}.mlp.fc1.weight", "d_ff d_model"),
    "mlp/up/bias": ("model.layers.{i}.mlp.fc1.bias", "d_ff"),
    "mlp/down/kernel": ("model.layers.{i}.mlp.fc2.weight", "d_model d_ff"),
    "mlp/down/bias": ("model.layers.{i}.mlp.fc2.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    qk_norm = bool(hf["qk_layernorm"])
    return shared.config(
        architecture,
        hf,
        rope=shared.rope(hf, partial=0.5),
        norm="layer",
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        qk_norm=qk_norm,
        qk_norm_bias=qk_norm,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


FAMILY = Family(
    architectures=("PhiForCausalLM",),
    model_type="phi",
    defaults={
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    variants=({}, {"qk_layernorm": True, "partial_rotary_factor": 0.75}),
)
