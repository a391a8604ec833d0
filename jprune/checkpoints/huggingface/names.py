"""The tensors of a Hugging Face checkpoint under the names that its architecture gives them.

Files may lack the prefix of the keys (those of a base model, `LlamaModel` say), keep a tensor that several names share
once, with the others as aliases in `__metadata__` (`safetensors.torch.save_model`), and hold either end of a tied
embedding, or both. All of it is read as transformers reads it; aliases also where transformers would not.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jprune.checkpoints.source import StoredTensor
from jprune.models import families

_LATER = ("num_nextn_predict_layers", "num_mtp_layers")
_COMPARED = 1 << 22  # elements at a time


def named(
    config: dict[str, Any], stored: Mapping[str, StoredTensor], aliases: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, StoredTensor], tuple[str, ...]]:
    """Tensors by the architecture's names.

    Args:
        config: config.json.
        stored: tensors by their names in the files.
        aliases: names that stand for those of other tensors.

    Returns:
        The config, which says that the model is not tied if it is not; the tensors; and what a user should know.
    """
    decoder = families.config(config)
    family = families.ARCHITECTURES[decoder.architecture]
    entries = families.table(decoder)
    expected = {key for entry in entries.values() for key in entry.keys}

    def name(key: str) -> str:
        full = family.prefix + key
        return full if key not in expected and full in expected and full not in stored else key

    tensors = {name(key): tensor for key, tensor in stored.items()}
    for alias, key in aliases.items():
        if name(key) in tensors:
            tensors.setdefault(name(alias), tensors[name(key)])
    config, tensors, left_out = _without_later_predictions(config, decoder.layers, family, tensors)
    if not decoder.tied:
        return config, tensors, left_out
    embedding, head = entries["embed/embedding"].key, family.model["head/kernel"][0]
    if head not in tensors:
        return config, tensors, left_out
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return config, tensors, left_out
    if equal(tensors[embedding], tensors[head]):
        del tensors[head]
        return config, tensors, left_out
    told = (
        f"config.json ties {head} to {embedding}, but the files hold both, and they differ: they are not tied, as in "
        "transformers"
    )
    return {**config, "tie_word_embeddings": False}, tensors, (*left_out, told)


def _without_later_predictions(
    config: dict[str, Any], layers: int, family: families.Family, tensors: dict[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, StoredTensor], tuple[str, ...]]:
    """Layers after the model's own that only serve to predict the token after next (DeepSeek-V3, arXiv:2412.19437,
    section 2.2), as transformers leaves them out."""
    count = next((config[key] for key in _LATER if isinstance(config.get(key), int)), 0)
    prefix = next(iter(family.block.values()))[0].split("{i}")[0]
    starts = tuple(f"{prefix}{i}." for i in range(layers, layers + min(count, 100)))
    later = {key for key in tensors if starts and key.startswith(starts)}
    if not later:
        return config, tensors, ()
    left_out = sum(math.prod(tensors[key].shape) for key in later)
    whole = sum(math.prod(tensor.shape) for tensor in tensors.values())
    told = (
        f"layers that predict the token after next ({len(starts)}, {left_out:,} parameters, "
        f"{100 * left_out / whole:.1f} % of what the files hold) are left out, as in transformers"
    )
    left = {key: tensor for key, tensor in tensors.items() if key not in later}
    return config | {key: 0 for key in _LATER if key in config}, left, (told,)


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same values, whatever their dtypes."""
    if one is other or one.shape != other.shape or one.problem or other.problem:
        return one.shape == other.shape
    step = max(1, _COMPARED // max(1, int(np.prod(one.shape[1:]))))
    return all(
        np.array_equal(one.rows(i, i + step).astype(np.float32), other.rows(i, i + step).astype(np.float32))
        for i in range(0, one.shape[0], step)
    )
