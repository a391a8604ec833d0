"""Sizes of single layers in config.json, in the schema that transformers has for them since 5.x:

    "per_layer_config": {"4": {"num_attention_heads": 24, "num_key_value_heads": 6, "intermediate_size": 2048}}

A layer is named where it differs from the keys of the whole model, and only with what differs. Reading and writing are
here; `resized` is the config.json of a model that structured pruning made smaller.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import LayerSizes

KEY = "per_layer_config"
COUNTED = ("max_window_layers", "first_k_dense_replace")  # layers from the first on
NAMES = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "d_ff": "intermediate_size"}
EXPERTS = "num_experts"
"""What a layer's own number of experts is called, whatever the family calls that of the whole model."""
COUNTS_OF_EXPERTS = (EXPERTS, "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What families call it."""
WIDTHS_OF_EXPERTS = {"d_expert": "moe_intermediate_size", "d_shared": "shared_expert_intermediate_size"}
"""Where a family lacks the first, experts are as wide as its MLPs would be; where it lacks the second, the expert that
sees every token is as many times as wide as the others as it is in the whole model."""


def per_layer(hf: Mapping[str, Any], common: LayerSizes) -> tuple[LayerSizes, ...]:
    """The sizes of every layer, or () where config.json names no layer. `common` holds for what it does not name.

    Raises:
        JpruneError: a layer that there is not, or a key that cannot differ between layers here.
    """
    given, layers = hf.get(KEY) or {}, hf["num_hidden_layers"]
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        raise JpruneError(f"config.json: {KEY} must map layer numbers to objects, got {given!r}")
    names = _names(hf, common)
    sizes = [common] * layers
    for name, own in given.items():
        if not str(name).isdecimal() or int(name) >= layers:
            raise JpruneError(f"config.json: {KEY} names layer {name!r}, but the model has layers 0 to {layers - 1}")
        if unknown := [key for key in own if key not in names.values()]:
            raise JpruneError(
                f"config.json: {KEY} gives layer {name} its own {unknown[0]!r}; "
                f"layers can differ in {', '.join(names.values())} only"
            )
        for key, size in own.items():
            if not isinstance(size, int) or size < 1:
                raise JpruneError(f"config.json: {KEY}, layer {name}: {key} must be a positive integer, got {size!r}")
        given_or_common = {ours: own.get(key, getattr(common, ours)) for ours, key in names.items()}
        sizes[int(name)] = _with_derived(LayerSizes(**given_or_common), common, names)
    return tuple(sizes) if given else ()


def resized(
    hf_config: Mapping[str, Any],
    *,
    d_model: int,
    head_dim: int | None,
    layers: Sequence[int],
    sizes: Sequence[LayerSizes],
) -> dict[str, Any]:
    """The config.json of a model with other sizes.

    Args:
        hf_config: of the model as it was.
        d_model: the hidden size.
        head_dim: of all heads; written where hidden_size / num_attention_heads does not give it. None where other keys
            say how large a head is.
        layers: numbers, in the model as it was, of the layers that are left.
        sizes: of each layer that is left.
    """
    hf = {key: value for key, value in hf_config.items() if key != KEY}
    hf |= {"hidden_size": d_model, "num_hidden_layers": len(layers)}
    if head_dim is not None and ("head_dim" in hf or any(layer.heads * head_dim != d_model for layer in sizes)):
        hf["head_dim"] = head_dim
    common = collections.Counter(sizes).most_common(1)[0][0]
    hf |= {key: getattr(common, ours) for ours, key in NAMES.items()}
    hf |= {key: common.experts for key in COUNTS_OF_EXPERTS if key in hf and common.experts}
    names = _names(hf, common)
    hf |= {key: getattr(common, ours) for ours, key in names.items() if ours in WIDTHS_OF_EXPERTS}
    own = {
        str(i): {key: now for ours, key in names.items() if (now := getattr(layer, ours)) != getattr(common, ours)}
        for i, layer in enumerate(sizes)
        if layer != common
    }
    if own:
        hf[KEY] = own
    # Which layers see a window only, or are turned: a list, or the number of the first layer with a window.
    for key in ("layer_types", "no_rope_layers"):
        if hf.get(key):
            hf[key] = [hf[key][i] for i in layers]
    for key in COUNTED:
        if hf.get(key) is not None:
            hf[key] = sum(i < hf[key] for i in layers)
    if hf.get("mlp_only_layers"):
        hf["mlp_only_layers"] = [new for new, old in enumerate(layers) if old in hf["mlp_only_layers"]]
    return hf


def one_width(hf: Mapping[str, Any]) -> bool:
    """Whether experts are as wide as the family's MLPs would be: its config.json has one number for both."""
    return WIDTHS_OF_EXPERTS["d_expert"] not in hf


def times_shared(hf: Mapping[str, Any], common: LayerSizes) -> int | None:
    """How many times as wide as the others the expert is that sees every token, where config.json says it so."""
    return common.d_shared // common.d_expert if common.d_shared and WIDTHS_OF_EXPERTS["d_shared"] not in hf else None


def _names(hf: Mapping[str, Any], common: LayerSizes) -> dict[str, str]:
    """The keys of config.json that say the sizes of a layer."""
    if not common.experts:
        return NAMES
    return NAMES | {"experts": EXPERTS} | {ours: key for ours, key in WIDTHS_OF_EXPERTS.items() if key in hf}


def _with_derived(layer: LayerSizes, common: LayerSizes, names: Mapping[str, str]) -> LayerSizes:
    """The sizes of a layer, with those that no key says."""
    if "d_expert" not in names and common.experts:
        layer = dataclasses.replace(layer, d_expert=layer.d_ff)
    if "d_shared" not in names and common.d_shared:
        layer = dataclasses.replace(layer, d_shared=common.d_shared // common.d_expert * layer.d_expert)
    return layer
