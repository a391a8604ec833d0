"""Packed kernels over several devices: outputs are independent, so each device packs and multiplies its own.

XLA cannot cut a kernel's custom call apart; `shard_map` can, given one packed kernel a device. `pack_shards` makes them
of equal shapes and stacks them on a leading axis, to be laid along a mesh axis.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels._shapes import Array, Shaped
from pallas_kernels.arrays import namespace
from pallas_kernels.backends import Backend
from pallas_kernels.errors import FormatError
from pallas_kernels.formats import Bitmap, Packed, TiledCSL
from pallas_kernels.matmul import matmul
from pallas_kernels.packing import pack


def pack_shards(kernel: Shaped[Array | np.ndarray, "d_in d_out"], format: str, shards: int, **options: Any) -> Packed:
    """Packs equal parts of the outputs one by one; every array of the result has a leading axis of `shards`.

    Args:
      kernel: `[d_in, d_out]`, not traced.
      format: see `pack`.
      shards: parts; divides d_out.
      **options: `mask` and `values` of `pack`.

    Raises:
      FormatError: as `pack`; d_out is not a multiple of `shards`.
    """
    d_out = kernel.shape[-1]
    if shards < 1 or d_out % shards:
        raise FormatError(f"{d_out} outputs cannot be cut into {shards} equal shards")
    mask = options.pop("mask", None)
    size, parts = d_out // shards, []
    for i in range(shards):
        here = slice(i * size, (i + 1) * size)
        part = pack(kernel[:, here], format, mask=None if mask is None else mask[:, here], **options)
        parts.append(part)
    parts = [_padded(part, parts) for part in parts]
    xp = namespace(parts)
    return jax.tree.map(lambda *leaves: xp.stack(leaves), *parts)


def _padded(part: Packed, parts) -> Packed:
    """With as many words as the longest of all parts."""
    xp = namespace(part)
    if isinstance(part, Bitmap):
        longest = max(len(p.words) for p in parts)
        return dataclasses.replace(part, words=xp.pad(part.words, (0, longest - len(part.words))))
    if isinstance(part, TiledCSL):
        longest = max(len(p.items) for p in parts)
        # All bits set: a place outside the tile, which no reader takes.
        filled = xp.pad(part.items, (0, longest - len(part.items)), constant_values=np.int32(-1))
        return dataclasses.replace(part, items=filled)
    return part


def matmul_shards(
    x: Shaped[Array, "... d_in"],
    packed: Packed,
    mesh: Mesh,
    axis: str,
    *,
    backend: Backend = "pallas",
    interpret: bool = False,
) -> Shaped[Array, "... d_out"]:
    """x @ kernel of a `pack_shards` kernel: x whole on every device, the result cut along its outputs.

    Args:
      x: `[..., d_in]`.
      packed: of as many shards as the mesh axis has devices.
      mesh: devices.
      axis: the mesh axis that the shards lie along.
      backend: see `matmul`.
      interpret: see `matmul`.
    """
    shards = jax.tree.leaves(packed)[0].shape[0]
    if mesh.shape[axis] != shards:
        raise FormatError(f"{shards} shards on the {mesh.shape[axis]} devices of mesh axis {axis!r}; pack_shards again")

    def local(x, packed):
        return matmul(x, jax.tree.map(lambda leaf: leaf[0], packed), backend=backend, interpret=interpret)

    out = PartitionSpec(*[None] * (x.ndim - 1), axis)
    # Pallas does not tell shard_map which axes its results vary over.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(axis)), out_specs=out, check_vma=False
    )
    # Where they are already, this moves nothing; a mesh of explicit axes wants it said.
    x = jax.device_put(jnp.asarray(x), NamedSharding(mesh, PartitionSpec()))
    return mapped(x, jax.device_put(packed, NamedSharding(mesh, PartitionSpec(axis))))
