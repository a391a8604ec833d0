"""Hugging Face folders: safetensors (single or sharded), config.json and the files that travel with them.

Only safetensors are read. Pickled weights (pytorch_model.bin) can run code when they are opened and are refused.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jprune.checkpoints import beside, writing
from jprune.checkpoints.huggingface import bridged, decilm, quantised
from jprune.checkpoints.huggingface.locate import locate
from jprune.checkpoints.huggingface.names import named
from jprune.checkpoints.inside import checked
from jprune.checkpoints.source import FLOAT_DTYPES, Source, StoredTensor, identify, reason
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.parameters import shapes
from jprune.packages import require

FLOATS = {"F32": FLOAT_DTYPES["float32"], "F16": FLOAT_DTYPES["float16"], "BF16": FLOAT_DTYPES["bfloat16"]}
"""What weights are stored as, by its name in safetensors files."""


def open_source(path: Path) -> Source:
    """Opens a folder with config.json and safetensors, or one .safetensors file with config.json beside it.

    Raises:
        JpruneError: no config, weights that are pickled, or quantised in a way that is not read, missing or damaged
            files, an index that leaves the folder.
    """
    folder = path.parent if path.is_file() else path
    config = read_config(folder)
    where, chosen = locate(path, folder, config)
    stored: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    for file in dict.fromkeys(where.values()):
        there, metadata = open_file(file, FLOATS | quantised.DTYPES)
        stored |= {key: t for key, t in there.items() if where.get(key, file) == file}
        aliases |= {key: other for key, other in metadata.items() if other in there}
    if lost := [key for key in where if key not in stored and key != ""]:
        raise JpruneError(
            f"{where[lost[0]]}: tensor {lost[0]!r} is not in the file that the index names for it; download it again"
        )
    config, stored, dequantised = quantised.plain(config, stored, folder)
    opened = Source(
        config=config,
        tensors=stored,
        layout="hugging_face",
        side_files=functools.partial(beside.read, folder),
        identity=functools.partial(identify, *sorted(set(where.values()))),
        notices=chosen + dequantised,
    )
    if (why := bridged.lacking(config)) is not None:
        return bridged.source(opened, why, str(folder), aliases)
    config, tensors, told = named(config, stored, aliases)
    return dataclasses.replace(opened, config=config, tensors=tensors, notices=opened.notices + told)


def open_config(folder: Path) -> Source:
    """Opens a folder for its config.json alone: every tensor has a shape, and none can be read.

    Raises:
        JpruneError: no config, or one that is not supported.
    """
    hf_config, _, _ = quantised.plain(read_config(folder), {}, folder)
    if (why := bridged.lacking(hf_config)) is not None:
        opened = Source(
            config=hf_config,
            tensors={},
            layout="jprune",
            side_files=functools.partial(beside.read, folder),
            identity=lambda: "no weights",
        )
        return bridged.source_of_config(opened, why, str(folder))
    name = str(hf_config.get("dtype") or hf_config.get("torch_dtype")).removeprefix("torch.")

    def read() -> np.ndarray:
        raise JpruneError(f"{folder}: opened without weights (weights=False); open it with them to read parameters")

    return Source(
        config=hf_config,
        tensors={
            path: StoredTensor(
                shape=shape, dtype=FLOAT_DTYPES.get(name, FLOAT_DTYPES["float32"]), where="config.json", read=read
            )
            for path, shape in shapes(families.config(hf_config)).items()
        },
        layout="jprune",
        side_files=functools.partial(beside.read, folder),
        identity=lambda: "no weights",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, as the families read it.

    Raises:
        JpruneError: there is none, it is damaged, or it says that the weights are quantised in a way that is not read.
    """
    config = writing.read_json(checked(folder / "config.json", folder))
    quantised.scheme(config, folder)
    config = decilm.plain(config)
    return config if bridged.lacking(config) else {**config, "architectures": [families.architecture(config)]}


def open_file(
    path: Path, known: Mapping[str, np.dtype] = MappingProxyType(FLOATS)
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Args:
        path: the file.
        known: the dtypes that can be read, by their names in such files.

    Raises:
        JpruneError: the file is truncated or damaged.
    """
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # checks the header, also against the file's size
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            info = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
            metadata = file.metadata() or {}
        starts = _data_starts(path)
    except (SafetensorError, OSError) as error:
        raise JpruneError(f"{path}: truncated or damaged safetensors ({reason(error)}); download it again") from error

    def stored(key: str) -> StoredTensor:
        shape, kind = info[key]
        problem = None
        if kind not in known:
            problem = f"{path}: tensor {key!r} is stored as {kind}; supported: {', '.join(known)}"
        dtype = known.get(kind, FLOATS["F32"])
        read = functools.partial(_read_rows, path, key, starts[key], shape, dtype)
        return StoredTensor(
            shape=shape, dtype=dtype, where=path.name, read=read, read_rows=read if shape else None, problem=problem
        )

    return {key: stored(key) for key in info}, metadata


def _data_starts(path: Path) -> dict[str, int]:
    """Where in the file each tensor's data begin; the header has been checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _read_rows(
    path: Path, key: str, at: int, shape: tuple[int, ...], dtype: np.dtype, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """A tensor, or some rows of it, whose data begin at a byte of a file.

    It is read and not mapped: pages of a mapped file stay in this process's memory, more of them with every block.
    """
    if shape and (start or stop is not None):
        at += start * math.prod(shape[1:]) * dtype.itemsize
        shape = (min(shape[0] if stop is None else stop, shape[0]) - start, *shape[1:])
    count = math.prod(shape)
    try:
        values = np.fromfile(path, dtype, count, offset=at)
    except OSError as error:
        raise JpruneError(f"{path}: {key!r} cannot be read ({reason(error)})") from error
    if len(values) < count:
        raise JpruneError(f"{path}: truncated since it was opened: {key!r} is not whole; download it again")
    return values.reshape(shape)
