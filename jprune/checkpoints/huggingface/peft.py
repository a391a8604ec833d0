"""Adapters kept apart, in the folder form of Hugging Face's PEFT, which loads them beside the model.

    adapter_config.json          rank, alpha, the adapted modules, and which model they belong to
    adapter_model.safetensors    lora_A [r, d_in] and lora_B [d_out, r] of each, under the names of the model's tensors

PEFT writes torch's layout: our a ``[*d_in, r]`` and b ``[r, *d_out]`` flattened and transposed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import writing
from jprune.checkpoints.model import Model
from jprune.errors import JpruneError
from jprune.models import families

_PREFIX = "base_model.model."


def save(
    folder: Path,
    checkpoint: Model,
    adapters: Mapping[str, tuple[Any, Any]],
    *,
    alpha: float,
    dropout: float,
) -> None:
    """Writes adapters into an empty folder.

    Args:
        folder: an empty folder.
        checkpoint: the model that they belong to.
        adapters: (a, b) by the path of their kernel, as `jprune.train.lora.by_path` gives them.
        alpha: products count alpha / r.
        dropout: that they were trained with; for the record.

    Raises:
        JpruneError: a kernel that the model's files do not hold as one matrix [d_out, d_in], or the disk is full.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, (a, b) in adapters.items():
        module, rank = name(checkpoint, path), a.shape[-1]
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.asarray(a, np.float32).reshape(-1, rank).T
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.asarray(b, np.float32).reshape(rank, -1).T
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.source,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name(checkpoint, path) for path in adapters}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with writing.explained(folder):
        writing.write_json(folder / "adapter_config.json", config)
        file = writing.SafetensorsFile(
            folder / "adapter_model.safetensors", {key: (t.shape, t.dtype) for key, t in tensors.items()}
        )
        for key, tensor in tensors.items():
            file.write(key, tensor)


def name(checkpoint: Model, path: str) -> str:
    """The name that a kernel's module has in torch.

    Raises:
        JpruneError: the files do not hold the kernel as one matrix [d_out, d_in].
    """
    entry = families.table(checkpoint.config)[path]
    size = math.prod(entry.path_shape)
    plain = entry.whole and not entry.stacked and entry.key.endswith(".weight") and len(entry.shape) == 2
    if plain:
        # Whether inputs come first in our layout and last in theirs, and nothing else is turned round.
        numbers = np.arange(size).reshape(entry.path_shape)
        d_in = entry.shape[1]
        plain = np.array_equal(entry.write(numbers), numbers.reshape(d_in, -1).T)
    if not plain:
        raise JpruneError(
            f"{path}: the model's files do not hold this kernel as a matrix of its own, so PEFT has no name for its "
            "adapter; merge the adapters instead of keeping them apart, or leave it out of `targets`"
        )
    return entry.key.removesuffix(".weight")
