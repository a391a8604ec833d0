"""StableLM 2 and 3B: Llama's shape with LayerNorm, a quarter of each head turned, in some a norm for every head."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family

MODEL = llama.MODEL | {"final_norm/bias": ("model.norm.bias", "d_model")}
BLOCK = llama.BLOCK | {
    "attn_norm/bias": ("model.layers.{i}.input_layernorm.bias", "d_model"),
    "mlp_norm/bias": ("model.layers.{i}.post_attention_layernorm.bias", "d_model"),
    "attn/q_norm/scale": ("model.layers.{i}.self_attn.q_layernorm.norms.{heads}.weight", "head_dim"),
    "attn/k_norm/scale": ("model.layers.{i}.self_attn.k_layernorm.norms.{kv_heads}.weight", "head_dim"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    parallel = bool(hf["use_parallel_residual"])
    return shared.config(
        architecture,
        hf,
        rope=shared.rope(hf, partial=0.25),
        norm="layer",
        norm_bias=True,
        parallel=parallel,
        shared_norm=parallel,
        qk_norm=bool(hf["qk_layernorm"]),
        qk_norm_kind="own",
        qkv_bias=bool(hf["use_qkv_bias"]),
    )


FAMILY = Family(
    architectures=("StableLmForCausalLM",),
    model_type="stablelm",
    defaults={
        "vocab_size": 50304,
        "intermediate_size": 6912,
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    variants=({"use_qkv_bias": True}, {"qk_layernorm": True, "use_parallel_residual": True}),
)
