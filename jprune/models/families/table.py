"""A family's table: for each parameter path, the Hugging Face tensor that stores it and how its axes lie there.

A row reads `path: (key, axes)`, where axes names the stored tensor's axes; parentheses join axes that are stored as
one, outermost first:

    "attn/q/kernel": ("self_attn.q_proj.weight", "(heads head_dim) d_model")

Several parameters may share a tensor. Then each row says which part is its own: `<...>` marks its summand of an axis
that is a sum, and a summand `<1>` is a single position, so no axis of the parameter.

    "attn/k/kernel": ("query_key_value.weight", "(heads 1+<1>+1 head_dim) d_model")        # q, k, v of every head
    "attn/k/kernel": ("qkv_proj.weight", "(heads+<kv_heads>+kv_heads head_dim) d_model")   # all q, all k, all v
    "attn/q/kernel": ("query_key_value.weight", "(kv_heads <group>+1+1 head_dim) d_model")  # a KV head with its q heads

In the last row our axis `heads` is stored as two, `kv_heads` and `group` (`COMPOSED`). And a parameter may take several
tensors, one for each position along its first axis, which the key then names in braces:

    "mlp/experts/up/kernel": ("experts.{experts}.w3.weight", "d_ff d_model")

The order of our own axes is `jprune.models.parameters.parameters`. Both directions follow from the row: splitting
joined axes, taking a part and permuting are views, so writing is an assignment through a view of the stored tensor.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jprune.models.config import DecoderConfig

Rows = Mapping[str, tuple[str, str]]
COMPOSED = {"heads": ("kv_heads", "group")}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures that share a table; `config` maps their config.json, whose missing keys come from `defaults`."""

    architectures: tuple[str, ...]
    model_type: str
    defaults: Mapping[str, Any]  # Hugging Face's defaults of the keys that `config` reads
    config: Callable[[str, Mapping[str, Any]], DecoderConfig]  # (architecture, config.json with defaults)
    model: Rows  # rows outside the blocks
    block: Rows  # rows of block i; "{i}" in a key stands for i
    names: Mapping[str, str] = field(default_factory=dict)  # what this config.json calls hidden_size and the like
    rows: Callable[[DecoderConfig], tuple[Rows, Rows]] | None = None  # other rows, where they depend on the config
    variants: tuple[Mapping[str, Any], ...] = ({},)  # settings of config.json that its test tries

    @property
    def prefix(self) -> str:
        """The first word of the keys, and a dot; checkpoints of the base model leave it out."""
        return next(iter(self.block.values()))[0].split(".")[0] + "."


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one parameter is stored, and the two directions between the stored layout and ours."""

    keys: tuple[str, ...]  # names of the Hugging Face tensors: one, or one for each position along our first axis
    shape: tuple[int, ...]  # of each whole stored tensor
    path_shape: tuple[int, ...]  # of the parameter in our layout
    apart: tuple[int, ...]  # the stored shape with joined axes split
    order: tuple[int, ...]  # the split axes (those that are single positions left out) in the order of ours
    part: tuple[slice | int, ...]  # index into the split axes
    stacked: bool  # whether the tensors are stacked along our first axis

    @property
    def key(self) -> str:
        """The first of the keys: the only one, unless the entry is `stacked`."""
        return self.keys[0]

    @property
    def whole(self) -> bool:
        """Whether the parameter is all of the stored tensors (False for fused tensors)."""
        return all(index == slice(None) for index in self.part)

    def read(self, *stored: np.ndarray) -> np.ndarray:
        """The parameter in our layout, out of its stored tensors.

        Mostly a view of the stored tensor; a copy if several are stacked, or if it lies there in pieces.
        """
        return self.read_in_turn(stored)

    def read_in_turn(self, stored: Iterable[np.ndarray]) -> np.ndarray:
        """`read`, of tensors of one dtype that come one by one: of a stack one alone is there beside the parameter."""
        tensors = iter(stored)
        first = self._view(next(tensors))
        if not self.stacked:
            return first.reshape(self.path_shape)
        out = np.empty((len(self.keys), *first.shape), first.dtype)
        out[0] = first
        del first
        for index, tensor in enumerate(tensors, start=1):
            out[index] = self._view(tensor)
        return out.reshape(self.path_shape)

    def write(self, parameter: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The stored tensor of an entry with one key, contiguous: the exact inverse of `read`.

        `out` (contiguous, of the stored shape) is filled where given; it is needed where several parameters share a
        tensor.
        """
        if self.stacked:
            raise TypeError(f"{self.key} is one of {len(self.keys)} tensors: write them one by one with `write_to`")
        if out is None:
            if not self.whole:
                raise TypeError(f"{self.key} holds several parameters: give the tensor to fill as `out`")
            out = np.empty(self.shape, parameter.dtype)
        self.write_to(0, parameter, out)
        return out

    def write_to(self, index: int, parameter: np.ndarray, out: np.ndarray) -> None:
        """Fills this parameter's part of the stored tensor `keys[index]`."""
        view = self._view(out)
        view[...] = (parameter[index] if self.stacked else parameter).reshape(view.shape)

    def _view(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(self.apart)[self.part].transpose(self.order)


def entry(key: str, stored_axes: str, path_axes: Sequence[str], size: Callable[[str], int]) -> Entry:
    """Resolve a row: names become sizes."""
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", stored_axes)]
    axes = [_Axis(name, size) for group in groups for name in group]
    along = re.search(r"\{(\w+)\}", key)
    names = list(path_axes[1:] if along else path_axes)
    kept = [axis.name for axis in axes if axis.name is not None]
    for whole, parts in COMPOSED.items():
        if whole in names and whole not in kept:
            at = names.index(whole)
            names[at : at + 1] = parts
    lengths = iter([axis.length for axis in axes])
    return Entry(
        keys=tuple(key.format(**{along[1]: j}) for j in range(size(along[1]))) if along else (key,),
        shape=tuple(math.prod(next(lengths) for _ in group) for group in groups),
        path_shape=tuple(size(name) for name in path_axes),
        apart=tuple(axis.length for axis in axes),
        order=tuple(kept.index(name) for name in names),
        part=tuple(axis.part for axis in axes),
        stacked=along is not None,
    )


class _Axis:
    """One axis of a stored tensor: its length, which part is the parameter's, and the name of that part's axis."""

    def __init__(self, text: str, size: Callable[[str], int]):
        terms = text.split("+")
        own = [term for term in terms if term.startswith("<")] or terms
        if len(own) != 1:
            raise ValueError(f"expected one summand in <> in {text!r}")
        before = sum(_length(term, size) for term in terms[: terms.index(own[0])])
        name = own[0].strip("<>")
        self.length = sum(_length(term.strip("<>"), size) for term in terms)
        self.name = None if name.isdecimal() else name
        self.part: slice | int = slice(before, before + _length(name, size)) if self.name else before
        if len(terms) == 1 and self.name:
            self.part = slice(None)


def _length(name: str, size: Callable[[str], int]) -> int:
    return int(name) if name.isdecimal() else size(name)
