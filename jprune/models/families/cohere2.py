"""Cohere Command R7B and A: Command R with a window in three of four layers, and no positions in the fourth."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import cohere, llama, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    rope = shared.rope(hf, interleaved=True)
    windows = shared.windows(hf, pattern=hf["sliding_window_pattern"])
    ropes = tuple(None if window is None else rope for window in windows)
    return cohere.config(architecture, hf, rope=rope, ropes=ropes, windows=windows)


FAMILY = Family(
    architectures=("Cohere2ForCausalLM",),
    model_type="cohere2",
    defaults={key: value for key, value in cohere.FAMILY.defaults.items() if key not in ("rope_theta", "use_qk_norm")}
    | {"head_dim": None, "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=(
        {"logit_scale": 0.5, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {"logit_scale": 0.5, "sliding_window": 4, "sliding_window_pattern": 2, "attention_bias": True},
    ),
)
