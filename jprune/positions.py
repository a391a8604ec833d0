"""Positions along the axes of an array that stay, and what is left of the array.

``{axis: positions}``: positions ascend, and what is not named stays whole. All of an array keeps the same positions
along an axis, ``[kept]``; or, where the first axis numbers the kernels of a stack, each kernel keeps its own, ``[stack,
kept]``, equally many, so that they stay stacked.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune.annotations import Bool, Int

Kept = Mapping[int, Int[np.ndarray, "*stack kept"]]
"""Positions by axis."""


def cut(values: Any, kept: Kept) -> Any:
    """What stays of an array, which may be a NumPy array, a JAX array or a tracer, and stays one."""
    # Kernels are numbered as they are before some of them go.
    for axis, positions in sorted(kept.items(), key=lambda item: -np.ndim(item[1])):
        values = along(values, positions, axis)
    return values


def along(values: Any, positions: Int[np.ndarray, "*stack kept"], axis: int) -> Any:
    """What stays of an array along one axis."""
    own = isinstance(values, np.ndarray)
    if np.ndim(positions) == 1:
        return np.take(values, positions, axis) if own else jnp.take(values, positions, axis)
    index = _spread(np.asarray(positions), values.ndim, axis)
    return np.take_along_axis(values, index, axis) if own else jnp.take_along_axis(values, index, axis)


def left(shape: tuple[int, ...], kept: Kept) -> tuple[int, ...]:
    """The shape of what stays of an array of a shape."""
    return tuple(np.shape(kept[axis])[-1] if axis in kept else n for axis, n in enumerate(shape))


def mask(shape: tuple[int, ...], kept: Kept) -> Bool[np.ndarray, "..."]:
    """Which elements of an array of a shape stay; in their order they are those of `cut`."""
    stays = np.ones(shape, bool)
    for axis, positions in kept.items():
        positions = np.asarray(positions)
        here = np.zeros((*positions.shape[:-1], shape[axis]), bool)
        np.put_along_axis(here, positions, True, axis=-1)
        stays &= _spread(here, len(shape), axis)
    return stays


def of(first: Int[np.ndarray, "*stack kept"], then: Int[np.ndarray, "*stack left"]) -> Int[np.ndarray, "*stack left"]:
    """The positions in the whole array of those that stay of what stayed first."""
    return np.take_along_axis(first, then, -1) if np.ndim(first) > 1 else np.asarray(first)[then]


def _spread(values: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """Values along an axis, or of each kernel along it, in a shape that broadcasts with an array of `ndim` axes."""
    axes = (axis,) if values.ndim == 1 else (0, axis)
    return values.reshape([values.shape[axes.index(i)] if i in axes else 1 for i in range(ndim)])
