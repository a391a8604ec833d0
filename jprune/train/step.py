"""One step: gradients of micro-batches, added up in float32, and the update that Optax makes of them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jprune import devices
from jprune.annotations import Array, Float, Key
from jprune.train import sharding

PyTree = Any
Batch = Mapping[str, Any]
"""Arrays [B, ...]; rows whose "weights" are all zero count for nothing."""
Loss = Callable[[PyTree, PyTree, Batch, Key[Array, ""]], tuple[Float[Array, ""], Float[Array, ""]]]
"""(trainable, frozen, batch, key) -> (sum of weighted losses, sum of weights)."""


class Functions:
    """The jitted parts of a step."""

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, trainable: PyTree, mesh: Mesh | None):
        optimizer = optax.with_extra_args_support(optimizer)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), _floats(trainable))
        whole = None if mesh is None else sharding.state(mesh, jnp.zeros(()))
        place = sharding.state_tree(mesh, like)
        totals = None if mesh is None else (place, whole, whole)

        def zeros() -> tuple[PyTree, Array, Array]:
            gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            return gradients, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)

        def add(total: tuple, trainable: PyTree, frozen: PyTree, batch: Batch, key: Array) -> tuple:
            def weighted(floats: PyTree) -> tuple[Array, Array]:
                whole = jax.tree.map(
                    lambda x, own: x if own is None else own, trainable, floats, is_leaf=lambda x: x is None
                )
                return loss(whole, frozen, batch, key)

            (value, weight), gradients = jax.value_and_grad(weighted, has_aux=True)(_floats(trainable))
            sums = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total[0], gradients)
            return sums, total[1] + value.astype(jnp.float32), total[2] + weight.astype(jnp.float32)

        def measure(total: tuple) -> tuple[Array, Array, Array]:
            gradients, value, weight = total
            count = jnp.maximum(weight, 1e-20)
            return value / count, optax.tree.norm(gradients) / count, weight

        def update(trainable: PyTree, optimizer_state: PyTree, total: tuple, frozen: PyTree) -> tuple[PyTree, PyTree]:
            gradients = jax.tree.map(lambda g, p: (g / total[2]).astype(p.dtype), total[0], _floats(trainable))
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
                updates, optimizer_state = optimizer.update(gradients, optimizer_state, trainable, frozen=frozen)
                return optax.apply_updates(trainable, updates), optimizer_state

        states = None
        if mesh is not None:
            states = (
                sharding.state_tree(mesh, trainable),
                sharding.state_tree(mesh, jax.eval_shape(optimizer.init, trainable)),
            )
        self.zeros = jax.jit(zeros, out_shardings=totals)
        self.add = jax.jit(devices.within(mesh, add), out_shardings=totals, donate_argnums=0)
        self.measure = jax.jit(measure)
        self.update = jax.jit(update, out_shardings=states, donate_argnums=(0, 1))
        self.init = jax.jit(optimizer.init, out_shardings=None if states is None else states[1])


def _floats(tree: PyTree) -> PyTree:
    """The tree with None instead of leaves that no gradient can be taken by."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)


def micro_batches(batch: Batch, rows: int | None, mesh: Mesh | None) -> Iterator[dict[str, Array]]:
    """The batch in parts of equal shape; what the last one lacks is filled with rows of weight zero."""
    size = len(next(iter(batch.values())))
    shares = sharding.batch_shares(mesh)
    rows = -(-min(rows or size, size) // shares) * shares
    for start in range(0, size, rows):
        part = {name: np.asarray(x[start : start + rows]) for name, x in batch.items()}
        lacking = rows - len(next(iter(part.values())))
        if lacking:
            part = {n: np.concatenate([x, np.zeros((lacking, *x.shape[1:]), x.dtype)]) for n, x in part.items()}
        where = None if mesh is None else sharding.batch(mesh)
        yield {name: jax.device_put(x, where) for name, x in part.items()}
