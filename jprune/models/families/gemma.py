"""Gemma 1: Llama's shape with a scaled embedding and norm scales stored less one."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """What all Gemmas share; `options` are the fields in which one differs."""
    if hf["use_bidirectional_attention"]:
        raise JpruneError("Gemma with bidirectional attention is an encoder; only the causal models are supported")
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        norm_offset=True,
        embed_scale=hf["hidden_size"] ** 0.5,
        qkv_bias=bias,
        o_bias=bias,
        **options,
    )


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    # Early files say "gelu" and mean the approximation the models were trained with.
    name = "gelu_pytorch_tanh" if hf["hidden_act"] == "gelu" else hf["hidden_act"]
    return config(architecture, hf, activation=shared.activation(name))


DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
}
FAMILY = Family(
    architectures=("GemmaForCausalLM",),
    model_type="gemma",
    defaults=DEFAULTS | {"hidden_act": "gelu_pytorch_tanh"},
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=({}, {"hidden_act": "gelu", "attention_bias": True}),
)
