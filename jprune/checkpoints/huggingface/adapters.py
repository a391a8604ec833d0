"""LoRA adapters in the folder form of Hugging Face's PEFT: told from models, read, and merged into one.

A kernel W becomes W + alpha / r * B A (alpha / sqrt(r) with `use_rslora`), in float32, in the dtype it has. Deviation
from PEFT: weights of a kernel that are exactly zero stay zero, as in `jprune tune lora`: a pruned model stays pruned.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import writing
from jprune.checkpoints.dtypes import cast
from jprune.checkpoints.huggingface.read import open_file
from jprune.checkpoints.inside import checked
from jprune.checkpoints.source import Source, StoredTensor, identify
from jprune.errors import JpruneError
from jprune.models import families

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
# What makes a product of two matrices something else; PEFT's own words.
_OTHERWISE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Initial values that change the model's weights, too.
_FROM_THE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse(folder: Path) -> None:
    """Raises a JpruneError, with the command that merges it, if a folder without weights of a model is an adapter."""
    if (folder / CONFIG).exists():
        config = writing.read_json(checked(folder / CONFIG, folder))
        base = config.get("base_model_name_or_path") or "MODEL"
        raise JpruneError(
            f"{folder}: an adapter ({config.get('peft_type')}) of {base}, not a model; merge it into its model: "
            f"`jprune convert {base} --adapter {folder} --out DIR`"
        )


def merge(source: Source, folder: Path) -> Source:
    """The model with an adapter merged: its tensors are added to when they are read.

    Raises:
        JpruneError: not an adapter, one of a kind that is not a plain LoRA, or one of another model.
    """
    if source.layout != "hugging_face":
        raise JpruneError(
            f"adapters go by the names of Hugging Face's tensors; convert the model first, then merge {folder}"
        )
    if not (folder / CONFIG).exists():
        raise JpruneError(f"{folder}: no {CONFIG} there; expected the folder of an adapter, as PEFT writes it")
    config = writing.read_json(checked(folder / CONFIG, folder))
    _check(config, folder)
    if not (folder / WEIGHTS).exists():
        raise JpruneError(
            f"{folder}: no {WEIGHTS} there; pickled adapters (.bin) are not read because they can run code"
        )
    stored, _ = open_file(checked(folder / WEIGHTS, folder))
    pairs: dict[str, dict[str, StoredTensor]] = {}
    tensors = dict(source.tensors)
    architecture = families.architecture(source.config)
    for key, tensor in stored.items():
        if tensor.problem:
            raise JpruneError(tensor.problem)
        found = _PARTS.fullmatch(key)
        name = _name(f"{found[1]}.weight" if found else key, architecture, tensors, folder)
        if found:
            pairs.setdefault(name, {})[found[2]] = tensor
        else:  # a whole tensor, one of `modules_to_save`
            tensors[name] = tensor
    for name, pair in pairs.items():
        tensors[name] = _added(name, tensors[name], pair, config, architecture, folder)
    told = f"{len(pairs)} kernels were merged with {folder}; weights that are zero stay zero"
    return dataclasses.replace(
        source,
        tensors=tensors,
        identity=lambda: source.identity() + identify(folder / CONFIG, folder / WEIGHTS),
        notices=(*source.notices, told),
    )


def _check(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise JpruneError(f"{folder}: an adapter of the kind {kind}; only LORA is merged. Merge it with PEFT")
    start = config.get("init_lora_weights")
    otherwise = [key for key in _OTHERWISE if config.get(key)]
    if config.get("bias") not in (None, "none"):
        otherwise.append("bias")
    if isinstance(start, str) and start.lower().startswith(_FROM_THE_WEIGHTS):
        otherwise.append(f"init_lora_weights {start}")
    if otherwise:
        raise JpruneError(
            f"{folder}: an adapter with {', '.join(otherwise)}; only plain LoRA is merged. Merge it with PEFT"
        )


def _name(key: str, architecture: str, tensors: Mapping[str, StoredTensor], folder: Path) -> str:
    """The model's tensor that a key of the adapter means."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")  # PEFT keeps embeddings with their adapters
    for known in (name, families.ARCHITECTURES[architecture].prefix + name):
        if known in tensors:
            return known
    raise JpruneError(
        f"{folder}: the adapter has {key!r}, and the model's files have no tensor for it; is it for another model?"
    )


def _added(
    name: str,
    tensor: StoredTensor,
    pair: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    architecture: str,
    folder: Path,
) -> StoredTensor:
    """A tensor that B A is added to when it is read."""
    embedding = any("embedding" in part for part in pair)
    a, b = (pair.get(f"lora_embedding_{x}" if embedding else f"lora_{x}.weight") for x in "AB")
    # Conv1D and embeddings are stored with their inputs first.
    turned = embedding or bool(config.get("fan_in_fan_out")) or architecture == "GPT2LMHeadModel"
    shape = tensor.shape[::-1] if turned else tensor.shape
    if a is None or b is None or len(shape) != 2 or (b.shape[:1] + a.shape[1:], b.shape[1:]) != (shape, a.shape[:1]):
        found = ", ".join(f"{part} {half.shape}" for part, half in sorted(pair.items()))
        raise JpruneError(
            f"{folder}: {name} has shape {tensor.shape}, which {found} do not fit; is it for another model?"
        )
    scale = _alpha(config, name.removesuffix(".weight"), folder) / (
        math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0]
    )
    return dataclasses.replace(
        tensor,
        read=functools.partial(_read, name, tensor, a, b, scale, turned, keep_zeros=not embedding),
        read_rows=None,
    )


def _alpha(config: Mapping[str, Any], module: str, folder: Path) -> float:
    """The adapter's alpha for a module: `alpha_pattern` may have another for some."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise JpruneError(f"{folder / CONFIG}: alpha_pattern must be an object, got {patterns!r:.80}")
    for pattern, own in patterns.items():
        if not re.fullmatch(r"[\w.]+", pattern):  # PEFT takes them as regular expressions; a file's may run for ever
            raise JpruneError(f"{folder / CONFIG}: alpha_pattern {pattern!r} is more than a name. Merge it with PEFT")
        if f".{module}".endswith(f".{pattern}"):
            alpha = own
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise JpruneError(f"{folder / CONFIG}: lora_alpha for {module} must be a number, got {alpha!r}")
    return alpha


def _read(
    name: str, tensor: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float, turned: bool, *, keep_zeros: bool
) -> np.ndarray:
    before = tensor.read()
    product = scale * (b.read().astype(np.float32) @ a.read().astype(np.float32))
    after = cast(before.astype(np.float32) + (product.T if turned else product), tensor.dtype, name)
    return np.where(before == 0, before, after) if keep_zeros else after
