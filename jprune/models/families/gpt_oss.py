"""gpt-oss: a window in every other layer, sinks of attention, experts with biases and a clamped SwiGLU; mxfp4 files."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family

_MLP = "model.layers.{i}.mlp."
BLOCK = llama.BLOCK | {
    "attn/sinks": ("model.layers.{i}.self_attn.sinks", "heads"),
    "mlp/router/kernel": (_MLP + "router.weight", "experts d_model"),
    "mlp/router/bias": (_MLP + "router.bias", "experts"),
    "mlp/experts/gate/kernel": (_MLP + "experts.gate_up_proj", "experts d_model (d_expert <1>+1)"),
    "mlp/experts/gate/bias": (_MLP + "experts.gate_up_proj_bias", "experts (d_expert <1>+1)"),
    "mlp/experts/up/kernel": (_MLP + "experts.gate_up_proj", "experts d_model (d_expert 1+<1>)"),
    "mlp/experts/up/bias": (_MLP + "experts.gate_up_proj_bias", "experts (d_expert 1+<1>)"),
    "mlp/experts/down/kernel": (_MLP + "experts.down_proj", "experts d_expert d_model"),
    "mlp/experts/down/bias": (_MLP + "experts.down_proj_bias", "experts d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["attention_bias"])
    return shared.config(
        architecture,
        hf,
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        windows=shared.windows(hf, pattern=2),
        experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        normalise_routing=True,
        expert_bias=True,
        swiglu=(float(hf["swiglu_alpha"]), float(hf["swiglu_limit"])),
    )


FAMILY = Family(
    architectures=("GptOssForCausalLM",),
    model_type="gpt_oss",
    defaults=llama.DEFAULTS
    | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=(
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "swiglu_limit": 0.5,
        },
        {"num_local_experts": 3, "num_experts_per_tok": 1, "attention_bias": False, "swiglu_alpha": 1.0},
    ),
)
