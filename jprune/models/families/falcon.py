"""Falcon: attention and MLP side by side, one key/value head (7B) or groups of query heads with theirs (40B, 180B).

The fused tensor holds, for every key/value head, its query heads, then its key, then its value.
"""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("transformer.word_embeddings.weight", "vocab d_model"),
    "final_norm/scale": ("transformer.ln_f.weight", "d_model"),
    "final_norm/bias": ("transformer.ln_f.bias", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
}
BLOCK = {
    "attn_norm/scale": ("transformer.h.{i}.input_layernorm.weight", "d_model"),
    "attn_norm/bias": ("transformer.h.{i}.input_layernorm.bias", "d_model"),
    "attn/q/kernel": (
        "transformer.h.{i}.self_attention.query_key_value.weight",
        "(kv_heads <group>+1+1 head_dim) d_model",
    ),
    "attn/q/bias": ("transformer.h.{i}.self_attention.query_key_value.bias", "(kv_heads <group>+1+1 head_dim)"),
    "attn/k/kernel": (
        "transformer.h.{i}.self_attention.query_key_value.weight",
        "(kv_heads group+<1>+1 head_dim) d_model",
    ),
    "attn/k/bias": ("transformer.h.{i}.self_attention.query_key_value.bias", "(kv_heads group+<1>+1 head_dim)"),
    "attn/v/kernel": (
        "transformer.h.{i}.self_attention.query_key_value.weight",
        "(kv_heads group+1+<1> head_dim) d_model",
    ),
    "attn/v/bias": ("transformer.h.{i}.self_attention.query_key_value.bias", "(kv_heads group+1+<1> head_dim)"),
    "attn/o/kernel": ("transformer.h.{i}.self_attention.dense.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("transformer.h.{i}.self_attention.dense.bias", "d_model"),
    "mlp_norm/scale": ("transformer.h.{i}.post_attention_layernorm.weight", "d_model"),
    "mlp_norm/bias": ("transformer.h.{i}.post_attention_layernorm.bias", "d_model"),
    "mlp/up/kernel": ("transformer.h.{i}.mlp.dense_h_to_4h.weight", "d_ff d_model"),
    "mlp/up/bias": ("transformer.h.{i}.mlp.dense_h_to_4h.bias", "d_ff"),
    "mlp/down/kernel": ("transformer.h.{i}.mlp.dense_4h_to_h.weight", "d_model d_ff"),
    "mlp/down/bias": ("transformer.h.{i}.mlp.dense_4h_to_h.bias", "d_model"),
}
_TWO_NORMS = {
    f"{norm}_norm/{kind}": (f"transformer.h.{{i}}.ln_{norm}.{name}", "d_model")
    for norm in ("attn", "mlp")
    for kind, name in (("scale", "weight"), ("bias", "bias"))
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    if hf["alibi"]:
        raise JpruneError("Falcon with ALiBi (Falcon-RW) is not supported: it rounds its biases to bfloat16")
    new, bias, heads = bool(hf["new_decoder_architecture"]), bool(hf["bias"]), hf["num_attention_heads"]
    kv_heads = (hf["num_key_value_heads"] or heads) if new else 1 if hf["multi_query"] else heads
    norms = hf["num_ln_in_parallel_attn"] or (2 if new else 1)
    parallel = new or bool(hf["parallel_attn"])
    if parallel and not new and norms == 2:
        raise JpruneError("Falcon with two norms before parallel attention is only supported in the 40B architecture")
    return shared.config(
        architecture,
        {**hf, "num_key_value_heads": kv_heads},
        norm="layer",
        norm_bias=True,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _rows(config: DecoderConfig) -> tuple[dict, dict]:
    return MODEL, BLOCK | _TWO_NORMS if config.parallel and not config.shared_norm else BLOCK


FAMILY = Family(
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    names={"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"},
    defaults={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "num_ln_in_parallel_attn": None,
        "layer_norm_epsilon": 1e-5,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "tie_word_embeddings": True,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    rows=_rows,
    variants=(
        {},
        {"new_decoder_architecture": True},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "bias": True},
        {"multi_query": False, "parallel_attn": False, "num_kv_heads": None},
    ),
)
