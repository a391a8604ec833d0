"""Qwen2-MoE: Qwen2 with experts in place of the MLP, and one more that sees every token, behind a gate."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, qwen2, qwen3_moe, shared
from jprune.models.families.table import Family

BLOCK = (
    llama.BLOCK
    | qwen3_moe.EXPERTS
    | {
        "mlp/shared_gate/kernel": ("model.layers.{i}.mlp.shared_expert_gate.weight", "1 d_model"),
        "mlp/shared/gate/kernel": ("model.layers.{i}.mlp.shared_expert.gate_proj.weight", "d_shared d_model"),
        "mlp/shared/up/kernel": ("model.layers.{i}.mlp.shared_expert.up_proj.weight", "d_shared d_model"),
        "mlp/shared/down/kernel": ("model.layers.{i}.mlp.shared_expert.down_proj.weight", "d_model d_shared"),
    }
)


def _windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    if not hf["use_sliding_window"]:
        return (None,) * hf["num_hidden_layers"]
    kinds = hf["layer_types"] or [  # every other one of the first layers
        "sliding_attention" if (i + 1) % 2 and i < hf["max_window_layers"] else "full_attention"
        for i in range(hf["num_hidden_layers"])
    ]
    return shared.windows({**hf, "layer_types": kinds})


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(
        architecture,
        hf,
        qkv_bias=bool(hf["qkv_bias"]),
        windows=_windows(hf),
        d_shared=hf["shared_expert_intermediate_size"],
        **shared.experts(hf, hf["num_experts"]),
    )


FAMILY = Family(
    architectures=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    defaults=qwen2.DEFAULTS
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=(
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 12,
        },
        {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 12,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
)
