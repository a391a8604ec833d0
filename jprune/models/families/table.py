"""A family's table: for each parameter path, the Hugging Face tensor that stores it and how its axes lie there.

A row reads `path: (key, axes)`, where axes names the stored tensor's axes; parentheses join axes that are stored as
one, outermost first, and `i/n` says that the parameter is part i of n along a joined axis:

    "attn/q/kernel": ("self_attn.q_proj.weight", "(heads head_dim) d_model")
    "attn/k/kernel": ("query_key_value.weight", "(heads 1/3 head_dim) d_model")    # a fused tensor

The order of our own axes is `jprune.models.config.parameters`. Both directions follow from the row: splitting joined
axes, taking a part and permuting are views, so reading is a view of the stored tensor and writing is an assignment
through it.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jprune.models.config import DecoderConfig

Rows = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures that share a table; `config` maps their config.json, whose missing keys come from `defaults`."""

    architectures: tuple[str, ...]
    model_type: str
    defaults: Mapping[str, Any]  # Hugging Face's defaults of the keys that `config` reads
    config: Callable[[str, Mapping[str, Any]], DecoderConfig]  # (architecture, config.json with defaults)
    model: Rows  # rows outside the blocks
    block: Rows  # rows of block i; "{i}" in a key stands for i


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one parameter is stored, and the two directions between the stored layout and ours."""

    key: str  # name of the Hugging Face tensor
    shape: tuple[int, ...]  # of the whole stored tensor
    path_shape: tuple[int, ...]  # of the parameter in our layout
    apart: tuple[int, ...]  # the stored shape with joined axes split
    order: tuple[int, ...]  # for each of our axes its position among the split axes (parts taken)
    part: tuple[slice | int, ...]  # index into the split axes: slice(None), or the part's number

    @property
    def whole(self) -> bool:
        """Whether the parameter is all of the stored tensor (False for fused tensors)."""
        return all(index == slice(None) for index in self.part)

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The parameter in our layout: a view of the stored tensor (which must be contiguous, else it is copied)."""
        return stored.reshape(self.apart)[self.part].transpose(self.order)

    def write(self, parameter: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The stored tensor, contiguous: the exact inverse of `read`.

        `out` (contiguous, of the stored shape) is filled where given; it is needed where several parameters share a
        tensor.
        """
        if out is None:
            if not self.whole:
                raise TypeError(f"{self.key} holds several parameters: give the tensor to fill as `out`")
            out = np.empty(self.shape, parameter.dtype)
        self.read(out)[...] = parameter
        return out


def entry(key: str, stored_axes: str, path_axes: tuple[str, ...], size: Callable[[str], int]) -> Entry:
    """Resolve a row: names become sizes."""
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", stored_axes)]
    names = [name for group in groups for name in group]
    parts = {name: tuple(map(int, name.split("/"))) for name in names if "/" in name}
    sizes = {name: parts[name][1] if name in parts else size(name) for name in names}
    kept = [name for name in names if name not in parts]
    return Entry(
        key=key,
        shape=tuple(math.prod(sizes[name] for name in group) for group in groups),
        path_shape=tuple(sizes[name] for name in path_axes),
        apart=tuple(sizes[name] for name in names),
        order=tuple(kept.index(name) for name in path_axes),
        part=tuple(parts[name][0] if name in parts else slice(None) for name in names),
    )
