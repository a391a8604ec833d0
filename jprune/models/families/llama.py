"""Llama 1, 2 and 3.x, SmolLM2, and the table and config reader that families of the same shape share."""

import math
from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig, LayerSizes
from jprune.models.families import sizes
from jprune.models.families.table import Family
from jprune.models.rope import Rope

MODEL = {
    "embed/embedding": ("model.embed_tokens.weight", "vocab d_model"),
    "final_norm/scale": ("model.norm.weight", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
}
BLOCK = {
    "attn_norm/scale": ("model.layers.{i}.input_layernorm.weight", "d_model"),
    "attn/q/kernel": ("model.layers.{i}.self_attn.q_proj.weight", "(heads head_dim) d_model"),
    "attn/q/bias": ("model.layers.{i}.self_attn.q_proj.bias", "(heads head_dim)"),
    "attn/q_norm/scale": ("model.layers.{i}.self_attn.q_norm.weight", "head_dim"),
    "attn/k/kernel": ("model.layers.{i}.self_attn.k_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/k/bias": ("model.layers.{i}.self_attn.k_proj.bias", "(kv_heads head_dim)"),
    "attn/k_norm/scale": ("model.layers.{i}.self_attn.k_norm.weight", "head_dim"),
    "attn/v/kernel": ("model.layers.{i}.self_attn.v_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/v/bias": ("model.layers.{i}.self_attn.v_proj.bias", "(kv_heads head_dim)"),
    "attn/o/kernel": ("model.layers.{i}.self_attn.o_proj.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("model.layers.{i}.self_attn.o_proj.bias", "d_model"),
    "mlp_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "d_model"),
    "mlp/gate/kernel": ("model.layers.{i}.mlp.gate_proj.weight", "d_ff d_model"),
    "mlp/gate/bias": ("model.layers.{i}.mlp.gate_proj.bias", "d_ff"),
    "mlp/up/kernel": ("model.layers.{i}.mlp.up_proj.weight", "d_ff d_model"),
    "mlp/up/bias": ("model.layers.{i}.mlp.up_proj.bias", "d_ff"),
    "mlp/down/kernel": ("model.layers.{i}.mlp.down_proj.weight", "d_model d_ff"),
    "mlp/down/bias": ("model.layers.{i}.mlp.down_proj.bias", "d_model"),
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """The keys that all families of this shape share; `options` are the fields in which a family differs."""
    heads = hf["num_attention_heads"]
    kv_heads = hf["num_key_value_heads"] or heads
    return DecoderConfig(
        architecture=architecture,
        vocab=hf["vocab_size"],
        d_model=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hf["head_dim"] or hf["hidden_size"] // heads,
        d_ff=hf["intermediate_size"],
        sizes=sizes.per_layer(hf, LayerSizes(heads, kv_heads, hf["intermediate_size"])),
        context=hf["max_position_embeddings"],
        rope=rope(hf),
        norm_eps=float(hf["rms_norm_eps"]),
        activation=ACTIVATIONS.get(hf["hidden_act"], hf["hidden_act"]),
        tied=bool(hf["tie_word_embeddings"]),
        **options,
    )


def rope(hf: Mapping[str, Any]) -> Rope:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (4).

    Where both are given the older key wins, as in transformers.
    """
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    context = hf["max_position_embeddings"]
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise JpruneError("config.json asks for a partial rotary embedding, which this family does not have")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise JpruneError("config.json gives rotary embeddings per layer type; jprune supports one for all layers")
    try:
        fields = {"theta": float(given.get("rope_theta") or hf.get("rope_theta") or 10_000.0)}
        if kind in ("linear", "dynamic", "llama3"):
            fields["factor"] = float(given["factor"])
        if kind in ("yarn", "llama3"):  # `dynamic` grows from max_position_embeddings on
            context = (
                hf.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or context
            )
        if kind == "llama3":
            fields |= {name: float(given[name]) for name in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            fields |= _yarn(given, hf["max_position_embeddings"] / context)
    except KeyError as missing:
        raise JpruneError(f"config.json: rope_type {kind!r} needs {missing} among its rope parameters") from None
    return Rope(kind=kind, context=context, truncate=bool(given.get("truncate", True)), **fields)


def _yarn(given: Mapping[str, Any], implied_factor: float) -> dict[str, float]:
    """YaRN's numbers; its attention factor is 0.1 ln(factor) + 1 unless given (arXiv:2309.00071, equation 22)."""
    factor = float(given["factor"] or implied_factor)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = given.get("attention_factor")
    if attention is None:
        one, other = given.get("mscale"), given.get("mscale_all_dim")  # DeepSeek's generalisation
        attention = temperature(one) / temperature(other) if one and other else temperature(1.0)
    return {
        "factor": factor,
        "attention_factor": float(attention),
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
    }


def _llama(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf["attention_bias"])
    return config(architecture, hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf["mlp_bias"]))


DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    defaults=DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    config=_llama,
    model=MODEL,
    block=BLOCK,
)
