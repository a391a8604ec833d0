"""Where arrays lie on the devices of one or of many processes; one device is a mesh of one.

A mesh has two axes. Along "data" windows of tokens are shared out, and along "model" the outputs of kernels. XLA's
partitioner puts in the communication. What is to lie in pieces follows from shapes alone, so every process decides
alike; what cannot be cut evenly lies whole on every device.

Outputs of a kernel are independent of each other in every solver, so for solving they are shared out along both axes:
every device has as much to do.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jprune.errors import JpruneError

DATA, MODEL = "data", "model"
BATCH_AXES = (DATA, "fsdp")
"""Axes along which the rows of a batch are shared out; the second is there in training (`jprune.train.sharding`)."""
Index = tuple[tuple[int, int], ...]
"""Where a piece begins and ends along every axis."""
Pieces = dict[Index, np.ndarray]
"""The distinct pieces of an array that one process has."""


def make_mesh(model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those given.

    Args:
      model: devices among which the outputs of a kernel are shared out; "data" is what that leaves.
      devices: by default all there are.

    Raises:
      JpruneError: the devices cannot be shared out so.
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or len(devices) % model:
        raise JpruneError(
            f"the model axis must divide the number of devices: got {model}, and there are {len(devices)} devices; "
            f"give one of {', '.join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)}"
        )
    return jax.make_mesh((len(devices) // model, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices)


@functools.cache
def one_device() -> Mesh:
    """A mesh of one device of this process."""
    return make_mesh(devices=jax.local_devices()[:1])


def local_share(mesh: Mesh) -> float:
    """The share of the mesh's devices that this process has."""
    return len(mesh.local_devices) / mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device has all."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh, rows: int) -> NamedSharding:
    """The sharding of arrays of `rows` rows (windows): shared out along "data" if that can be done evenly."""
    return NamedSharding(mesh, PartitionSpec(DATA)) if rows % mesh.shape[DATA] == 0 else replicated(mesh)


def spread(args: Any, mesh: Mesh | None) -> Any:
    """A pytree with its arrays shared out along their first axis (`batch`); as it is where there is no mesh."""
    if mesh is None:
        return args
    return jax.tree.map(lambda x: jax.device_put(x, batch(mesh, len(x))) if getattr(x, "shape", ()) else x, args)


def within(mesh: Mesh | AbstractMesh | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """f, which is to be jitted, knowing over which devices it runs (`rows_over`). Without a mesh it is f itself."""
    if mesh is None or mesh.size == 1:
        return f

    @functools.wraps(f)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args, **kwargs)

    return inside


def rows_over(f: Callable[..., Any], whole: Any, *by_row: Any) -> Any:
    """``f(whole, *by_row)``, computed by every device for rows of its own where the trace is `within` a mesh.

    XLA's partitioner cuts up single operations. Where rows are sorted, or go through a loop, that is no good.

    Args:
      f: for each row of its result it reads the same row of `by_row`, and all of `whole`.
      whole: a pytree of arrays; every device gets all of them.
      *by_row: pytrees of arrays with equally many rows along their first axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    axes = tuple(a for a in BATCH_AXES if types.get(a) == AxisType.Auto)
    rows = len(jax.tree.leaves(by_row)[0])
    if not axes or rows % math.prod(mesh.shape[a] for a in axes):
        return f(whole, *by_row)
    cut = PartitionSpec(axes)
    specs = PartitionSpec(), *[cut] * len(by_row)
    return jax.shard_map(f, in_specs=specs, out_specs=cut, check_vma=False)(whole, *by_row)


def parts(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with one row for every device."""
    return NamedSharding(mesh, PartitionSpec((DATA, MODEL)))


def pieces_of_rows(mesh: Mesh, rows: int) -> int:
    """How many pieces `rows` rows (tokens) can be cut into: one for every device, or one."""
    return mesh.size if rows % mesh.size == 0 else 1


def kernel(mesh: Mesh, shape: tuple[int, ...], out_axes: Iterable[int]) -> NamedSharding:
    """The sharding of a kernel while it is used: its first output axis is cut along "model" if that can be done evenly.

    That axis numbers heads, or channels. Cutting heads themselves would have devices talk within the attention.
    """
    first, size = min(out_axes, default=None), mesh.shape[MODEL]
    if first is None or size == 1 or shape[first] % size:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * first, MODEL))


def _columns(mesh: Mesh, counts: Iterable[int]) -> NamedSharding:
    """The sharding of matrices with `counts` outputs: in as many pieces as fit all of them."""
    counts = list(counts)
    for axes in ((DATA, MODEL), (DATA,), (MODEL,)):
        if all(count % math.prod(mesh.shape[a] for a in axes) == 0 for count in counts):
            return NamedSharding(mesh, PartitionSpec(None, axes))
    return replicated(mesh)


def spread_columns(mesh: Mesh, matrices: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Matrices [d_in, d_out] that are to be solved for side by side, with their outputs shared out."""
    sharding = _columns(mesh, [x.shape[1] for x in matrices.values()])
    return {name: moved(x, sharding) for name, x in matrices.items()}


def moved(x: jax.Array, sharding: Sharding) -> jax.Array:
    """The array as it is to lie; on the devices that have it, it goes from one to the other, by a compiled program.

    `jax.device_put` would fetch all of it to the host, and send to every device what is missing there.
    """
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    if not known or x.sharding == sharding or x.sharding.device_set != sharding.device_set:
        return jax.device_put(x, sharding)
    return _moving(sharding)(x)


@functools.lru_cache(maxsize=64)
def _moving(sharding: Sharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


def pieces_of_columns(matrices: Sequence[Any]) -> int:
    """Into how many pieces the outputs of all these matrices are cut; 1 for what is not yet on any device."""
    counts = set()
    for x in matrices:
        on_devices = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        counts.add(x.shape[1] // x.sharding.shard_shape(x.shape)[1] if on_devices and x.size else 1)
    return counts.pop() if len(counts) == 1 else 1


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """A host's array on the devices; each process places its own pieces, and all must have the same values."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def on_one_device(f: Callable[..., Any], x: jax.Array, *args: Any) -> Any:
    """``f(x, *args)`` for an array that every device has: computed on one device of each process, copied to its others.

    What f needs beside its result is then in memory once, and virtual devices do not compute the same in turns.
    """
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    if not known or len(x.sharding.device_set) == 1 or not x.is_fully_replicated:
        return f(x, *args)
    shards = x.addressable_shards

    def copied(y: jax.Array) -> jax.Array:
        copies = [jax.device_put(y, shard.device) for shard in shards]
        return jax.make_array_from_single_device_arrays(y.shape, x.sharding, copies)

    return jax.tree.map(copied, f(shards[0].data, *args))


def readable(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The array, with all of it in every process. To be called by all."""
    return x if x.is_fully_addressable or x.is_fully_replicated else jax.device_put(x, replicated(mesh))


def to_host(x: jax.Array) -> Pieces:
    """The distinct pieces of an array that this process has."""
    return {_index(s.index, x.shape): np.asarray(s.data) for s in x.addressable_shards}


def from_host(pieces: Pieces, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """The array whose pieces every process has got by `to_host`."""
    return jax.make_array_from_callback(shape, sharding, lambda index: pieces[_index(index, shape)])


def local_pieces(shape: tuple[int, ...], sharding: Any) -> list[Index]:
    """Where the distinct pieces that this process has of an array lie, in a fixed order."""
    return sorted({_index(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()})


def _index(slices: Any, shape: tuple[int, ...]) -> Index:
    return tuple((s.start or 0, n if s.stop is None else s.stop) for s, n in zip(slices, shape, strict=True))
