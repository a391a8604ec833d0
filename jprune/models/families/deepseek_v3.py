"""DeepSeek-V3 and R1, Kimi K2: latent attention, experts in groups chosen by sigmoids, dense first layers."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import glm4_moe, llama, shared
from jprune.models.families.table import Family, Rows

_ATTN = "model.layers.{i}.self_attn."
BLOCK = (
    llama.BLOCK
    | glm4_moe.EXPERTS
    | {
        "attn/q_down/kernel": (_ATTN + "q_a_proj.weight", "q_rank d_model"),
        "attn/q_down/bias": (_ATTN + "q_a_proj.bias", "q_rank"),
        "attn/q_down_norm/scale": (_ATTN + "q_a_layernorm.weight", "q_rank"),
        "attn/q/kernel": (_ATTN + "q_b_proj.weight", "(heads head_dim) q_rank"),
        "attn/kv_down/kernel": (_ATTN + "kv_a_proj_with_mqa.weight", "<kv_rank>+d_rope d_model"),
        "attn/kv_down/bias": (_ATTN + "kv_a_proj_with_mqa.bias", "<kv_rank>+d_rope"),
        "attn/k_rope/kernel": (_ATTN + "kv_a_proj_with_mqa.weight", "kv_rank+<d_rope> d_model"),
        "attn/k_rope/bias": (_ATTN + "kv_a_proj_with_mqa.bias", "kv_rank+<d_rope>"),
        "attn/kv_down_norm/scale": (_ATTN + "kv_a_layernorm.weight", "kv_rank"),
        "attn/k/kernel": (_ATTN + "kv_b_proj.weight", "(heads <d_nope>+d_value) kv_rank"),
        "attn/v/kernel": (_ATTN + "kv_b_proj.weight", "(heads d_nope+<d_value>) kv_rank"),
        "attn/o/kernel": (_ATTN + "o_proj.weight", "d_model (heads d_value)"),
    }
)


def rows(config: DecoderConfig) -> tuple[Rows, Rows]:
    """The table of a model whose queries may come from the residual stream."""
    return llama.MODEL, BLOCK if config.q_rank else BLOCK | {"attn/q/kernel": llama.BLOCK["attn/q/kernel"]}


def config(architecture: str, hf: Mapping[str, Any], *, interleaved: bool, **options: Any) -> DecoderConfig:
    """What DeepSeek-V2 and V3 share; `options` are the fields in which they differ."""
    heads = hf["num_attention_heads"]
    if (kv_heads := hf["num_key_value_heads"] or heads) != heads:
        raise JpruneError(f"config.json: {kv_heads} num_key_value_heads for {heads} heads; {architecture} has as many")
    if hf["moe_layer_freq"] != 1:
        raise JpruneError(f"{architecture} with moe_layer_freq {hf['moe_layer_freq']} is not supported, only 1")
    size, bias = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"], bool(hf["attention_bias"])
    return shared.config(
        architecture,
        {**hf, "head_dim": size},
        rope=shared.rope(hf, interleaved=interleaved, dims=hf["qk_rope_head_dim"]),
        score_scale=size**-0.5 * shared.temperature(hf) ** 2,
        kv_rank=hf["kv_lora_rank"],
        q_rank=hf["q_lora_rank"] or 0,
        d_rope=hf["qk_rope_head_dim"],
        d_value=hf["v_head_dim"],
        qkv_bias=bias,
        o_bias=bias,
        **shared.grouped_experts(hf) | options,
    )


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if hf[key] != known:
            raise JpruneError(f"{architecture} with {key} {hf[key]!r} is not supported, only {known!r}")
    options = glm4_moe.ROUTING | {"normalise_routing": bool(hf["norm_topk_prob"])}
    return config(architecture, hf, interleaved=bool(hf["rope_interleave"]), **options)


DEFAULTS = {key: value for key, value in llama.DEFAULTS.items() if key != "head_dim"} | {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "moe_layer_freq": 1,
}
SMALL = {
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
}
FAMILY = Family(
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    defaults=DEFAULTS
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    config=_config,
    model=llama.MODEL,
    block=BLOCK,
    rows=rows,
    variants=(
        SMALL,
        SMALL | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "rope_scaling": YARN},
        SMALL | {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "n_shared_experts": 2},
        SMALL | {"attention_bias": True},
    ),
)
