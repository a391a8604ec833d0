"""Seed-OSS: Llama's shape with biases on queries, keys and values, and a head size of its own."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(
        architecture,
        hf,
        qkv_bias=bool(hf["attention_bias"]),
        o_bias=bool(hf["attention_out_bias"]),
        mlp_bias=bool(hf["mlp_bias"]),
    )


FAMILY = Family(
    architectures=("SeedOssForCausalLM",),
    model_type="seed_oss",
    defaults={
        **llama.FAMILY.defaults,
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524_288,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
)
