"""What experts make of the tokens that a router sends them, added up with the router's weights: three ways, one sum.

`routed` sorts the (token, expert) pairs by expert, cuts them into tiles of tokens of one expert, and computes tile by
tile (the block-sparse products of Gale et al., MegaBlocks, arXiv:2211.15841, without their kernels): an expert computes
the tokens it was sent, the kernels of experts that were sent none are not read, and beside the result memory holds one
tile. The backward pass goes through the same tiles, and computes each anew.

`ragged` has the same sums as products of sorted rows (`jax.lax.ragged_dot`), for accelerators, which a loop of small
products would leave idle. XLA's CPU backend computes all tokens by all experts for it.

`dense` has every expert compute every token, with zeros for those it was not sent. That costs experts / experts per
token times the products, but what each kernel reads is an array there, and each axis of a kernel meets an axis of its
input: `jprune.trace` reads this form (`is_read`), and so statistics and groups of coupled axes are
those of the model that is run.

An expert is any function of its kernels, its input and a product ``multiply(x, kernel, bias)``, which each way has its
own.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune import devices
from jprune.annotations import Array, Float, Int
from jprune.models import routing
from jprune.models.kernels import Kernel, multiply, multiply_each
from jprune.models.routing import Routes
from jprune.sorted_rows import Tiles, dot, one, taken
from jprune.trace.reading import is_read, is_sorted

PyTree = Any
Product = Callable[[Array, Any, Any], Array]
"""(x, kernel, bias or None) -> what the layer gives."""
Expert = Callable[[PyTree, Array, Product], Array]


def _ragged_dot(rows: Array, kernels: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, kernels.astype(rows.dtype), sizes)


class Watched(NamedTuple):
    """What has gone through experts."""

    routes: Routes
    """Of tokens [B, T]."""
    norms: Float[Array, "B T k"]
    """Of what each of a token's experts gives, before it is weighted."""
    experts: int
    """How many there are."""


_watching: contextvars.ContextVar[list[Watched] | None] = contextvars.ContextVar("watching", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[Watched]]:
    """What goes through `mix` in here, in its order. It belongs to the function that JAX is tracing."""
    seen: list[Watched] = []
    before = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(before)


def mix(
    expert: Expert, kernels: PyTree, x: Float[Array, "B T d_in"], routes: Routes, count: int
) -> Float[Array, "B T d_out"]:
    """The sum over a token's experts of weight times output, in x's dtype.

    Args:
      expert: (kernels of one expert, x [..., d_in], multiply) -> [..., d_out].
      kernels: those of all experts, a pytree of stacks along a first axis.
      x: tokens.
      routes: their experts, [B, T, k].
      count: how many experts there are.
    """
    if is_read():
        return (sorted_by_expert if is_sorted() else dense)(expert, kernels, x, routes, count)

    def rows(kernels: PyTree, x: Array, routes: Routes) -> tuple[Array, Array]:
        tokens = x.reshape(-1, x.shape[-1])
        flat = Routes(*(part.reshape(len(tokens), -1) for part in routes))
        y, norms = _sum(expert, count, kernels, tokens, flat)
        return y.reshape(*x.shape[:-1], -1), norms.reshape(routes.weights.shape)

    y, norms = devices.rows_over(rows, kernels, x, routes)
    if (seen := _watching.get()) is not None:
        seen.append(Watched(routes, jax.lax.stop_gradient(norms), count))
    return y


def dense(
    expert: Expert, kernels: PyTree, x: Float[Array, "B T d_in"], routes: Routes, count: int
) -> Float[Array, "B T d_out"]:
    """`mix`, with every expert computing every token."""
    sent = jnp.moveaxis(routing.sent(routes, count), -1, 0)
    inputs = jnp.where(sent[..., None], x, jnp.zeros((), x.dtype))  # [experts, B, T, d_in]

    def product(x: Array, kernel: Any, bias: Array | None) -> Array:
        y = multiply_each(x, kernel)
        if bias is None:
            return y
        # Tokens that were not sent stay zeros: what follows reads what it was sent as well.
        return y + jnp.where(sent[..., None], bias[:, None, None].astype(y.dtype), jnp.zeros((), y.dtype))

    y = expert(kernels, inputs, product)
    return jnp.einsum("ebtd,bte->btd", y, routing.spread(routes, count).astype(x.dtype))


def sorted_by_expert(
    expert: Expert, kernels: PyTree, x: Float[Array, "B T d_in"], routes: Routes, count: int
) -> Float[Array, "B T d_out"]:
    """`mix`, as products of sorted rows that `jprune.trace` sees as such."""
    tokens = x.reshape(-1, x.shape[-1])
    flat = Routes(*(part.reshape(len(tokens), -1) for part in routes))
    y, _ = ragged(expert, kernels, tokens, flat, count, dot)
    return y.reshape(*x.shape[:-1], -1)


def ragged(
    expert: Expert,
    kernels: PyTree,
    x: Float[Array, "n d_in"],
    routes: Routes,
    count: int,
    dot: Callable[[Array, Array, Array], Array] = _ragged_dot,
) -> tuple[Float[Array, "n d_out"], Float[Array, "n k"]]:
    """`mix` of tokens [n, d_in], by products of rows that are sorted by their expert; and the norms of `Watched`.

    `dot` is that product: (rows, kernels, how many rows are for each) -> what the rows give.
    """
    order = jnp.argsort(routes.experts.reshape(-1), stable=True)
    sizes = jnp.bincount(routes.experts.reshape(-1), length=count)
    token = order // routes.experts.shape[1]

    def product(rows: Array, kernel: Array, bias: Array | None) -> Array:
        y = dot(rows, kernel, sizes)
        return y if bias is None else y + bias.astype(y.dtype)[routes.experts.reshape(-1)[order]]

    y = expert(kernels, x[token], product).astype(jnp.float32)
    weighted = y * routes.weights.reshape(-1)[order][:, None]
    total = jnp.zeros((len(x), y.shape[-1]), jnp.float32).at[token].add(weighted)
    norms = jnp.zeros(order.shape, jnp.float32).at[order].set(_norms(y))
    return total.astype(x.dtype), norms.reshape(routes.weights.shape)


def routed(
    expert: Expert, kernels: PyTree, x: Float[Array, "n d_in"], routes: Routes, count: int
) -> tuple[Float[Array, "n d_out"], Float[Array, "n k"]]:
    """`mix` of tokens [n, d_in], tile by tile; and the norms of `Watched`."""
    order, tiles = _sorted(routes, count)
    d_out = jax.eval_shape(lambda own, rows: expert(own, rows, _linear), _one(kernels, 0), x).shape[-1]

    def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        total, norms = sums
        pairs = _pairs(order, tiles, i)
        y = expert(_one(kernels, tiles.kernel[i]), _rows(x, routes, pairs), _linear).astype(jnp.float32)
        total = _added(total, routes, pairs, y * _weights(routes, pairs))
        return total, norms.at[pairs].set(_norms(y), mode="drop")

    zeros = jnp.zeros((len(x), d_out), jnp.float32), jnp.zeros(routes.weights.size, jnp.float32)
    total, norms = jax.lax.fori_loop(0, tiles.used, step, zeros)
    return total.astype(x.dtype), norms.reshape(routes.weights.shape)


def routed_backward(
    expert: Expert, kernels: PyTree, x: Float[Array, "n d_in"], routes: Routes, dy: Float[Array, "n d_out"], count: int
) -> tuple[PyTree, Float[Array, "n d_in"], Float[Array, "n k"]]:
    """The gradients by kernels, tokens and weights of the sum over `routed` times dy, tile by tile."""
    order, tiles = _sorted(routes, count)
    leaves, tree = jax.tree.flatten(kernels)
    learns = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]  # not the positions in a packed kernel

    def step(i: Array, sums: Any) -> Any:
        totals, dx, d_weights = sums
        e, pairs = tiles.kernel[i], _pairs(order, tiles, i)
        own = [one(leaf, e) for leaf in leaves]

        def run(given: list[Array], rows: Array) -> Array:
            ahead = iter(given)
            filled = [next(ahead) if learn else leaf for leaf, learn in zip(own, learns)]
            return expert(jax.tree.unflatten(tree, filled), rows, _linear)

        y, pull = jax.vjp(run, [leaf for leaf, learn in zip(own, learns) if learn], _rows(x, routes, pairs))
        pulled = _rows(dy, routes, pairs).astype(jnp.float32)
        by_kernels, by_rows = pull((pulled * _weights(routes, pairs)).astype(y.dtype))
        totals = [total.at[e].add(by.astype(jnp.float32)) for total, by in zip(totals, by_kernels)]
        by_weights = jnp.sum(y.astype(jnp.float32) * pulled, axis=-1)
        return totals, _added(dx, routes, pairs, by_rows), d_weights.at[pairs].add(by_weights, mode="drop")

    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf, learn in zip(leaves, learns) if learn]
    sums = zeros, jnp.zeros(x.shape, jnp.float32), jnp.zeros(routes.weights.size)
    totals, dx, d_weights = jax.lax.fori_loop(0, tiles.used, step, sums)
    ahead = iter(totals)
    by_kernels = [next(ahead).astype(leaf.dtype) if learn else None for leaf, learn in zip(leaves, learns)]
    return (
        jax.tree.unflatten(tree, by_kernels),
        dx.astype(x.dtype),
        d_weights.reshape(routes.weights.shape),
    )


def _sorted(routes: Routes, count: int) -> tuple[Int[Array, "pairs"], Tiles]:
    """The (token, expert) pairs, numbered token by token, in the order of their experts, and its tiles."""
    flat = routes.experts.reshape(-1)
    return jnp.argsort(flat, stable=True), Tiles.of(jnp.bincount(flat, length=count), flat.size)


def _pairs(order: Int[Array, "pairs"], tiles: Tiles, i: Int[Array, ""]) -> Int[Array, "size"]:
    """The pairs of a tile; a number beyond all pairs where it has fewer than others."""
    return jnp.take(order, tiles.at(i), mode="fill", fill_value=order.size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(expert: Expert, count: int, kernels: PyTree, x: Array, routes: Routes) -> tuple[Array, Array]:
    """`mix` of tokens [n, d_in], and norms, which have no gradient. Its backward pass begins with these operands."""
    ways = (functools.partial(way, expert, count=count) for way in (routed, ragged))
    return _whichever(*ways, kernels, x, routes)


def _forward(expert: Expert, count: int, *operands: Any) -> tuple[tuple[Array, Array], Any]:
    return _sum(expert, count, *operands), operands


def _backward(expert: Expert, count: int, operands: Any, pulled: tuple[Array, Array]) -> tuple[PyTree, Array, Routes]:
    dy, _ = pulled

    def by_tile(kernels: PyTree, x: Array, routes: Routes, dy: Array) -> tuple[PyTree, Array, Array]:
        return routed_backward(expert, kernels, x, routes, dy, count)

    def by_rows(kernels: PyTree, x: Array, routes: Routes, dy: Array) -> tuple[PyTree, Array, Array]:
        def run(kernels: PyTree, x: Array, weights: Array) -> Array:
            return ragged(expert, kernels, x, Routes(routes.experts, weights), count)[0]

        return jax.vjp(run, kernels, x, routes.weights)[1](dy)

    by_kernels, by_tokens, by_weights = _whichever(by_tile, by_rows, *operands, dy)
    numbers: Any = np.zeros(operands[2].experts.shape, jax.dtypes.float0)  # have no gradient
    return by_kernels, by_tokens, Routes(numbers, by_weights)


_sum.defvjp(_forward, _backward)


def _whichever(by_tile: Callable[..., Any], by_rows: Callable[..., Any], kernels: PyTree, *operands: Any) -> Any:
    """One of two ways: tile by tile on a CPU, and wherever kernels are packed, which only know to multiply alone.

    Under vmap one after the other: sorted together, the tokens of several batches would be one.
    """
    if any(_is_kernel(leaf) for leaf in jax.tree.leaves(kernels, is_leaf=_is_kernel)):
        return jax.custom_batching.sequential_vmap(by_tile)(kernels, *operands)

    def run(*operands: Any) -> Any:
        return jax.lax.platform_dependent(*operands, cpu=by_tile, default=by_rows)

    return jax.custom_batching.sequential_vmap(run)(kernels, *operands)


def _linear(x: Array, kernel: Any, bias: Array | None) -> Array:
    y = multiply(x, kernel)
    return y if bias is None else y + bias.astype(y.dtype)


def _norms(y: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(y), axis=-1))


def _is_kernel(node: Any) -> bool:
    return isinstance(node, Kernel)


def _one(kernels: PyTree, e: Array | int) -> PyTree:
    """The kernels of one expert."""
    return jax.tree.map(lambda stack: stack[e] if _is_kernel(stack) else one(stack, e), kernels, is_leaf=_is_kernel)


def _rows(x: Array, routes: Routes, pairs: Array) -> Array:
    """The tokens of pairs; zeros beyond the pairs that there are."""
    return taken(x, pairs // routes.experts.shape[1])


def _weights(routes: Routes, pairs: Array) -> Array:
    return jnp.take(routes.weights.reshape(-1), pairs, mode="fill", fill_value=0)[:, None]


def _added(total: Array, routes: Routes, pairs: Array, rows: Array) -> Array:
    return total.at[pairs // routes.experts.shape[1]].add(rows.astype(total.dtype), mode="drop")
