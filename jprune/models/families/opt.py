"""OPT: LayerNorm, learned positions (two rows before the first are padding), plain ReLU MLP, biases everywhere.

OPT-350M alone normalises after the addition, has no final norm, and projects its embedding in and out.
"""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family

MODEL = {
    "embed/embedding": ("model.decoder.embed_tokens.weight", "vocab d_embed"),
    "embed/positions": ("model.decoder.embed_positions.weight", "positions d_model"),
    "embed/project_in/kernel": ("model.decoder.project_in.weight", "d_model d_embed"),
    "final_norm/scale": ("model.decoder.final_layer_norm.weight", "d_model"),
    "final_norm/bias": ("model.decoder.final_layer_norm.bias", "d_model"),
    "project_out/kernel": ("model.decoder.project_out.weight", "d_embed d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_embed"),
}
BLOCK = {
    "attn_norm/scale": ("model.decoder.layers.{i}.self_attn_layer_norm.weight", "d_model"),
    "attn_norm/bias": ("model.decoder.layers.{i}.self_attn_layer_norm.bias", "d_model"),
    "attn/q/kernel": ("model.decoder.layers.{i}.self_attn.q_proj.weight", "(heads head_dim) d_model"),
    "attn/q/bias": ("model.decoder.layers.{i}.self_attn.q_proj.bias", "(heads head_dim)"),
    "attn/k/kernel": ("model.decoder.layers.{i}.self_attn.k_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/k/bias": ("model.decoder.layers.{i}.self_attn.k_proj.bias", "(kv_heads head_dim)"),
    "attn/v/kernel": ("model.decoder.layers.{i}.self_attn.v_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/v/bias": ("model.decoder.layers.{i}.self_attn.v_proj.bias", "(kv_heads head_dim)"),
    "attn/o/kernel": ("model.decoder.layers.{i}.self_attn.out_proj.weight", "d_model (heads head_dim)"),
    "attn/o/bias": ("model.decoder.layers.{i}.self_attn.out_proj.bias", "d_model"),
    "mlp_norm/scale": ("model.decoder.layers.{i}.final_layer_norm.weight", "d_model"),
    "mlp_norm/bias": ("model.decoder.layers.{i}.final_layer_norm.bias", "d_model"),
    "mlp/up/kernel": ("model.decoder.layers.{i}.fc1.weight", "d_ff d_model"),
    "mlp/up/bias": ("model.decoder.layers.{i}.fc1.bias", "d_ff"),
    "mlp/down/kernel": ("model.decoder.layers.{i}.fc2.weight", "d_model d_ff"),
    "mlp/down/bias": ("model.decoder.layers.{i}.fc2.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    if not hf["layer_norm_elementwise_affine"]:
        raise JpruneError("OPT without scales in its norms (layer_norm_elementwise_affine) is not supported")
    before, bias, d_embed = bool(hf["do_layer_norm_before"]), bool(hf["enable_bias"]), hf["word_embed_proj_dim"]
    return shared.config(
        architecture,
        hf,
        rope=None,
        positions=hf["max_position_embeddings"] + 2,
        position_offset=2,
        d_embed=d_embed if d_embed not in (None, hf["hidden_size"]) else None,
        norm="layer",
        norm_eps=1e-5,
        norm_bias=True,
        norm_after=not before,
        final_norm=before and not hf["_remove_final_layer_norm"],
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _rows(config: DecoderConfig) -> tuple[dict, dict]:
    if config.d_embed is not None:
        return MODEL, BLOCK
    return {path: (key, axes.replace("d_embed", "d_model")) for path, (key, axes) in MODEL.items()}, BLOCK


FAMILY = Family(
    architectures=("OPTForCausalLM",),
    model_type="opt",
    names={"intermediate_size": "ffn_dim"},
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    rows=_rows,
    variants=(
        {},
        {"enable_bias": False, "activation_function": "gelu"},
        {"word_embed_proj_dim": 12, "do_layer_norm_before": False},
    ),
)
