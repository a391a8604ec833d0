"""Where in the parameters a kernel lies, and statistics that know it.

A kernel is mostly a whole leaf, ``[d_in, d_out]`` or with more axes of either kind. It may also be a part of one
(``gating[0]``, a third of a fused query, key and value), a stack of kernels each with inputs of its own (experts, the
layers of a scan), or lie across axes (groups of a convolution).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
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

    def __post_init__(self) -> None:
        both = (*self.in_axes, *self.batch_axes)
        for axes in (self.in_axes, self.batch_axes):
            if list(axes) != sorted(set(axes)) or any(axis < 0 for axis in axes) or len(set(both)) < len(both):
                raise JpruneError(
                    f"{self.path}: expected ascending numbers of axes, from 0 on and each of one kind, got inputs "
                    f"{self.in_axes} and stacks {self.batch_axes}"
                )

    @property
    def key(self) -> str:
        """The path, and behind it which part, as NumPy writes it: ``mlp/gating[0:1]``."""
        if self.part is None:
            return self.path
        return f"{self.path}[{', '.join(f'{a}:{b}' for a, b in self.part)}]"

    def matrices(self, leaf: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array | np.ndarray, "stack d_in d_out"]:
        """The matrix views of the kernels; a stack of one where there are no `batch_axes`."""
        sizes = self.sizes(leaf.shape)
        part = leaf if self.part is None else leaf[tuple(slice(a, b) for a, b in self.part)]
        stack, d_in, d_out = self.counts(leaf.shape)
        part = part.reshape(sizes if self.shape is None else self.shape)
        return part.transpose(self._order(part.ndim)).reshape(stack, d_in, d_out)

    def put(self, leaf: Shaped[Array, "..."], matrices: Shaped[Array, "stack d_in d_out"]) -> Shaped[Array, "..."]:
        """The leaf with these matrix views in the kernels' place, in its dtype; the inverse of `matrices`."""
        part = self.sizes(leaf.shape)
        shape = part if self.shape is None else self.shape
        order = self._order(len(shape))
        values = matrices.reshape([shape[i] for i in order]).transpose([order.index(i) for i in range(len(shape))])
        values = values.reshape(part).astype(leaf.dtype)
        return values if self.part is None else leaf.at[tuple(slice(a, b) for a, b in self.part)].set(values)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part in a leaf of this shape.

        Raises:
          JpruneError: the leaf has no such part, or the part no such axes.
        """
        sizes = shape if self.part is None else tuple(stop - start for start, stop in self.part)
        fits = self.part is None or (
            len(self.part) == len(shape) and all(0 <= start < stop <= n for (start, stop), n in zip(self.part, shape))
        )
        seen = sizes if self.shape is None else self.shape
        if (
            not fits
            or math.prod(seen) != math.prod(sizes)
            or max((*self.in_axes, *self.batch_axes), default=0) >= len(seen)
        ):
            raise JpruneError(f"expected a leaf that {self} fits, got one of shape {shape}; observe these parameters")
        return sizes

    def counts(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many kernels a leaf of this shape has here, and how many inputs and outputs each has."""
        sizes = self.sizes(shape) if self.shape is None else self.shape
        stack = math.prod(sizes[i] for i in self.batch_axes)
        d_in = math.prod(sizes[i] for i in self.in_axes)
        return stack, d_in, math.prod(sizes) // (stack * d_in)

    def overlaps(self, other: "Place") -> bool:
        """Whether some element lies in both."""
        if self.path != other.path or self.part is None or other.part is None:
            return self.path == other.path
        return all(a < d and c < b for (a, b), (c, d) in zip(self.part, other.part))

    def _order(self, ndim: int) -> list[int]:
        rest = [i for i in range(ndim) if i not in self.in_axes and i not in self.batch_axes]
        return [*self.batch_axes, *self.in_axes, *rest]


def given(in_axes: Mapping[str, Iterable[int]] | Iterable[Any]) -> dict[str, tuple[Place, ...]]:
    """The places that somebody says, by path of the leaf.

    Args:
      in_axes: input axes of whole leaves by their path; or matmuls as `jprune.matmuls` returns them, of which those
        that read the same kernel count once.
    """
    if isinstance(in_axes, Mapping):
        return {path: (Place(path=path, in_axes=tuple(axes)),) for path, axes in in_axes.items()}
    matmuls: Iterable[Any] = in_axes
    places: dict[str, tuple[Place, ...]] = {}
    for matmul in matmuls:
        whole = Place(path=matmul.path, in_axes=matmul.in_axes, batch_axes=matmul.batch_axes)
        place = getattr(matmul, "place", whole)
        others = places.get(place.path, ())
        if place not in others:
            places[place.path] = (*others, place)
    return places


def check_apart(places: Iterable[Place]) -> None:
    """Raises a `JpruneError` if two of these places have an element in common."""
    for one, other in itertools.combinations(places, 2):
        if one.overlaps(other):
            raise JpruneError(
                f"expected kernels that have no element in common, found {one} and {other}: their statistics do not "
                "add; leave one out"
            )


@jax.tree_util.register_pytree_with_keys_class
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
        if not isinstance(other, Observed):
            raise JpruneError(f"expected what jprune.observe returns, got {type(other).__name__}")
        if self.places != other.places:
            strays = sorted(self.places.items() ^ other.places.items(), key=lambda item: item[0])
            raise JpruneError(f"expected statistics of the same kernels, found {strays[0][0]} in one only")
        return Observed({key: value.merge(other[key]) for key, value in self.items()}, self.places)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Place, ...]]:
        """The same as `tree_flatten`, and by which key each statistic is found."""
        return tuple((jax.tree_util.DictKey(key), value) for key, value in self.items()), tuple(self.places.values())

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Place, ...]]:
        """The statistics are leaves, the places are not."""
        return tuple(self._statistics.values()), tuple(self.places.values())

    @classmethod
    def tree_unflatten(cls, places: tuple[Place, ...], statistics: tuple[Any, ...]) -> "Observed":
        """The inverse of `tree_flatten`."""
        keys = [place.key for place in places]
        return cls(dict(zip(keys, statistics)), dict(zip(keys, places)))
