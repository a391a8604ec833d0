"""LoRA for any JAX function: low-rank adapters beside frozen kernels.

Hu et al., "LoRA" (arXiv:2106.09685): ``y = x W + (alpha / r) dropout(x) A B`` with A ``[d_in, r]`` random and B
``[r, d_out]`` zero at the start. As in the authors' code, A is Kaiming-uniform with a = sqrt(5), which is
``U(-1/sqrt(d_in), 1/sqrt(d_in))``.

`adapt` finds the matmuls in the function's jaxpr (`jprune.trace`) and computes the two small products next to each. So
the model needs no change, no dense ``A B`` is formed, and since W is no argument of the gradient, no gradient of W is
either. Kernels that read the same value share the dropout of it, which the authors draw for each.

Adapters are a tree with ``a`` and ``b`` below the path of each adapted kernel: ``blocks/3/attn/q/kernel/a``
``[*d_in, r]`` and ``.../b`` ``[r, *d_out]``, with the kernel's input and output axes in their order. Those of a stack
of kernels that a scan goes along (the layers of `nn.scan`) are stacked alike: ``[layers, *d_in, r]`` and ``[layers, r,
*d_out]``.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune import places, trees
from jprune.annotations import Array, Float, Key
from jprune.errors import JpruneError
from jprune.places import Place
from jprune.trace.jaxpr import trace
from jprune.trace.leaves import split
from jprune.trace.matmuls import ParamMatmul, find
from jprune.train.beside import Beside, check

PyTree = Any

InAxes = Mapping[str, tuple[int, ...]] | Iterable[ParamMatmul]
"""What `jprune.matmuls` lists, or the input axes of kernels by path."""


def init(
    params: PyTree,
    in_axes: InAxes,
    *,
    rank: int,
    key: Key[Array, ""],
    targets: trees.Filter | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Adapters that change nothing yet.

    Args:
      params: arrays or ShapeDtypeStructs.
      in_axes: the kernels that may be adapted: what `jprune.matmuls` lists, or their input axes by path.
      rank: r.
      key: of A; every path draws from a key of its own, so that a kernel's start does not depend on the others.
      targets: regular expressions over the paths of `in_axes`; all of them if None.
      dtype: of the adapters.

    Raises:
      JpruneError: a rank below one, an expression that finds no kernel, or a kernel that is a part of a leaf.
    """
    if rank < 1:
        raise JpruneError(f"the rank of adapters must be at least 1, got {rank}")
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    leaves = {}
    said = places.given(in_axes)
    for path in trees.choose(said, targets):
        shape, place = shapes[path], _whole(said[path])
        stack, d_in = ([shape[i] for i in axes] for axes in (place.batch_axes, place.in_axes))
        d_out = [n for i, n in enumerate(shape) if i not in (*place.batch_axes, *place.in_axes)]
        bound = 1 / math.sqrt(math.prod(d_in))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves[f"{path}/a"] = jax.random.uniform(own, (*stack, *d_in, rank), dtype, -bound, bound)
        leaves[f"{path}/b"] = jnp.zeros((*stack, rank, *d_out), dtype)
    return trees.unflatten(leaves)


def _whole(said: tuple[Place, ...]) -> Place:
    """The one place of an adapter's kernel."""
    if len(said) > 1 or said[0].part is not None or said[0].shape is not None:
        raise JpruneError(f"expected kernels that are whole leaves, for adapters, got {', '.join(map(str, said))}")
    return said[0]


def by_path(adapters: PyTree) -> dict[str, tuple[Any, Any]]:
    """(A, B) by the path of their kernel."""
    leaves = trees.flatten(adapters)
    return {p.removesuffix("/a"): (a, leaves[p.removesuffix("a") + "b"]) for p, a in leaves.items() if p.endswith("/a")}


def adapt(f: Callable[..., PyTree], *, alpha: int | float, dropout: float = 0.0) -> Callable[..., PyTree]:
    """``g(params, adapters, key, *args)``: ``f(params, *args)`` with adapters beside its matmuls.

    Args:
      f: any traceable function.
      alpha: the adapters' products are multiplied by alpha / r.
      dropout: probability with which an element of what an adapter reads is zero; none where `key` is None.

    Raises:
      JpruneError: a probability outside [0, 1). When called: an adapter whose kernel is in no matmul that
        `jprune.matmuls` lists, or in one that is no plain matmul (in a while loop or branch, of experts, of a part); or
        whose shapes are not those of its kernel. Scans are followed, along stacks of kernels too.
    """
    if not 0 <= dropout < 1:
        raise JpruneError(f"a dropout probability is in [0, 1), got {dropout}")

    @functools.wraps(f)
    def adapted(
        params: PyTree, adapters: PyTree, key: Key[Array, ""] | None, *args: PyTree, **kwargs: PyTree
    ) -> PyTree:
        flat = trace(f, params, *args, **kwargs)
        given = by_path(adapters)
        found = find(flat, lambda path: path in given)
        check(found, given, {path: x.aval.shape for path, x in flat.params.items()})
        outputs = Beside(found, given, alpha, dropout)([*flat.leaves(params), *split((args, kwargs))[0]], key)
        return jax.tree.unflatten(flat.output_tree, outputs)

    return adapted


def product(
    a: Float[Array | np.ndarray, "..."],
    b: Float[Array | np.ndarray, "..."],
    in_axes: Sequence[int] | None = None,
    batch_axes: Sequence[int] = (),
) -> Float[Array, "..."]:
    """``a b`` in the kernel's layout; its input axes are the leading ones unless `in_axes` tells others.

    Where it is a stack of kernels, along `batch_axes`, a and b have these axes first, and `in_axes` must be given.
    """
    n = len(batch_axes)
    multiply = functools.partial(jnp.tensordot, axes=1, precision="highest")
    for _ in range(n):
        multiply = jax.vmap(multiply)
    whole = multiply(jnp.asarray(a), jnp.asarray(b))
    if in_axes is None:
        return whole
    order = [*batch_axes, *in_axes]
    order += [i for i in range(whole.ndim) if i not in order]
    return whole.transpose([order.index(i) for i in range(whole.ndim)])


def delta(
    a: Float[Array | np.ndarray, "..."],
    b: Float[Array | np.ndarray, "..."],
    alpha: int | float,
    in_axes: Sequence[int] | None = None,
    batch_axes: Sequence[int] = (),
) -> Float[Array, "..."]:
    """``alpha / r * a b``: what the adapter adds to its kernel; arguments as for `product`."""
    return product(a, b, in_axes, batch_axes) * (alpha / a.shape[-1])


def merge(
    params: PyTree,
    adapters: PyTree,
    *,
    alpha: int | float,
    in_axes: InAxes | None = None,
    masks: PyTree | None = None,
) -> PyTree:
    """Parameters that compute what parameters and adapters do together (without dropout).

    Args:
      params: the frozen parameters; leaves without an adapter are left as they are.
      adapters: as `init` made them, trained.
      alpha: as for `adapt`.
      in_axes: as for `init`; of kernels that are not named the leading axes.
      masks: what is pruned stays zero (see `jprune.apply_masks`): the result then is not quite what was trained.

    Raises:
      JpruneError: an adapter of no parameter, of other sizes, or of a kernel that is no float and would be rounded.
    """
    leaves = trees.flatten(params)
    said = places.given(() if in_axes is None else in_axes)
    for path, (a, b) in by_path(adapters).items():
        if path not in leaves:
            raise JpruneError(f"there is an adapter for {path!r} but no such parameter")
        place = _whole(said[path]) if path in said else None
        change = delta(a, b, alpha) if place is None else delta(a, b, alpha, place.in_axes, place.batch_axes)
        if change.shape != leaves[path].shape:
            raise JpruneError(f"{path}: the adapter's product is {change.shape}, the kernel {leaves[path].shape}")
        if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
            raise JpruneError(
                f"{path}: expected a kernel in floating point, got {leaves[path].dtype}, to which the result would be "
                "rounded; merge before it is quantised"
            )
        wide = jnp.asarray(leaves[path]).astype(jnp.float32) + change.astype(jnp.float32)
        leaves[path] = wide.astype(leaves[path].dtype)
    merged = trees.replace(params, leaves)
    return merged if masks is None else trees.apply_masks(merged, masks)


def trainable_parameters(adapters: PyTree) -> int:
    """How many numbers the adapters have."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapters))


__all__ = ["adapt", "by_path", "delta", "init", "merge", "product", "trainable_parameters"]
