"""Mixtral: Mistral with experts in place of the MLP, two for each token."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, mistral, shared
from jprune.models.families.table import Family

BLOCK = llama.BLOCK | {
    "mlp/router/kernel": ("model.layers.{i}.block_sparse_moe.gate.weight", "experts d_model"),
    "mlp/experts/gate/kernel": ("model.layers.{i}.block_sparse_moe.experts.{experts}.w1.weight", "d_expert d_model"),
    "mlp/experts/up/kernel": ("model.layers.{i}.block_sparse_moe.experts.{experts}.w3.weight", "d_expert d_model"),
    "mlp/experts/down/kernel": ("model.layers.{i}.block_sparse_moe.experts.{experts}.w2.weight", "d_model d_expert"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(
        architecture,
        hf,
        windows=(hf["sliding_window"],) * hf["num_hidden_layers"],
        experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        normalise_routing=True,
    )


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    defaults={
        **mistral.FAMILY.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=({"num_local_experts": 4}, {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5}),
)
