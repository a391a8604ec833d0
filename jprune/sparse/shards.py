"""Packed kernels over several devices: each has the tiles of its share of the outputs, and multiplies by these.

Nothing is packed anew: what a device gets is a piece of the arrays, which lie output by output. A kernel whose tiles of
outputs cannot be shared out evenly lies whole on every device.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune import trees
from jprune.annotations import Array, Float
from jprune.devices import MODEL
from jprune.models.kernels import flatten
from jprune.sparse.kernel import PackedKernel
from pallas_kernels import Bitmap, Capped, matmul_shards

PyTree = Any
_SPARE_WORDS = 4
"""After the values of a bitmap, which a kernel may read and not use."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedKernel(PackedKernel):
    """A packed kernel of which every device along a mesh axis has a share of the outputs.

    Attributes:
      packed: the shares' arrays on a new axis, after those of a stack.
      own: shape of one whole kernel.
      mesh: the devices.
      axis: the mesh axis.
    """

    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})

    own_axes: ClassVar[int] = 5

    def multiply(self, x: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
        """[..., *d_in] x -> [..., *d_out] in x's dtype; x is whole on every device, the outputs are shared out."""
        flat = x.reshape(*x.shape[: x.ndim - inputs], self.packed.shape[0])
        y = matmul_shards(flat, self.packed, self.mesh, self.axis, backend=self.backend)
        return y.reshape(*flat.shape[:-1], *self.own[inputs:])

    def whole(self) -> Any:
        """The array that one kernel stands for."""
        parts = jax.tree.map(np.asarray, self.packed)
        kernels = [PackedKernel(jax.tree.map(lambda leaf: leaf[i], parts), parts.shape) for i in range(self.shares)]  # noqa: B023
        return np.concatenate([kernel.dense() for kernel in kernels], axis=-1).reshape(self.own)

    @property
    def shares(self) -> int:
        """How many devices share it out."""
        return self.mesh.shape[self.axis]


def shard(params: PyTree, mesh: Mesh, axis: str = MODEL) -> dict[str, Any]:
    """Parameters with their packed kernels shared out along a mesh axis; all else as it is.

    Args:
      params: of a decoder; kernels that are stacks, such as experts, lie whole on every device.
      mesh: the devices.
      axis: of the mesh.
    """
    shares = mesh.shape[axis]
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, PackedKernel) and shares > 1 and (parts := _parts(leaf, shares)) is not None:
            stacked = parts[0].stack(parts[1:]).packed
            where = NamedSharding(mesh, PartitionSpec(axis))
            leaves[path] = ShardedKernel(jax.device_put(stacked, where), leaf.own, mesh, axis, backend=leaf.backend)
    return trees.unflatten(leaves)


def _parts(kernel: PackedKernel, shares: int) -> list[PackedKernel] | None:
    """The shares of a kernel; None if it cannot be shared out evenly."""
    packed = kernel.packed
    rows = packed.grid[0] // shares
    if kernel.is_stack or packed.shape[1] % (shares * packed.tile[0]):
        return None
    packed = jax.tree.map(np.asarray, packed)
    shape = (packed.shape[0], packed.shape[1] // shares)
    parts = [_part(packed, i * rows, (i + 1) * rows, shape) for i in range(shares)]
    return [PackedKernel(part, shape) for part in parts]


def _part(packed: Bitmap | Capped, first: int, last: int, shape: tuple[int, int]) -> Bitmap | Capped:
    """Some rows of tiles."""
    scale = None if packed.scale is None else packed.scale[first * packed.tile[0] : last * packed.tile[0]]
    options: dict[str, Any] = {"bits": packed.bits[first:last], "scale": scale, "shape": shape}
    if isinstance(packed, Capped):
        return dataclasses.replace(packed, planes=tuple(plane[first:last] for plane in packed.planes), **options)
    begins = packed.tiles[:, 0].astype(np.int64) * packed.itemsize // 4
    start, stop = begins[first], begins[last] + _SPARE_WORDS if last < len(begins) else len(packed.words)
    return dataclasses.replace(
        packed,
        tiles=packed.tiles[first:last] - packed.tiles[first, 0],
        rows=packed.rows[first:last],
        words=packed.words[start:stop],
        **options,
    )
