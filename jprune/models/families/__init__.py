"""The model families jprune knows: what their config.json means and where their checkpoints keep each parameter."""

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig, parameters
from jprune.models.families import llama, mistral, qwen2, qwen3, sizes
from jprune.models.families.table import Entry, Family, entry

FAMILIES = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
ARCHITECTURES: dict[str, Family] = {name: family for family in FAMILIES for name in family.architectures}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

__all__ = ["ARCHITECTURES", "Entry", "Family", "config", "explicit", "resized", "table"]


def config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face config.json describes; keys that it lacks have Hugging Face's defaults.

    Raises JpruneError for an unknown architecture (naming it, the supported ones and the nearest) and for values that
    do not fit.
    """
    architecture = _architecture(hf_config)
    family = ARCHITECTURES[architecture]
    hf = {**family.defaults, **hf_config}
    for key in SIZES:
        if not isinstance(hf[key], int) or hf[key] < 1:
            raise JpruneError(f"config.json: {key} must be a positive integer, got {hf[key]!r}")
    try:
        return family.config(architecture, hf)
    except JpruneError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise JpruneError(f"config.json does not describe a {architecture}: {error}") from error


def _architecture(hf_config: Mapping[str, Any]) -> str:
    """The supported architecture that a config.json names, or that its model_type implies."""
    names = hf_config.get("architectures") or [
        family.architectures[0] for family in FAMILIES if family.model_type == hf_config.get("model_type")
    ]
    name = str(names[0] if names else hf_config.get("model_type"))
    if name in ARCHITECTURES:
        return name
    by_lower = {supported.lower(): supported for supported in ARCHITECTURES}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f"; the nearest is {by_lower[nearest[0]]}" if nearest else ""
    raise JpruneError(f"unsupported architecture {name!r} in config.json; supported: {', '.join(ARCHITECTURES)}{hint}")


def explicit(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with Hugging Face's defaults for the keys that it lacks (those that `config` reads)."""
    return {**ARCHITECTURES[_architecture(hf_config)].defaults, **hf_config}


def resized(hf_config: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The config.json of a model with other sizes; see `jprune.models.families.sizes.resized`."""
    defaults = ARCHITECTURES[_architecture(hf_config)].defaults
    # A number of layers counted from the first one is no default any more when layers are gone.
    counted = {key: defaults[key] for key in ("max_window_layers",) if key in defaults}
    return sizes.resized({**counted, **hf_config}, **options)


def table(config: DecoderConfig) -> dict[str, Entry]:
    """For every parameter of the model, by path: the Hugging Face tensor that stores it, and how."""
    family = ARCHITECTURES[config.architecture]
    entries = {}
    for path, axes in parameters(config).items():
        if path.startswith("blocks/"):
            _, index, rest = path.split("/", 2)
            key, stored = family.block[rest]
            key = key.format(i=index)
        else:
            key, stored = family.model[path]
        entries[path] = entry(key, stored, axes, functools.partial(config.size, path=path))
    return entries
