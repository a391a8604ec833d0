"""OLMo 2: norms only after attention and MLP, and over all queries (or keys) of a token together."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family

BLOCK = llama.BLOCK | {
    "attn_post_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "d_model"),
    "attn/q_norm/scale": ("model.layers.{i}.self_attn.q_norm.weight", "(heads head_dim)"),
    "attn/k_norm/scale": ("model.layers.{i}.self_attn.k_norm.weight", "(kv_heads head_dim)"),
    "mlp_post_norm/scale": ("model.layers.{i}.post_feedforward_layernorm.weight", "d_model"),
}


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """What OLMo 2 and 3 share; `options` are the fields in which the latter differs."""
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        pre_norm=False,
        post_norm=True,
        qk_norm=True,
        qk_norm_kind="joint",
        qkv_bias=bias,
        o_bias=bias,
        **options,
    )


FAMILY = Family(
    architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    defaults=llama.DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False},
    config=config,
    model=llama.MODEL,
    block=BLOCK,
    variants=({}, {"attention_bias": True}),
)
