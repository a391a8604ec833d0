"""Phi-3 and Phi-4: Llama with q, k, v in one tensor, gate and up in another; LongRoPE in the long-context models."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family

_QKV, _GATE_UP = "model.layers.{i}.self_attn.qkv_proj.weight", "model.layers.{i}.mlp.gate_up_proj.weight"
BLOCK = llama.BLOCK | {
    "attn/q/kernel": (_QKV, "(<heads>+kv_heads+kv_heads head_dim) d_model"),
    "attn/k/kernel": (_QKV, "(heads+<kv_heads>+kv_heads head_dim) d_model"),
    "attn/v/kernel": (_QKV, "(heads+kv_heads+<kv_heads> head_dim) d_model"),
    "mlp/gate/kernel": (_GATE_UP, "<d_ff>+d_ff d_model"),
    "mlp/up/kernel": (_GATE_UP, "d_ff+<d_ff> d_model"),
}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):  # what early Phi-3 files call LongRoPE
        hf = {**hf, "rope_scaling": given | {"rope_type": "longrope"}}
    return shared.config(
        architecture,
        hf,
        rope=shared.rope(hf, partial=1.0),
        windows=(hf["sliding_window"],) * hf["num_hidden_layers"],
    )


FAMILY = Family(
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    defaults={key: value for key, value in llama.DEFAULTS.items() if key != "head_dim"}
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    variants=(
        {},
        {"sliding_window": 5, "partial_rotary_factor": 0.5},
        # Sequences up to 128 tokens take the short factors, up to 8 the long ones.
        {"rope_scaling": _LONG, "original_max_position_embeddings": 128, "max_position_embeddings": 256},
        {"rope_scaling": _LONG, "original_max_position_embeddings": 8, "max_position_embeddings": 256},
    ),
)
