"""Quantised weights in a Hugging Face folder, read as plain ones: tensor by tensor, when they are asked for.

`fp8`    `X.weight` (E4M3) times `X.weight_scale_inv`, a number for each block of `weight_block_size`: DeepSeek-V3,
         Kimi K2, Qwen3-FP8.
`mxfp4`  `X_blocks` [experts, outputs, groups, 16], two numbers (E2M1) in a byte, the low half first, times
         2 ** (`X_scales` [experts, outputs, groups] - 127): gpt-oss. Read as X [experts, inputs, outputs].
         (Open Compute Project, "Microscaling Formats (MX) Specification", version 1.0.)

Products are float32, rounded to bfloat16, as transformers has them. Deviation: blocks of fp8 at an edge may be smaller
than the others, as those of DeepSeek-V3's key/value projection are (576 rows), which transformers does not read.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jprune.checkpoints.source import FLOAT_DTYPES, StoredTensor
from jprune.errors import JpruneError

DTYPES = {
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""What quantised weights and their scales are stored as, beside floats, by its name in safetensors files."""
BFLOAT16 = FLOAT_DTYPES["bfloat16"]
_KEYS = ("quantization_config", "compression_config")  # compressed-tensors once had a key of its own
_SCALES = (*FLOAT_DTYPES.values(), DTYPES["F8_E8M0"])
_CHUNK = 1 << 24  # elements of a tensor that are floats at a time
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=-1)  # of every byte


def scheme(config: Mapping[str, Any], folder: Path) -> str | None:
    """How a config.json says that the weights are quantised; None if it says they are not, or nothing.

    Raises:
        JpruneError: in a way that is not read.
    """
    given = next((config[key] for key in _KEYS if config.get(key)), None)  # null or empty: they are not
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if given is not config.get("quantization_config") or not isinstance(given, dict) or str(method) not in _SCHEMES:
        raise JpruneError(
            f"{folder}: the weights are quantised ({method}); only {' and '.join(_SCHEMES)} are read. Give the "
            "unquantised model, or a GGUF of it"
        )
    return method


def plain(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], folder: Path
) -> tuple[dict[str, Any], dict[str, StoredTensor], tuple[str, ...]]:
    """A config.json that no longer says that weights are quantised, the tensors as bfloat16, and what a user should
    know.

    Raises:
        JpruneError: a scheme that is not read, or scales that do not fit their weights.
    """
    method = scheme(config, folder)
    left = {key: value for key, value in config.items() if key not in _KEYS}
    if method is None:
        return left, {key: _known(key, tensor) for key, tensor in stored.items()}, ()
    left["dtype" if "dtype" in left else "torch_dtype"] = "bfloat16"
    tensors = _SCHEMES[method](config["quantization_config"], stored)
    count = sum(tensor.stored_bytes is not None for tensor in tensors.values())
    told = f"{folder}: {count} tensors are stored as {method} and read as bfloat16, which results are written in"
    return left, {key: _known(key, tensor) for key, tensor in tensors.items()}, (told,)


def _known(key: str, tensor: StoredTensor) -> StoredTensor:
    kind = next((name for name, dtype in DTYPES.items() if dtype == tensor.dtype), None)
    if kind is None:
        return tensor
    problem = f"{tensor.where}: tensor {key!r} is stored as {kind}, and config.json and the files do not say its scales"
    return dataclasses.replace(tensor, problem=problem)


def _fp8(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    block = settings.get("weight_block_size") or (0, 0)
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise JpruneError(
            f"config.json: weight_block_size of fp8 weights is {block!r}, expected two positive numbers such as "
            "[128, 128]; scales of whole tensors or rows are not read"
        )
    tensors = dict(stored)
    for key in [key for key in stored if key.endswith(".weight_scale_inv")]:
        name = key.removesuffix("_scale_inv")
        weight, scale = stored.get(name), stored[key]
        if weight is None or weight.dtype != DTYPES["F8_E4M3"] or scale.dtype not in _SCALES:
            continue  # which is refused, if it is needed
        grid = tuple(-(-size // each) for size, each in zip(weight.shape, block))
        if len(weight.shape) != 2 or scale.shape != grid:
            raise JpruneError(
                f"{scale.where}: {key!r} has shape {scale.shape}, but {name!r} of shape {weight.shape} has "
                f"{grid} blocks of {tuple(block)}"
            )
        read = functools.partial(_fp8_rows, weight, scale, tuple(block))
        tensors[name] = _read_as(weight.shape, read, weight, scale)
        del tensors[key]
    return tensors


def _fp8_rows(
    weight: StoredTensor, scale: StoredTensor, block: tuple[int, int], start: int = 0, stop: int | None = None
) -> np.ndarray:
    stop = weight.shape[0] if stop is None else min(stop, weight.shape[0])
    scales = scale.read().astype(np.float32)
    out = np.empty((stop - start, weight.shape[1]), BFLOAT16)
    step = max(1, _CHUNK // weight.shape[1])
    for first in range(start, stop, step):
        last = min(first + step, stop)
        wide = scales[np.arange(first, last) // block[0]]
        values = _E4M3[weight.rows(first, last).view(np.uint8)]
        values *= np.repeat(wide, block[1], axis=1)[:, : weight.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):
            out[first - start : last - start] = values
    return out


def _mxfp4(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    del settings  # which modules are not quantised: they have no blocks
    tensors = dict(stored)
    for key in [key for key in stored if key.endswith("_blocks")]:
        name = key.removesuffix("_blocks")
        blocks, scales = stored[key], stored.get(f"{name}_scales")
        bytes_ = scales is not None and {blocks.dtype, scales.dtype} == {DTYPES["U8"]}
        if scales is None or len(blocks.shape) != 4 or (*scales.shape, 16) != blocks.shape or not bytes_:
            raise JpruneError(
                f"{blocks.where}: {key!r} has shape {blocks.shape} and its scales "
                f"{None if scales is None else scales.shape}; expected bytes, [experts, outputs, groups, 16], and the "
                "same without the 16"
            )
        experts, outputs, groups, _ = blocks.shape
        read = functools.partial(_mxfp4_rows, blocks, scales)
        tensors[name] = _read_as((experts, 32 * groups, outputs), read, blocks, scales)
        del tensors[key], tensors[f"{name}_scales"]
    return tensors


def _mxfp4_rows(blocks: StoredTensor, scales: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    experts, outputs, groups, _ = blocks.shape
    stop = experts if stop is None else min(stop, experts)
    out = np.empty((stop - start, 32 * groups, outputs), BFLOAT16)
    for expert in range(start, stop):
        bytes_ = blocks.rows(expert, expert + 1)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            powers = np.exp2(scales.rows(expert, expert + 1)[0].astype(np.float32) - 127)
            values = _PAIRS[bytes_].reshape(outputs, groups, 32) * powers[..., None]
            out[expert - start] = values.reshape(outputs, -1).T
    return out


def _read_as(shape: tuple[int, ...], read: Callable[..., np.ndarray], *stored: StoredTensor) -> StoredTensor:
    return StoredTensor(
        shape=shape,
        dtype=BFLOAT16,
        where=stored[0].where,
        read=read,
        read_rows=read,
        problem=next((tensor.problem for tensor in stored if tensor.problem), None),
        stored_bytes=sum(tensor.nbytes for tensor in stored),
    )


_SCHEMES: dict[str, Callable[[Mapping[str, Any], Mapping[str, StoredTensor]], dict[str, StoredTensor]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}
