"""Gemma 3 (text): Gemma 2 with norms of queries and keys instead of caps, and two rotary bases."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import gemma2, llama, shared
from jprune.models.families.table import Family
from jprune.models.rope import Rope


def _ropes(hf: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The ropes of layers that see everything and of those with a window: nested in newer files, else two bases."""
    given = hf.get("rope_parameters") or {}
    whole = {"rope_theta": hf["rope_theta"]} | (given.get("full_attention") or {}) | (hf.get("rope_scaling") or {})
    local = {"rope_theta": hf["rope_local_base_freq"]} | (given.get("sliding_attention") or {})
    sizes = {key: hf[key] for key in ("max_position_embeddings", "head_dim")}
    return shared.rope(sizes | {"rope_parameters": whole}), shared.rope(sizes | {"rope_parameters": local})


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    whole, local = _ropes(hf)
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
