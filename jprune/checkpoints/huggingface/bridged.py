"""Folders of models without a table: their tensors as parameters of PyTorch's module (`jprune.bridge`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jprune import bridge
from jprune.checkpoints.huggingface.names import equal
from jprune.checkpoints.source import FLOAT_DTYPES, Source, StoredTensor, joined
from jprune.errors import JpruneError
from jprune.models import families

OTHERWISE = ("exaone", "sarvam_moe")
"""model_types that transformers computes by an architecture with a table, of which files have other tensors."""


def lacking(hf_config: Mapping[str, Any]) -> str | None:
    """Why a model has no native table; None if it has one."""
    if (kind := hf_config.get("model_type")) in OTHERWISE:
        return f"the files of the model_type {kind!r} have tensors of their own, for which jprune has no table"
    try:
        families.architecture(hf_config)
    except JpruneError as error:
        return str(error)
    return None


def source(opened: Source, why: str, what: str, aliases: Mapping[str, str]) -> Source:
    """The parameters of the model that a folder holds, by path.

    Args:
        opened: config, and tensors by the names that they have in the files.
        why: the reason why the model has no native table.
        what: the folder, for messages.
        aliases: names that stand for those of other tensors, as the files' metadata say.

    Raises:
        JpruneError: as `jprune.bridge.open_model`; or a parameter of which the files hold two that differ.
    """
    tensors = {**{alias: opened.tensors[key] for alias, key in aliases.items()}, **opened.tensors}
    given = {key: tensor.shape for key, tensor in tensors.items()}
    model = bridge.open_model(opened.config, what, why, given)
    assert model.stored is not None
    for name, twins in model.stored.twins.items():
        first = model.stored.entries[name].key
        for key in twins:
            if not equal(tensors[first], tensors[key]):
                raise JpruneError(
                    f"{what}: {first!r} and {key!r} are one parameter of {model.in_blocks.architecture}, but the files "
                    "hold both, and they differ; if they are not tied, say so in config.json (tie_word_embeddings)"
                )
    table = {
        path: entry
        for path, entry in model.table(given).items()
        if not path.startswith("unused/") or not any(tensors[key].problem for key in entry.keys)
    }
    for entry in table.values():
        if problem := next((tensors[key].problem for key in entry.keys if tensors[key].problem), None):
            raise JpruneError(problem)
    told = opened.notices + model.notices
    found = {path: joined([tensors[key] for key in entry.keys], entry) for path, entry in table.items()}
    return dataclasses.replace(opened, tensors=found, layout="jprune", model=model.in_blocks, table=table, notices=told)


def source_of_config(opened: Source, why: str, what: str) -> Source:
    """As `source`, of a config alone: every tensor has a shape, and none can be read."""
    model = bridge.open_model(opened.config, what, why)
    name = str(opened.config.get("dtype") or opened.config.get("torch_dtype")).removeprefix("torch.")
    dtype = FLOAT_DTYPES.get(name, FLOAT_DTYPES["float32"])

    def read() -> np.ndarray:
        raise JpruneError(f"{what}: opened without weights (weights=False); open it with them to read parameters")

    found = {
        path: StoredTensor(shape=shape, dtype=dtype, where="config.json", read=read)
        for path, shape in model.shapes.items()
    }
    return dataclasses.replace(
        opened, tensors=found, layout="jprune", model=model.in_blocks, notices=opened.notices + model.notices
    )
