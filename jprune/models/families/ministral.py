"""Ministral: Mistral whose layers may see a sliding window or everything, each as config.json says."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, mistral, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    kinds = hf["layer_types"] or ["sliding_attention"] * hf["num_hidden_layers"]
    return shared.config(architecture, hf, windows=shared.windows({**hf, "layer_types": kinds}))


FAMILY = Family(
    architectures=("MinistralForCausalLM",),
    model_type="ministral",
    defaults={**mistral.FAMILY.defaults, "layer_types": None},
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}, {"sliding_window": 5}),
)
