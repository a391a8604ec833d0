"""A model under masks with values in [0, 1], as parameters: each mask is multiplied into what reads the masked units.

A unit (a head, a feed-forward channel, a hidden dimension) ends where a kernel sums over it: there, in the rows of
that kernel, its mask is multiplied, once. Where a norm takes a mean over units, the mean is over those whose mask is
not 0. So a unit with the mask 0 is not there, whatever else has been computed of it, and the model with the masks
multiplied in, cut to the units that are left (`surgery.shrink`), computes the same as the masked model.

A layer's mask is multiplied into the parameters in which the layer's addends are linear
(`jprune.trace.coupling.residual`).

These are functions of parameters, so they serve any forward pass, and a compiler fuses them with the cast to the dtype
of the computation. They differ from LLM-Shearing's program (arXiv:2310.06694) where that differs from itself: it
multiplies hidden masks to the outputs of norms, attention and MLP while training, and afterwards to the embedding and
the head besides.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.annotations import Array, Float
from jprune.errors import JpruneError
from jprune.structured.units import UnitMember, Units
from jprune.trace.coupling.residual import Outlet

PyTree = Any
InAxes = Mapping[str, tuple[int, ...]]
"""The axes that a matmul sums over, by the path of its kernel."""
KEPT = "kept"
"""The parameter beside a norm's scale that says which elements its means are over; see `jprune.models.modules.Norm`."""


def multiply(
    params: PyTree,
    masks: Iterable[tuple[Units, Float[Array, "_"]]],
    in_axes: InAxes,
    *,
    layer: tuple[Sequence[Outlet], Float[Array, ""]] | None = None,
) -> PyTree:
    """The parameters of the masked model: nested dicts, to which norms over masked units get a `KEPT` beside them.

    Args:
      params: nested dicts of the parameters that the units' paths lead to: of a block, or of the model.
      masks: a number in [0, 1] for each of some units. Several of them may lie on one kernel.
      in_axes: of every kernel that reads units.
      layer: what writes the result of a layer, and the mask of that layer.

    Raises:
      JpruneError: nothing reads some units, so that a mask on them would have no effect.
    """
    leaves, factors, kept = trees.flatten(params), dict[str, Array](), dict[str, Array]()
    for units, mask in masks:
        readers = [m for m in units.members if m.axis in in_axes.get(m.path, ())]
        if not readers:
            raise JpruneError(f"{units.name}: no kernel sums over these units, so they cannot be masked")
        for member in readers:
            factors[member.path] = factors.get(member.path, 1.0) * _along(member, mask)
        for member in units.members if units.renormalised else ():
            if member.path.rsplit("/", 1)[-1] == "scale":
                path = f"{member.path.removesuffix('scale')}{KEPT}"
                here = jnp.broadcast_to(_along(member, (mask != 0).astype(jnp.float32)), member.shape)
                kept[path] = kept.get(path, 1.0) * here
    offsets = {}
    if layer is not None:
        for outlet in layer[0]:
            factors[outlet.path] = factors.get(outlet.path, 1.0) * layer[1]
            offsets[outlet.path] = outlet.offset
    for path, factor in factors.items():
        leaf, offset = jnp.asarray(leaves[path]), offsets.get(path, 0.0)
        wide = leaf.astype(jnp.float32)
        wide = (wide + offset) * factor - offset if offset else wide * factor
        leaves[path] = wide.astype(leaf.dtype)
    return trees.unflatten(leaves | kept)


def _along(member: UnitMember, mask: Float[Array, " count"]) -> Float[Array, "..."]:
    """The mask of each position along the member's axis, in a shape that broadcasts with the leaf; 1 for no unit."""
    here = jnp.take(mask.astype(jnp.float32), np.maximum(member.units, 0))
    if (member.units < 0).any():
        here = jnp.where(member.units < 0, 1.0, here)
    return here.reshape([n if axis in member.axes else 1 for axis, n in enumerate(member.shape)])
