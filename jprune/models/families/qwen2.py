"""Qwen2 and Qwen2.5: LLaMA's shape with biases on queries, keys and values, optional windows in later layers."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sliding window of each layer: from `layer_types` where given, else from `max_window_layers` on."""
    layers = range(hf["num_hidden_layers"])
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    kinds = hf["layer_types"]
    if kinds is None:
        return tuple(window if i >= hf["max_window_layers"] else None for i in layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(architecture, hf, qkv_bias=True, windows=windows(hf))


DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    defaults=DEFAULTS,
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
)
