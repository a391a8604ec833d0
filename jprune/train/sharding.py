"""Where arrays lie on a mesh while training: batches along the data, everything that is trained or read in pieces.

Axes of the mesh by their names: "data" has a share of every batch; "fsdp" too, and besides a piece of every parameter
and of the optimizer's state, gathered where it is needed (Zhao et al., arXiv:2304.11277; XLA's partitioner puts in the
collectives); "model" has a piece of the parameters and sees the whole batch.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune.devices import BATCH_AXES
from jprune.errors import JpruneError

PyTree = Any

STATE_AXES = ("fsdp", "model")


def make_mesh(*, data: int | None = None, fsdp: int = 1) -> Mesh | None:
    """A mesh over all devices, or None if there is only one; `data` is what `fsdp` leaves.

    Raises:
      JpruneError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices()
    data = len(devices) // fsdp if data is None else data
    if data * fsdp != len(devices):
        raise JpruneError(
            f"a mesh of {data} (data) x {fsdp} (fsdp) needs {data * fsdp} devices; there are {len(devices)}"
        )
    return None if len(devices) == 1 else Mesh(np.asarray(devices).reshape(data, fsdp), ("data", "fsdp"))


def batch_shares(mesh: Mesh | None) -> int:
    """Into how many parts a batch is cut."""
    return 1 if mesh is None else int(np.prod([mesh.shape[a] for a in BATCH_AXES if a in mesh.shape], dtype=int))


def batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, ...]: rows are shared out."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def state(mesh: Mesh, leaf: Any) -> NamedSharding:
    """The sharding of a parameter or a part of the optimizer's state: along its longest axis that can be cut evenly.

    Where no axis can be cut it is whole. It follows from the shape alone, so a parameter and its moments lie alike.
    """
    axes = [a for a in STATE_AXES if mesh.shape.get(a, 1) > 1]
    pieces = int(np.prod([mesh.shape[a] for a in axes], dtype=int))
    shape = tuple(np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape)
    fits = [i for i, n in enumerate(shape) if n % pieces == 0 and n >= pieces]
    if not axes or not fits:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(fits, key=lambda i: (shape[i], i))  # of equal ones the last: the first may be a stack of layers
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, tuple(axes)))


def state_tree(mesh: Mesh | None, tree: PyTree) -> PyTree | None:
    """The sharding of every leaf; None without a mesh."""
    return None if mesh is None else jax.tree.map(lambda leaf: state(mesh, leaf), tree)


def put(tree: PyTree, mesh: Mesh | None, *, copy: bool = False) -> PyTree:
    """The tree on the devices, leaf by leaf where `state` says; as arrays of its own with `copy`."""

    def one(leaf: Any) -> jax.Array:
        return jax.device_put(leaf, None if mesh is None else state(mesh, leaf), may_alias=False if copy else None)

    return jax.tree.map(one, tree)
