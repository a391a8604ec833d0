"""Granite 3: Llama with multipliers of the embedding, the scores, the residuals and the logits."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """What Granite and its mixture of experts share; `options` are the fields in which they differ."""
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        embed_scale=float(hf["embedding_multiplier"]),
        score_scale=float(hf["attention_multiplier"]),
        residual_scale=float(hf["residual_multiplier"]),
        logit_scale=1.0 / hf["logits_scaling"],
        qkv_bias=bias,
        o_bias=bias,
        **options,
    )


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return config(architecture, hf, mlp_bias=bool(hf["mlp_bias"]))


FAMILY = Family(
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    defaults={
        **llama.FAMILY.defaults,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=(
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "mlp_bias": True,
            "attention_bias": True,
        },
    ),
)
