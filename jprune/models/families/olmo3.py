"""OLMo 3: OLMo 2 with a sliding window in three of four layers, whose rotary embeddings are never scaled."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, olmo2, shared
from jprune.models.families.table import Family

_THETA = 500_000.0


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    whole, local = shared.ropes(hf, local_theta=_THETA)  # a rope_theta outside rope_parameters is of the former alone
    windows = shared.windows(hf, pattern=4)
    kinds = shared.kinds(hf, pattern=4)
    ropes = tuple(local if kind == "sliding_attention" else whole for kind in kinds)
    return olmo2.config(architecture, hf, rope=whole, ropes=ropes, windows=windows)


FAMILY = Family(
    architectures=("Olmo3ForCausalLM",),
    model_type="olmo3",
    defaults={**olmo2.FAMILY.defaults, "rope_theta": _THETA, "sliding_window": 4096, "layer_types": None},
    config=_config,
    model=llama.MODEL,
    block=olmo2.BLOCK,
    variants=(
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8},
        },
    ),
)
