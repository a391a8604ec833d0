"""GLM-4 of 2024: half of each head turned, in neighbouring pairs; gate and up in one tensor."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, phi3, shared
from jprune.models.families.table import Family

BLOCK = llama.BLOCK | {key: phi3.BLOCK[key] for key in ("mlp/gate/kernel", "mlp/up/kernel")}


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """What both GLM-4 share; `options` are the fields in which the later one differs."""
    rope = shared.rope(hf, partial=0.5, interleaved=True)
    return shared.config(architecture, hf, rope=rope, qkv_bias=bool(hf["attention_bias"]), **options)


FAMILY = Family(
    architectures=("GlmForCausalLM",),
    model_type="glm",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
    },
    config=config,
    model=llama.MODEL,
    block=BLOCK,
    variants=({}, {"attention_bias": False, "partial_rotary_factor": 1.0}),
)
