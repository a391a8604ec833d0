"""ERNIE 4.5 (dense): Llama's shape with neighbouring dimensions turned, and biases everywhere or nowhere."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["use_bias"])
    rope = shared.rope(hf, interleaved=True)
    return shared.config(architecture, hf, rope=rope, qkv_bias=bias, o_bias=bias, mlp_bias=bias)


FAMILY = Family(
    architectures=("Ernie4_5ForCausalLM",),
    model_type="ernie4_5",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({}, {"use_bias": True}),
)
