"""DeepSeek-V2: latent attention, experts in groups, of which those of the best groups are chosen by softmax."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import deepseek_v3, llama
from jprune.models.families.table import Family

_METHODS = ("greedy", "group_limited_greedy")


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    if hf["norm_topk_prob"]:
        raise JpruneError(
            "DeepSeek-V2 with norm_topk_prob is not supported: its authors' code and transformers disagree about it"
        )
    if hf["mlp_bias"] or hf["scoring_func"] != "softmax":
        raise JpruneError("DeepSeek-V2 with mlp_bias, or a scoring_func that is not 'softmax', is not supported")
    if hf["topk_method"] not in _METHODS:
        raise JpruneError(f"DeepSeek-V2 with topk_method {hf['topk_method']!r}; supported: {', '.join(_METHODS)}")
    if hf["num_experts_per_tok"] is None:
        raise JpruneError("config.json lacks num_experts_per_tok, which DeepSeek-V2 has no default for")
    plain = {"expert_groups": 1, "groups_per_token": 1} if hf["topk_method"] == "greedy" else {}
    return deepseek_v3.config(architecture, hf, interleaved=True, **plain)


FAMILY = Family(
    architectures=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    defaults=deepseek_v3.DEFAULTS
    | {
        "vocab_size": 102400,
        "mlp_bias": False,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
    config=_config,
    model=llama.MODEL,
    block=deepseek_v3.BLOCK,
    rows=deepseek_v3.rows,
    variants=(
        deepseek_v3.SMALL | {"q_lora_rank": None, "routed_scaling_factor": 3.0},
        deepseek_v3.SMALL
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "rope_scaling": deepseek_v3.YARN,
            "attention_bias": True,
        },
    ),
)
