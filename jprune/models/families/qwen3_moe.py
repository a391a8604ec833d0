"""Qwen3-MoE: Qwen3 with experts in place of the MLP, in all layers or some."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, qwen3, shared
from jprune.models.families.table import Family

EXPERTS = {
    "mlp/router/kernel": ("model.layers.{i}.mlp.gate.weight", "experts d_model"),
    "mlp/experts/gate/kernel": ("model.layers.{i}.mlp.experts.{experts}.gate_proj.weight", "d_expert d_model"),
    "mlp/experts/up/kernel": ("model.layers.{i}.mlp.experts.{experts}.up_proj.weight", "d_expert d_model"),
    "mlp/experts/down/kernel": ("model.layers.{i}.mlp.experts.{experts}.down_proj.weight", "d_model d_expert"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["attention_bias"])
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return shared.config(
        architecture,
        hf,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=(window,) * hf["num_hidden_layers"],
        **shared.experts(hf, hf["num_experts"]),
    )


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    names={"num_experts": "num_local_experts"},  # transformers 5 writes the latter
    defaults={
        **qwen3.FAMILY.defaults,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK | EXPERTS,
    variants=(
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
        {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 20, "decoder_sparse_step": 2},
    ),
)
