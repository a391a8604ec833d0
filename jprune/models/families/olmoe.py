"""OLMoE: OLMo 2's norms of queries and keys, but norms before attention and experts, which take the MLP's place."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import llama, olmo2, qwen3_moe, shared
from jprune.models.families.table import Family

BLOCK = llama.BLOCK | {key: olmo2.BLOCK[key] for key in ("attn/q_norm/scale", "attn/k_norm/scale")}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    if hf["clip_qkv"] is not None:
        raise JpruneError("OLMoE with clip_qkv (queries, keys and values that are clipped) is not supported")
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        qk_norm=True,
        qk_norm_kind="joint",
        qkv_bias=bias,
        o_bias=bias,
        experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        normalise_routing=bool(hf["norm_topk_prob"]),
    )


FAMILY = Family(
    architectures=("OlmoeForCausalLM",),
    model_type="olmoe",
    defaults={key: value for key, value in llama.DEFAULTS.items() if key != "head_dim"}
    | {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK | qwen3_moe.EXPERTS,
    variants=(
        {"num_experts": 4, "num_experts_per_tok": 2},
        {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "attention_bias": True},
    ),
)
