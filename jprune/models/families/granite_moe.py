"""Granite MoE: Granite with experts in place of the MLP, those of a layer in two tensors."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import granite, llama
from jprune.models.families.table import Family

_IN = "model.layers.{i}.block_sparse_moe.input_linear.weight"
BLOCK = llama.BLOCK | {
    "mlp/router/kernel": ("model.layers.{i}.block_sparse_moe.router.layer.weight", "experts d_model"),
    "mlp/experts/gate/kernel": (_IN, "experts <d_expert>+d_expert d_model"),
    "mlp/experts/up/kernel": (_IN, "experts d_expert+<d_expert> d_model"),
    "mlp/experts/down/kernel": ("model.layers.{i}.block_sparse_moe.output_linear.weight", "experts d_model d_expert"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return granite.config(
        architecture,
        hf,
        experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        normalise_routing=True,
    )


FAMILY = Family(
    architectures=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    defaults={key: value for key, value in granite.FAMILY.defaults.items() if key != "mlp_bias"}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=(
        {"num_local_experts": 4, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
    ),
)
