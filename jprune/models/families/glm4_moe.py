"""GLM-4.5 to 4.7: half of each head turned, and DeepSeek-V3's experts after the first layers."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, qwen3_moe, shared
from jprune.models.families.table import Family

_SHARED = "model.layers.{i}.mlp.shared_experts."
EXPERTS = qwen3_moe.EXPERTS | {
    "mlp/router/correction": ("model.layers.{i}.mlp.gate.e_score_correction_bias", "experts"),
    "mlp/shared/gate/kernel": (_SHARED + "gate_proj.weight", "d_shared d_model"),
    "mlp/shared/up/kernel": (_SHARED + "up_proj.weight", "d_shared d_model"),
    "mlp/shared/down/kernel": (_SHARED + "down_proj.weight", "d_model d_shared"),
}
ROUTING: dict[str, Any] = {"routing_scores": "sigmoid", "routing_correction": True, "group_best": 2}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(
        architecture,
        hf,
        rope=shared.rope(hf, partial=0.5),
        qk_norm=bool(hf["use_qk_norm"]),
        qkv_bias=bool(hf["attention_bias"]),
        normalise_routing=bool(hf["norm_topk_prob"]),
        **shared.grouped_experts(hf),
        **ROUTING,
    )


FAMILY = Family(
    architectures=("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 151552,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK | EXPERTS,
    variants=(
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "use_qk_norm": True,
            "first_k_dense_replace": 0,
        },
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "attention_bias": True,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "n_group": 3,
            "topk_group": 2,
        },
    ),
)
