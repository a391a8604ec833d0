"""Rows that are sorted by which kernel of a stack each is for, as tokens by their expert, and products with the stack.

The rows are cut into tiles of one kernel each (the block-sparse products of Gale et al., MegaBlocks, arXiv:2211.15841,
without their kernels), so that shapes are known beforehand and only what was sent is computed. `dot` is a primitive of
its own, so that `jprune.trace` sees a product where there is a loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import mlir

from jprune.annotations import Array, Float, Int

TILE = 128
"""Rows that one product takes at most. From 64 to 128 measured best on a CPU."""


class Sorted(NamedTuple):
    """What the kernels of a stack read: the rows of the first, those of the second, and so on."""

    rows: Float[Array, "rows d_in"]
    sizes: Int[Array, "count"]
    """How many rows are for each kernel; together all."""


class Tiles(NamedTuple):
    """Sorted rows in tiles that have one kernel each."""

    kernel: Int[Array, "most"]
    """Of each tile."""
    start: Int[Array, "most"]
    """The first row of a tile."""
    stop: Int[Array, "most"]
    """Where the rows of its kernel end."""
    used: Int[Array, ""]
    """How many tiles there are; the others are empty."""
    rows: int
    """How many rows there are."""
    size: int
    """Rows of a tile."""

    @classmethod
    def of(cls, sizes: Int[Array, "count"], rows: int) -> "Tiles":
        """The tiles of so many rows, of which each kernel has as many as `sizes` says.

        A tile has as many rows as a kernel has in the mean, if that is less than `TILE`.
        """
        count = len(sizes)
        size = min(TILE, 1 << max(0, (rows // count - 1).bit_length()))
        most = (rows + min(count, rows) * (size - 1)) // size
        ends, tiles = jnp.cumsum(sizes), -(-sizes // size)
        last = jnp.cumsum(tiles)  # tiles up to and with each kernel's
        number = jnp.arange(most)
        kernel = jnp.minimum(jnp.searchsorted(last, number, side="right"), count - 1)
        start = (ends - sizes)[kernel] + (number - (last - tiles)[kernel]) * size
        return cls(kernel, start, ends[kernel], last[-1], rows, size)

    def at(self, i: Int[Array, ""]) -> Int[Array, "size"]:
        """The numbers of a tile's rows; one beyond all rows where it has fewer than others."""
        at = self.start[i] + jnp.arange(self.size)
        return jnp.where(at < self.stop[i], at, self.rows)


def taken(x: Float[Array, "rows d"], at: Int[Array, "n"]) -> Float[Array, "n d"]:
    """Rows by their number; zeros for a number beyond all."""
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def one(stack: Array, i: Int[Array, ""] | int) -> Array:
    """One kernel of a stack; it has no derivative by the stack.

    XLA's CPU backend has no slices of bfloat16: it would copy the whole stack to float32 in front of the loop. So the
    slice is one of integers, of the same bits; and a barrier has these taken in the loop, where only the slice is read.
    """
    if not jnp.issubdtype(stack.dtype, jnp.floating) or stack.dtype.itemsize != 2:
        return stack[i]
    stack, i = jax.lax.optimization_barrier((stack, jnp.asarray(i)))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(stack, jnp.uint16)[i], stack.dtype)


def fold(add: Callable[[Any, Array], Any], each: Any, x: Sorted) -> Any:
    """What has become of every kernel's own state, once all of its rows were added to it, tile by tile.

    Args:
      add: (state of one kernel, rows of a tile, with zeros where it has fewer) -> its state.
      each: the states, a pytree with one more axis in front of every leaf.
      x: the rows.
    """
    tiles = Tiles.of(x.sizes, len(x.rows))

    def step(i: Array, each: Any) -> Any:
        kernel = tiles.kernel[i]
        state = add(jax.tree.map(lambda leaf: leaf[kernel], each), taken(x.rows, tiles.at(i)))
        return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, kernel, 0), each, state)

    return jax.lax.fori_loop(0, tiles.used, step, each)


def dot(
    rows: Float[Array, "rows d_in"], kernels: Float[Array, "count d_in d_out"], sizes: Int[Array, "count"]
) -> Float[Array, "rows d_out"]:
    """Each row times its kernel, in the rows' dtype; the kernels may have another. It has no derivative.

    On accelerators it is `jax.lax.ragged_dot`. XLA's CPU backend computes all rows by all kernels for that: there it
    goes tile by tile, and of the kernels one at a time is cast.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.ragged_dot(rows, kernels.astype(rows.dtype), sizes)
    return _dot.bind(rows, kernels, sizes)


def by_tile(rows: Array, kernels: Array, sizes: Array) -> Array:
    """`dot`, tile by tile."""
    tiles = Tiles.of(sizes, len(rows))

    def step(i: Array, y: Array) -> Array:
        at = tiles.at(i)
        product = taken(rows, at) @ one(kernels, tiles.kernel[i]).astype(rows.dtype)
        return y.at[at].set(product, mode="drop")

    return jax.lax.fori_loop(0, tiles.used, step, jnp.zeros((len(rows), kernels.shape[-1]), rows.dtype))


_dot = jex.Primitive("sorted_dot")
_dot.def_impl(jax.jit(by_tile))


@_dot.def_abstract_eval
def _shape(rows: Any, kernels: Any, sizes: Any) -> Any:
    return jax.core.ShapedArray((rows.shape[0], kernels.shape[-1]), rows.dtype)


mlir.register_lowering(_dot, mlir.lower_fun(by_tile, multiple_results=False))
