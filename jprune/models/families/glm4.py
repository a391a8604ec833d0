"""GLM-4 of 2025 (0414): GLM-4 with norms after attention and MLP as well."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import glm, llama
from jprune.models.families.table import Family

BLOCK = glm.BLOCK | {
    "attn_post_norm/scale": ("model.layers.{i}.post_self_attn_layernorm.weight", "d_model"),
    "mlp_post_norm/scale": ("model.layers.{i}.post_mlp_layernorm.weight", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return glm.config(architecture, hf, post_norm=True)


FAMILY = Family(
    architectures=("Glm4ForCausalLM",),
    model_type="glm4",
    defaults=glm.FAMILY.defaults,
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=(
        {},
        {"attention_bias": False, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ),
)
