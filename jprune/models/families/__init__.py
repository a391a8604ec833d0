"""The model families jprune knows: what their config.json means and where their checkpoints keep each parameter."""

import difflib
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import (
    bloom,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granite_moe,
    llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    sizes,
    smollm3,
    stablelm,
    values,
)
from jprune.models.families.table import Entry, Family, entry
from jprune.models.parameters import parameters

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    opt.FAMILY,
    bloom.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    gptj.FAMILY,
    phi.FAMILY,
    phi3.FAMILY,
    falcon.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    olmo2.FAMILY,
    cohere.FAMILY,
    stablelm.FAMILY,
    granite.FAMILY,
    smollm3.FAMILY,
    olmo3.FAMILY,
    seed_oss.FAMILY,
    glm.FAMILY,
    glm4.FAMILY,
    ernie4_5.FAMILY,
    cohere2.FAMILY,
    ministral.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    granite_moe.FAMILY,
    olmoe.FAMILY,
    glm4_moe.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    gpt_oss.FAMILY,
)
ARCHITECTURES: dict[str, Family] = {name: family for family in FAMILIES for name in family.architectures}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
MOST_LAYERS = 10_000
"""Models have up to a few hundred; a config that says more is damaged, and would fill the memory with layers."""

__all__ = ["ARCHITECTURES", "Entry", "Family", "architecture", "config", "explicit", "resized", "table"]


def config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face config.json describes; keys that it lacks have Hugging Face's defaults.

    Raises JpruneError for an unknown architecture (naming it, the supported ones and the nearest) and for values that
    do not fit.
    """
    name = architecture(hf_config)
    family = ARCHITECTURES[name]
    hf = _common_names(family, hf_config)
    for key in SIZES:
        if not isinstance(hf[key], int) or hf[key] < 1:
            raise JpruneError(f"config.json: {key} must be a positive integer, got {hf[key]!r}")
    if hf["num_hidden_layers"] > MOST_LAYERS:
        raise JpruneError(f"config.json: num_hidden_layers is {hf['num_hidden_layers']}; there is no such model")
    for key, default in family.defaults.items():
        if not values.fits(key, hf_config.get(key, default), default):
            raise JpruneError(
                f"config.json does not describe a {name}: {key} is {json.dumps(hf_config[key])}, expected something "
                f"like {json.dumps(default)} (which it is where config.json lacks the key)"
            )
    try:
        return family.config(name, hf)
    except JpruneError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise JpruneError(f"config.json does not describe a {name}: {error}") from error


def architecture(hf_config: Mapping[str, Any]) -> str:
    """The supported architecture that a config.json describes.

    As transformers does, it goes by the model_type where it knows that, though the architectures name another family.
    The class of a base model (LlamaModel) stands for the one with the head.

    Raises JpruneError for an unknown one (naming it, the supported ones and the nearest).
    """
    kind = hf_config.get("model_type")
    by_type = next((family.architectures[0] for family in FAMILIES if family.model_type == kind), None)
    names = hf_config.get("architectures") or ([] if by_type is None else [by_type])
    name = str(names[0] if isinstance(names, list) and names else names or kind)
    by_stem = {_stem(supported): supported for supported in ARCHITECTURES}
    if by_type is not None and (name in ARCHITECTURES or _stem(name) == _stem(by_type)):
        return by_type
    if name in ARCHITECTURES:
        return name
    if name.endswith("Model") and _stem(name) in by_stem:
        return by_stem[_stem(name)]
    nearest = difflib.get_close_matches(_stem(name), by_stem, n=1, cutoff=0.4)
    hint = f"; the nearest is {by_stem[nearest[0]]}" if nearest else ""
    raise JpruneError(
        f"unsupported architecture {name!r} in config.json; supported: {', '.join(ARCHITECTURES)}{hint}. "
        'The page "Add a family" of the documentation (docs/add-a-family.md) says how to add one'
    )


def _stem(name: str) -> str:
    return re.sub("(ForCausalLM|ForConditionalGeneration|LMHeadModel|TextModel|Model)$", "", name).lower()


def _common_names(family: Family, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with its defaults, and hidden_size and the like under the names that most families use."""
    hf = explicit(hf_config)
    return hf | {common: hf[own] for common, own in family.names.items() if own in hf_config or common not in hf_config}


def explicit(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with Hugging Face's defaults for the keys that it lacks (those that `config` reads)."""
    return {**ARCHITECTURES[architecture(hf_config)].defaults, **hf_config}


def resized(hf_config: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The config.json of a model with other sizes; see `jprune.models.families.sizes.resized`."""
    hf_config = _with_layers_named(hf_config)
    defaults = ARCHITECTURES[architecture(hf_config)].defaults
    # A number of layers counted from the first one is no default any more when layers are gone, nor is one of experts.
    of_experts = (*sizes.COUNTS_OF_EXPERTS, *sizes.WIDTHS_OF_EXPERTS.values())
    counted = {key: defaults[key] for key in (*sizes.COUNTED, *of_experts) if key in defaults}
    smaller = sizes.resized({**counted, **hf_config}, **options)
    windows = tuple(config(hf_config).windows[i] for i in options["layers"])
    if config(smaller).windows != windows and "layer_types" in defaults:  # a pattern that counts layers
        smaller["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
    names = ARCHITECTURES[architecture(hf_config)].names
    return {names.get(key, key): value for key, value in smaller.items()}


def _with_layers_named(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json that says of each layer what would follow from its number, which changes when others go."""
    known = ARCHITECTURES[architecture(hf_config)].defaults
    named: dict[str, Any] = {}
    if "layer_types" in known and not hf_config.get("layer_types") and any(windows := config(hf_config).windows):
        named["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if "no_rope_layers" in known:
        of = config(hf_config)
        named["no_rope_layers"] = [int(of.rope_of(i) is not None) for i in range(of.layers)]
    if "mlp_only_layers" in known and (dense := config(hf_config).dense_layers):
        named |= {"mlp_only_layers": list(dense), "decoder_sparse_step": 1}
    return {**hf_config, **named}


def table(config: DecoderConfig) -> dict[str, Entry]:
    """For every parameter of the model, by path: the Hugging Face tensor that stores it, and how."""
    family = ARCHITECTURES[config.architecture]
    model, block = (family.model, family.block) if family.rows is None else family.rows(config)
    entries = {}
    for path, axes in parameters(config).items():
        if path.startswith("blocks/"):
            _, index, rest = path.split("/", 2)
            key, stored = block[rest]
            key = key.replace("{i}", index)
        else:
            key, stored = model[path]
        entries[path] = entry(key, stored, axes, functools.partial(config.size, path=path))
    return entries
