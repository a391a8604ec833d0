"""Training that leaves pruned weights at exactly zero.

Masking gradients is not enough: momentum and weight decay still move a parameter. So this transformation looks at the
final update instead, and is chained last: where the mask is False, the update becomes ``-p``, and ``p + (-p)`` is
exactly zero, whatever the parameter was. Masks live in the state with one bit a weight, packed along the last axis.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jprune import trees
from jprune.annotations import Array, Bool, Shaped, UInt8
from jprune.errors import JpruneError

PyTree = Any


class KeepMaskedState(NamedTuple):
    """Masks by path, packed by `pack`; of the leaves that have one."""

    masks: dict[str, UInt8[Array, "..."]]


def keep_masked(masks: PyTree) -> optax.GradientTransformation:
    """Keeps pruned parameters exactly zero; to be chained last: ``optax.chain(optax.adamw(1e-4), keep_masked(masks))``.

    Args:
      masks: bool, True = keep, by path, as `jprune.prune` returns them, or in a tree like that of the parameters.
        Leaves whose mask is None or left out are trained freely.

    Returns:
      A transformation whose ``init`` packs the masks, and whose ``update`` needs the parameters. Both can be
      jitted, and the state sharded.

    Raises:
      JpruneError: in ``init``, where a mask is not one of a parameter.
    """

    def init(params: PyTree) -> KeepMaskedState:
        leaves, given = trees.flatten(params), trees.flatten(masks)
        for path, mask in given.items():
            if path not in leaves:
                raise JpruneError(f"there is a mask for {path!r} but no such parameter")
            if mask.shape != leaves[path].shape or mask.dtype != bool:
                raise JpruneError(
                    f"{path}: expected a bool mask {leaves[path].shape}, got {jnp.dtype(mask.dtype)} {mask.shape}"
                )
        return KeepMaskedState({path: pack(mask) for path, mask in given.items()})

    def update(updates: PyTree, state: KeepMaskedState, params: PyTree | None = None) -> tuple[PyTree, KeepMaskedState]:
        if params is None:
            raise JpruneError("keep_masked needs the parameters: call update(updates, state, params)")
        return to_zero(updates, params, state.masks), state

    return optax.GradientTransformation(init, update)


def to_zero(updates: PyTree, params: PyTree, masks: Mapping[str, UInt8[Array, "..."]]) -> PyTree:
    """Updates after which parameters are exactly zero wherever their packed mask, by path, is False."""
    old = trees.flatten(params)

    def one(path: tuple, u: Array) -> Array:
        name = trees.path_name(path)
        if name not in masks:
            return u
        return jnp.where(unpack(masks[name], u.shape), u, -old[name].astype(u.dtype))

    return jax.tree_util.tree_map_with_path(one, updates)


def pack(mask: Bool[Array | np.ndarray, "..."]) -> UInt8[Array, "..."]:
    """A mask with eight bits a byte along its last axis, filled up with zeros: ``[..., n] -> [..., ceil(n / 8)]``."""
    # By NumPy where it can be: a mask that is known when `init` is compiled becomes part of the program.
    module = np if isinstance(mask, np.ndarray) else jnp
    return jnp.asarray(module.packbits(mask.reshape(mask.shape or (1,)), axis=-1))


def unpack(packed: UInt8[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """The mask of `shape` that was packed."""
    # As a comparison that fuses with what follows, where jnp.unpackbits would write out a byte for each bit.
    bits = packed[..., None] & jnp.uint8([128, 64, 32, 16, 8, 4, 2, 1])
    flat: Shaped[Array, "..."] = (bits != 0).reshape(*packed.shape[:-1], -1)
    return flat[..., : shape[-1] if shape else 1].reshape(shape)
