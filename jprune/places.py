"""Where in the parameters a kernel lies, and statistics that know it.

A kernel is mostly a whole leaf, ``[d_in, d_out]`` or with more axes of either kind. It may also be a part of one
(``gating[0]``, a third of a fused query, key and value), a stack of kernels each with inputs of its own (experts, the
layers of a scan), or lie across axes (groups of a convolution).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jprune.annotations import Array, Shaped
from jprune.errors import JpruneError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a kernel lies: a leaf, the part of it, and which axes of the part are inputs, outputs and stacks."""

    path: str
    """Of the leaf."""
    in_axes: tuple[int, ...]
    """Axes that are summed over, ascending."""
    batch_axes: tuple[int, ...] = ()
    """Axes that number the kernels of a stack, ascending; all others are outputs."""
    part: tuple[tuple[int, int], ...] | None = None
    """Start and stop along every axis of the leaf, where the kernel is not all of it."""
    shape: tuple[int, ...] | None = None
    """What the part is reshaped to before its axes are counted, where an axis of the leaf is of several kinds."""

    @property
    def key(self) -> str:
        """The path, and behind it which part, as NumPy writes it: ``mlp/gating[0:1]``."""
        if self.part is None:
            return self.path
        return f"{self.path}[{', '.join(f'{a}:{b}' for a, b in self.part)}]"

    def matrices(self, leaf: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array | np.ndarray, "stack d_in d_out"]:
        """The matrix views of the kernels; a stack of one where there are no `batch_axes`."""
        part = leaf if self.part is None else leaf[tuple(slice(a, b) for a, b in self.part)]
        part = part if self.shape is None else part.reshape(self.shape)
        order = self._order(part.ndim)
        stack = math.prod(part.shape[i] for i in self.batch_axes)
        d_in = math.prod(part.shape[i] for i in self.in_axes)
        return part.transpose(order).reshape(stack, d_in, part.size // (stack * d_in))

    def put(self, leaf: Shaped[Array, "..."], matrices: Shaped[Array, "stack d_in d_out"]) -> Shaped[Array, "..."]:
        """The leaf with these matrix views in the kernels' place; the inverse of `matrices`."""
        part = self.sizes(leaf.shape)
        shape = part if self.shape is None else self.shape
        order = self._order(len(shape))
        values = matrices.reshape([shape[i] for i in order]).transpose([order.index(i) for i in range(len(shape))])
        values = values.reshape(part).astype(leaf.dtype)
        return values if self.part is None else leaf.at[tuple(slice(a, b) for a, b in self.part)].set(values)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part in a leaf of this shape."""
        if self.part is None:
            return shape
        if len(self.part) != len(shape) or any(stop > n for (_, stop), n in zip(self.part, shape)):
            raise JpruneError(f"{self.key} does not fit a leaf of shape {shape}")
        return tuple(stop - start for start, stop in self.part)

    def _order(self, ndim: int) -> list[int]:
        rest = [i for i in range(ndim) if i not in self.in_axes and i not in self.batch_axes]
        return [*self.batch_axes, *self.in_axes, *rest]


@jax.tree_util.register_pytree_node_class
class Observed(Mapping[str, Any]):
    """Statistics by the key of their kernel, and where each kernel lies.

    It is a pytree: it goes through `jax.jit`, and those of several batches are merged with `merge`.
    """

    def __init__(self, statistics: Mapping[str, Any], places: Mapping[str, Place]) -> None:
        self._statistics = dict(statistics)
        self.places: dict[str, Place] = {key: places[key] for key in self._statistics}
        """The place of each kernel, by the same keys."""

    def __getitem__(self, key: str) -> Any:
        return self._statistics[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def __repr__(self) -> str:
        return f"Observed({', '.join(f'{key}: {type(value).__name__}' for key, value in self.items())})"

    def merge(self, other: "Observed") -> "Observed":
        """Having seen what either has seen.

        Raises:
          JpruneError: they are not of the same kernels.
        """
        if self.places != other.places:
            strays = sorted(self.places.items() ^ other.places.items(), key=lambda item: item[0])
            raise JpruneError(f"expected statistics of the same kernels, found {strays[0][0]} in one only")
        return Observed({key: value.merge(other[key]) for key, value in self.items()}, self.places)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Place, ...]]:
        """The statistics are leaves, the places are not."""
        return tuple(self._statistics.values()), tuple(self.places.values())

    @classmethod
    def tree_unflatten(cls, places: tuple[Place, ...], statistics: tuple[Any, ...]) -> "Observed":
        """The inverse of `tree_flatten`."""
        keys = [place.key for place in places]
        return cls(dict(zip(keys, statistics)), dict(zip(keys, places)))
