"""What the config.json files of most families have in common: sizes, rotary embeddings, names of activations."""

import math
from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import LAYER_SIZES, DecoderConfig, LayerSizes
from jprune.models.families import sizes
from jprune.models.rope import Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
KINDS = ("sliding_attention", "full_attention")
ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "activation")


def config(architecture: str, hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """The keys that most families share; `options` are the fields in which a family differs.

    Families whose config.json has no head_dim or intermediate_size may be given them all the same: it is how a pruned
    model says its sizes.
    """
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    d_ff = hf.get("intermediate_size") or 4 * hf["hidden_size"]
    fields = {
        "architecture": architecture,
        "vocab": hf["vocab_size"],
        "d_model": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim(hf),
        "d_ff": d_ff,
        "sizes": sizes.per_layer(
            hf, LayerSizes(heads, kv_heads, d_ff, *(options.get(name, 0) for name in LAYER_SIZES[3:]))
        ),
        "context": hf["max_position_embeddings"],
        "tied": bool(hf["tie_word_embeddings"]),
    } | options
    if "rope" not in fields:
        fields["rope"] = rope(hf)
    if "norm_eps" not in fields:
        fields["norm_eps"] = float(next(hf[key] for key in NORM_EPS if key in hf))
    if "activation" not in fields:
        fields["activation"] = activation(next(hf[key] for key in ACTIVATION if key in hf))
    return DecoderConfig(**fields)


def head_dim(hf: Mapping[str, Any]) -> int:
    """Size of a head, as config.json says, or else the hidden size over the number of heads."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def activation(name: str) -> str:
    """Our name of an activation; an unknown one stays and is refused later."""
    return ACTIVATIONS.get(name, name)


def rope(hf: Mapping[str, Any], *, partial: float | None = None, **options: Any) -> Rope:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (4).

    Where both are given the older key wins, as in transformers. `partial` is the part of a head that is turned where
    config.json does not say; families that leave it out turn all of it. `options` are fields of the result.
    """
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    context = hf["max_position_embeddings"]
    part = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial is None and part not in (None, 1.0):
        raise JpruneError("config.json asks for a partial rotary embedding, which this family does not have")
    part = partial if part is None else part
    if part not in (None, 1.0):
        options["dims"] = int(head_dim(hf) * part)
    if any(isinstance(value, Mapping) for value in given.values()):
        raise JpruneError("config.json gives rotary embeddings per layer type; this family has one for all layers")
    try:
        fields: dict[str, Any] = {"theta": float(given.get("rope_theta") or hf.get("rope_theta") or 10_000.0)}
        if kind in ("linear", "dynamic", "llama3"):
            fields["factor"] = float(given["factor"])
        if kind in ("yarn", "llama3", "longrope"):  # `dynamic` grows from max_position_embeddings on
            context = (
                hf.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or context
            )
        if kind == "llama3":
            fields |= {name: float(given[name]) for name in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            fields |= _yarn(given, hf["max_position_embeddings"] / context)
        if kind == "longrope":
            options |= _longrope(given, context, hf["max_position_embeddings"] / context)
    except KeyError as missing:
        raise JpruneError(f"config.json: rope_type {kind!r} needs {missing} among its rope parameters") from None
    return Rope(kind=kind, context=context, truncate=bool(given.get("truncate", True)), **fields, **options)


def ropes(hf: Mapping[str, Any], *, local_theta: float) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers that see everything and of those with a window.

    They are nested in newer files; in older ones a scaling is of the former alone, and the latter has `local_theta`.
    """
    given = hf.get("rope_parameters") or {}
    whole = {"rope_theta": hf["rope_theta"]} | (given.get("full_attention") or {}) | (hf.get("rope_scaling") or {})
    local = {"rope_theta": local_theta} | (given.get("sliding_attention") or {})
    sizes = {"max_position_embeddings": hf["max_position_embeddings"], "head_dim": head_dim(hf)}
    return rope(sizes | {"rope_parameters": whole}), rope(sizes | {"rope_parameters": local})


def _yarn(given: Mapping[str, Any], implied_factor: float) -> dict[str, float]:
    """YaRN's numbers; its attention factor is 0.1 ln(factor) + 1 unless given (arXiv:2309.00071, equation 22)."""
    factor = float(given["factor"] or implied_factor)
    attention = given.get("attention_factor")
    if attention is None:
        one, other = given.get("mscale"), given.get("mscale_all_dim")  # DeepSeek's generalisation
        attention = _temperature(factor, one or 1.0) / (_temperature(factor, other) if one and other else 1.0)
    return {
        "factor": factor,
        "attention_factor": float(attention),
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
    }


def _temperature(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def temperature(hf: Mapping[str, Any]) -> float:
    """What DeepSeek multiplies queries and keys by, all dimensions of them, where positions are scaled."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    scale = given.get("mscale_all_dim") if kind != "default" else None
    return _temperature(float(given["factor"]), float(scale)) if scale else 1.0


def _longrope(given: Mapping[str, Any], context: int, implied_factor: float) -> dict[str, Any]:
    """LongRoPE's divisors; its attention factor is sqrt(1 + ln(factor) / ln(context)) unless given."""
    factor = given.get("factor") or implied_factor
    attention = given.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return {
        "short": tuple(map(float, given["short_factor"])),
        "long": tuple(map(float, given["long_factor"])),
        "attention_factor": float(attention),
    }


def experts(hf: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields of a mixture of `count` experts whose layers are sparse at every `decoder_sparse_step`-th."""
    step, dense = hf["decoder_sparse_step"], hf["mlp_only_layers"] or ()
    return {
        "experts": count,
        "experts_per_token": hf["num_experts_per_tok"],
        "d_expert": hf["moe_intermediate_size"],
        "normalise_routing": bool(hf["norm_topk_prob"]),
        "dense_layers": tuple(i for i in range(hf["num_hidden_layers"]) if i in dense or (i + 1) % step),
    }


def grouped_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a mixture as DeepSeek has it: experts in groups, one that sees every token, dense layers first."""
    return {
        "experts": hf["n_routed_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "d_expert": hf["moe_intermediate_size"],
        "d_shared": hf["moe_intermediate_size"] * (hf["n_shared_experts"] or 0),
        "shared_gate": False,
        "routing_scale": float(hf["routed_scaling_factor"]),
        "expert_groups": hf["n_group"] or 1,
        "groups_per_token": hf["topk_group"] or 1,
        "float32_routing": True,
        "dense_layers": tuple(range(min(hf["first_k_dense_replace"], hf["num_hidden_layers"]))),
    }


def kinds(hf: Mapping[str, Any], *, pattern: int) -> tuple[str, ...]:
    """What each layer sees, by its name in `layer_types`; without those, every `pattern`-th layer sees everything."""
    layers = range(hf["num_hidden_layers"])
    named = hf["layer_types"] or ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in layers]
    if unknown := sorted(set(named) - set(KINDS)):
        raise JpruneError(f"config.json: layer_types names {unknown[0]!r}; supported: {', '.join(KINDS)}")
    return tuple(named)


def windows(hf: Mapping[str, Any], *, pattern: int = 1) -> tuple[int | None, ...]:
    """The sliding window of each layer, where it has one; see `kinds`."""
    return tuple(hf["sliding_window"] if kind == "sliding_attention" else None for kind in kinds(hf, pattern=pattern))
