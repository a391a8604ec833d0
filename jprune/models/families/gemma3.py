"""Gemma 3 (text): Gemma 2 with norms of queries and keys instead of caps, and two rotary bases."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import gemma2, llama, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    whole, local = shared.ropes(hf, local_theta=hf["rope_local_base_freq"])
    plain = gemma2.config(architecture, hf, pattern=hf["sliding_window_pattern"], rope=whole)
    ropes = tuple(whole if window is None else local for window in plain.windows)
    return gemma2.config(architecture, hf, pattern=hf["sliding_window_pattern"], rope=whole, ropes=ropes, qk_norm=True)


FAMILY = Family(
    architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    defaults=gemma2.DEFAULTS
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    config=_config,
    model=llama.MODEL,
    block=gemma2.BLOCK,
    variants=(
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 6},
        {
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
)
