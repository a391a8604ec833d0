"""Mistral: LLaMA's shape with a sliding window in every layer."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(architecture, hf, windows=(hf["sliding_window"],) * hf["num_hidden_layers"])


FAMILY = Family(
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    defaults=llama.DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({"sliding_window": 5}, {"sliding_window": None}),
)
