"""GPT-2: learned positions, kernels stored input first (Conv1D), queries, keys and values in one tensor."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("transformer.wte.weight", "vocab d_model"),
    "embed/positions": ("transformer.wpe.weight", "positions d_model"),
    "final_norm/scale": ("transformer.ln_f.weight", "d_model"),
    "final_norm/bias": ("transformer.ln_f.bias", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
}
BLOCK = {
    "attn_norm/scale": ("transformer.h.{i}.ln_1.weight", "d_model"),
    "attn_norm/bias": ("transformer.h.{i}.ln_1.bias", "d_model"),
    "attn/q/kernel": ("transformer.h.{i}.attn.c_attn.weight", "d_model (<heads>+kv_heads+kv_heads head_dim)"),
    "attn/q/bias": ("transformer.h.{i}.attn.c_attn.bias", "(<heads>+kv_heads+kv_heads head_dim)"),
    "attn/k/kernel": ("transformer.h.{i}.attn.c_attn.weight", "d_model (heads+<kv_heads>+kv_heads head_dim)"),
    "attn/k/bias": ("transformer.h.{i}.attn.c_attn.bias", "(heads+<kv_heads>+kv_heads head_dim)"),
    "attn/v/kernel": ("transformer.h.{i}.attn.c_attn.weight", "d_model (heads+kv_heads+<kv_heads> head_dim)"),
    "attn/v/bias": ("transformer.h.{i}.attn.c_attn.bias", "(heads+kv_heads+<kv_heads> head_dim)"),
    "attn/o/kernel": ("transformer.h.{i}.attn.c_proj.weight", "(heads head_dim) d_model"),
    "attn/o/bias": ("transformer.h.{i}.attn.c_proj.bias", "d_model"),
    "mlp_norm/scale": ("transformer.h.{i}.ln_2.weight", "d_model"),
    "mlp_norm/bias": ("transformer.h.{i}.ln_2.bias", "d_model"),
    "mlp/up/kernel": ("transformer.h.{i}.mlp.c_fc.weight", "d_model d_ff"),
    "mlp/up/bias": ("transformer.h.{i}.mlp.c_fc.bias", "d_ff"),
    "mlp/down/kernel": ("transformer.h.{i}.mlp.c_proj.weight", "d_ff d_model"),
    "mlp/down/bias": ("transformer.h.{i}.mlp.c_proj.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf[key]:
            raise JpruneError(f"GPT-2 with {key} is not supported")
    return shared.config(
        architecture,
        hf,
        rope=None,
        positions=hf["max_position_embeddings"],
        norm="layer",
        norm_bias=True,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        score_scale=None if hf["scale_attn_weights"] else 1.0,
    )


FAMILY = Family(
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    variants=({}, {"n_inner": 24, "activation_function": "relu"}),
)
