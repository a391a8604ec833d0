"""Qwen3: LLaMA's shape with RMSNorm on queries and keys, and a head size of its own."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, qwen2, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["attention_bias"])
    return shared.config(architecture, hf, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=qwen2.windows(hf))


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    defaults=qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False},
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({}, {"attention_bias": True}),
)
