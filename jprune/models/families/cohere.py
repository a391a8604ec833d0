"""Cohere Command R: LayerNorm without bias, attention and MLP side by side behind one norm, scaled logits."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family

BLOCK = llama.BLOCK | {
    "attn/q_norm/scale": ("model.layers.{i}.self_attn.q_norm.weight", "heads head_dim"),
    "attn/k_norm/scale": ("model.layers.{i}.self_attn.k_norm.weight", "kv_heads head_dim"),
}


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """What both generations share; `options` are the fields in which they differ."""
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        norm="layer",
        parallel=True,
        shared_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        logit_scale=float(hf["logit_scale"]),
        **options,
    )


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    rope = shared.rope(hf, interleaved=True)
    return config(architecture, hf, rope=rope, qk_norm=bool(hf["use_qk_norm"]), qk_norm_kind="own")


FAMILY = Family(
    architectures=("CohereForCausalLM",),
    model_type="cohere",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "logit_scale": 0.0625,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "attention_bias": False,
        "use_qk_norm": False,
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=({"logit_scale": 0.5}, {"logit_scale": 0.5, "use_qk_norm": True, "attention_bias": True}),
)
