"""Gemma 2: norms before and after attention and MLP, capped scores and logits, a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import gemma, llama, shared
from jprune.models.families.table import Family

BLOCK = llama.BLOCK | {
    "attn_post_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "d_model"),
    "mlp_norm/scale": ("model.layers.{i}.pre_feedforward_layernorm.weight", "d_model"),
    "mlp_post_norm/scale": ("model.layers.{i}.post_feedforward_layernorm.weight", "d_model"),
}


def config(architecture: str, hf: Mapping[str, Any], *, pattern: int, **options: Any) -> DecoderConfig:
    """What Gemma 2 and 3 share; without `layer_types` every layer has a window but each `pattern`-th."""
    return gemma.config(
        architecture,
        hf,
        windows=shared.windows(hf, pattern=pattern),
        post_norm=True,
        score_scale=hf["query_pre_attn_scalar"] ** -0.5,
        score_cap=hf["attn_logit_softcapping"],
        logit_cap=hf["final_logit_softcapping"],
        **options,
    )


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return config(architecture, hf, pattern=2)


DEFAULTS = gemma.DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
FAMILY = Family(
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    defaults=DEFAULTS,
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=(
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 1.0,
        },
        {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
)
