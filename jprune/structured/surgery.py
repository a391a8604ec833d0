"""Surgery: the kept rows, columns and heads are copied out. No weight changes its value, unless Grams are given."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jprune import positions as at
from jprune import trees
from jprune.errors import JpruneError
from jprune.places import Observed
from jprune.structured import compensation

PyTree = Any
Positions = np.ndarray | Sequence[int]
Keep = Mapping[str, Mapping[int, Positions]]
"""{path: {axis: the positions along it that are kept, ascending}}; what is not named is kept whole. Kernels of a stack
may each keep their own, [stack, kept] (see `jprune.positions`)."""


def shrink(params: PyTree, keep: Keep, grams: Observed | None = None, *, damping: float = 0.01) -> PyTree:
    """The parameters with the kept positions only.

    With Grams, kernels that lose inputs make up for them: what is left of each is refitted by least squares, so that
    its outputs stay near (see `jprune.solvers.compensate`). Kernels without one are cut only.

    Args:
      params: any pytree; leaves are JAX or NumPy arrays (traced ones too) or `jax.ShapeDtypeStruct`s, and stay so.
      keep: positions by path and axis, as the `keep` of a group, of groups and of units returns them. Ascending, none
        twice, at least one. Of a stack of kernels, ``[stack, kept]``, they may be each kernel's own.
      grams: of the inputs of kernels, `jprune.observe(f, Gram)(params, ...)[1]`, before anything is cut out.
      damping: share of a Gram's mean diagonal that is added to its diagonal.

    Raises:
      JpruneError: a path, an axis or a position that is not there; positions that are none, or not ascending; Grams
        that are none, or of no kernel that loses inputs.
    """
    leaves = trees.flatten(params)
    positions: dict[str, dict[int, np.ndarray]] = {}
    for path, axes in keep.items():
        if path not in leaves:
            near = difflib.get_close_matches(path, leaves, n=3, cutoff=0.0)
            raise JpruneError(f"positions to keep of {path!r}, but no such parameter; near misses: {', '.join(near)}")
        positions[path] = {axis: checked(kept, leaves[path].shape, axis, path) for axis, kept in axes.items()}
    if grams is not None:
        leaves = compensation.compensated(leaves, positions, grams, damping=damping)
    for path, kept in positions.items():
        leaves[path] = _cut(leaves[path], kept)
    return trees.replace(params, leaves)


def size(params: PyTree, keep: Keep | None = None) -> int:
    """How many parameters there are, or would be after `shrink`; any leaves that have a shape."""
    total = 0
    for path, leaf in trees.flatten(params).items():
        total += math.prod(at.left(leaf.shape, (keep or {}).get(path, {})))  # type: ignore[arg-type]
    return total


def checked(kept: Positions, shape: tuple[int, ...], axis: int, where: str) -> np.ndarray:
    """Positions to keep along an axis, as an array; an error that begins with `where` if they are none of it."""
    if not 0 <= axis < len(shape):
        raise JpruneError(f"{where}: there is no axis {axis} in shape {shape}; axes are counted from 0")
    positions = np.asarray(kept)
    if positions.ndim == 2 and positions.size and axis and len(positions) != shape[0]:
        raise JpruneError(
            f"{where}: expected positions along axis {axis} of each of {shape[0]} kernels, got {len(positions)} rows"
        )
    if positions.ndim not in ((1, 2) if axis else (1,)) or positions.size == 0:
        raise JpruneError(f"{where}: expected a list of positions to keep along axis {axis}, got {kept!r}")
    if not np.issubdtype(positions.dtype, np.integer):
        raise JpruneError(
            f"{where}: positions along axis {axis} are integers, got {positions.dtype}; "
            "np.flatnonzero makes them of a mask"
        )
    if np.any(np.diff(positions.astype(np.int64), axis=-1) <= 0):
        raise JpruneError(f"{where}: positions along axis {axis} must ascend, none twice; sort them (np.unique)")
    if positions.min() < 0 or positions.max() >= shape[axis]:
        raise JpruneError(
            f"{where}: positions {positions.min()} to {positions.max()} do not lie along axis {axis} of shape {shape}"
        )
    return positions


def _cut(leaf: Any, kept: Mapping[int, np.ndarray]) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(at.left(leaf.shape, kept), leaf.dtype)
    return at.cut(leaf, kept)
