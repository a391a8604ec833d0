"""LoRA for any JAX function: low-rank adapters beside frozen kernels.

Hu et al., "LoRA" (arXiv:2106.09685): ``y = x W + (alpha / r) dropout(x) A B`` with A ``[d_in, r]`` random and B
``[r, d_out]`` zero at the start. As in the authors' code, A is Kaiming-uniform with a = sqrt(5), which is
``U(-1/sqrt(d_in), 1/sqrt(d_in))``.

`adapt` finds the matmuls in the function's jaxpr (`jprune.trace`) and computes the two small products next to each. So
the model needs no change, no dense ``A B`` is formed, and since W is no argument of the gradient, no gradient of W is
either. Kernels that read the same value share the dropout of it, which the authors draw for each.

Adapters are a tree with ``a`` and ``b`` below the path of each adapted kernel: ``blocks/3/attn/q/kernel/a``
``[*d_in, r]`` and ``.../b`` ``[r, *d_out]``, with the kernel's input and output axes in their order.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune import trees
from jprune.annotations import Array, Float, Key, Shaped
from jprune.errors import JpruneError
from jprune.trace.jaxpr import Equation, Trace, Var, trace, variables
from jprune.trace.leaves import split
from jprune.trace.matmuls import Found, Operand, find
from jprune.trace.views import Digit

PyTree = Any

DROPOUT_LEVELS = (
    256  # a probability is rounded to a multiple of 1 / 256: random bits are a fifth of a step's time on CPU
)


def init(
    params: PyTree,
    in_axes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    key: Key[Array, ""],
    targets: trees.Filter | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Adapters that change nothing yet.

    Args:
      params: arrays or ShapeDtypeStructs.
      in_axes: the input axes of every kernel that may be adapted, by path, as `jprune.matmuls` lists them.
      rank: r.
      key: of A; every path draws from a key of its own, so that a kernel's start does not depend on the others.
      targets: regular expressions over the paths of `in_axes`; all of them if None.
      dtype: of the adapters.

    Raises:
      JpruneError: a rank below one, or an expression that finds no kernel.
    """
    if rank < 1:
        raise JpruneError(f"the rank of adapters must be at least 1, got {rank}")
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    leaves = {}
    for path in trees.choose(in_axes, targets):
        shape, axes = shapes[path], in_axes[path]
        d_in = [shape[i] for i in axes]
        d_out = [n for i, n in enumerate(shape) if i not in axes]
        bound = 1 / math.sqrt(math.prod(d_in))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves[f"{path}/a"] = jax.random.uniform(own, (*d_in, rank), dtype, -bound, bound)
        leaves[f"{path}/b"] = jnp.zeros((rank, *d_out), dtype)
    return trees.unflatten(leaves)


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
        `jprune.matmuls` lists, or in one that is no plain matmul (in a loop, a stack, a part); or whose shapes are not
        those of its kernel.
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
        _check_all(found, given)
        values: dict[Var, Any] = dict(zip(flat.args, split((args, kwargs))[0], strict=True))
        leaves = flat.leaves(params)
        seen: dict[int, Array] = {}  # what adapters read, by input_id
        for part in _parts(flat, found.matmuls):
            made = {x for e in part for x in e.outvars}
            needs = dict.fromkeys(x for e in part for x in variables(e) if x in values and x not in made)
            gives = [x for e in part for x in e.outvars]
            run = flat.runner("lora", part, list(needs), gives)
            values.update(zip(gives, run(leaves, [values[x] for x in needs]), strict=True))
            last = part[-1]
            matmul = found.matmuls.get(last.outvars[0])
            if matmul is None:
                continue
            kernel, result = found.kernels[last.outvars[0]], last.outvars[0]
            a, b = given[matmul.path]
            _check(matmul.path, a, b, flat.params[matmul.path].aval.shape, matmul.in_axes)
            x = values.get(last.invars[1 - kernel.side])
            if x is None:  # a constant, or a value that depends on parameters alone
                raise JpruneError(f"{matmul.path}: what it is multiplied with does not depend on the arguments")
            if dropout and key is not None:
                i = matmul.input_id
                # The same value may be read through two views; then it has another layout, and its own dropout.
                if i not in seen or seen[i].shape != x.shape:
                    seen[i] = _keep(jax.random.fold_in(key, i), x.shape, dropout)
                x = x * seen[i].astype(x.dtype)
            delta = _product(last, kernel, x, a, b, matmul.in_axes, matmul.out_axes)
            values[result] = values[result] + (delta * (alpha / a.shape[-1])).astype(result.aval.dtype)
        rest = flat.runner("lora", [], list(values), flat.outputs)
        return jax.tree.unflatten(flat.output_tree, rest(leaves, list(values.values())))

    return adapted


def _check_all(found: Found, given: Mapping[str, Any]) -> None:
    """Refuses adapters whose product could not stand beside every use of their kernel."""
    for path in sorted(given):
        own = [site for site in found.sites if site.matmul.path == path]
        why = next((f"it is used at {s.source}, but {s.reason}" for s in found.skipped if path in s.paths), None)
        if any(site.level is not found.top for site in own):
            why = "it is used inside of a loop or branch; adapt the function of one iteration"
        elif any(not site.product.plain for site in own):
            why = "it is used as a stack, in parts, in copies or by a convolution, and adapters are of whole kernels"
        elif not own and why is None:
            why = "no matmul reads it"
        if why is not None:
            raise JpruneError(f"there is an adapter for {path!r}, but {why}; see jprune.report")


def _parts(flat: Trace, ends: Mapping[Var, Any]) -> list[list[Equation]]:
    """The equations in their order, cut after every one whose result is in `ends`."""
    parts: list[list[Equation]] = [[]]
    for equation in flat.equations:
        parts[-1].append(equation)
        if equation.outvars[0] in ends:
            parts.append([])
    return [part for part in parts if part]


def _check(path: str, a: Any, b: Any, shape: tuple[int, ...], in_axes: tuple[int, ...]) -> None:
    d_in = tuple(shape[i] for i in in_axes)
    d_out = tuple(n for i, n in enumerate(shape) if i not in in_axes)
    if a.shape[:-1] != d_in or b.shape[1:] != d_out or a.shape[-1] != b.shape[0]:
        raise JpruneError(
            f"{path}: expected adapters a {d_in} x r and b r x {d_out} for a kernel {shape} with input axes {in_axes}, "
            f"got {a.shape} and {b.shape}"
        )


def _keep(key: Key[Array, ""], shape: tuple[int, ...], dropout: float) -> Float[Array, "..."]:
    """Zero with the probability `dropout`, else what keeps the mean."""
    level = round(dropout * DROPOUT_LEVELS)
    # Four elements out of each word: JAX spends a whole one on every element, however narrow its type.
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return jnp.where(bits >= level, DROPOUT_LEVELS / (DROPOUT_LEVELS - level), 0.0)


def _product(
    equation: Equation,
    kernel: Operand,
    x: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    in_axes: Sequence[int],
    out_axes: Sequence[int],
) -> Float[Array, "..."]:
    """What the matmul `equation` gives for a kernel ``a b``, computed as ``(x a) b``, in the dtype of a and b."""
    other = 1 - kernel.side
    contracted, batch = equation.params["dimension_numbers"]
    free = [i for i in range(len(kernel.axes)) if i not in (*contracted[kernel.side], *batch[kernel.side])]
    # a and b as the operand has the leaf's axes: [contracted ..., r] and [r, free ...].
    a = _as_operand(a, [kernel.axes[i] for i in contracted[kernel.side]], in_axes)
    b = _as_operand(jnp.moveaxis(b, 0, -1), [kernel.axes[i] for i in free], out_axes)
    over = tuple(contracted[other]), tuple(range(a.ndim - 1))
    y = jax.lax.dot_general(x.astype(a.dtype), a, (over, ((), ())))
    y = jax.lax.dot_general(y, b, (((y.ndim - 1,), (b.ndim - 1,)), ((), ())))  # [rest of x ..., free ...]
    rest = [i for i in range(x.ndim) if i not in contracted[other]]
    before = [rest.index(i) for i in batch[other]]  # of size one
    of_x = [i for i in range(len(rest)) if i not in before]
    of_kernel = list(range(len(rest), len(rest) + len(free)))
    return y.transpose([*before, *(of_kernel + of_x if kernel.side == 0 else of_x + of_kernel)])


def _as_operand(
    factor: Shaped[Array, "..."], axes: Sequence[Sequence[Digit]], leaf_axes: Sequence[int]
) -> Shaped[Array, "..."]:
    """A factor with the axes `leaf_axes` of a leaf, then r, as one with the operand's `axes`, then r."""
    place = {axis: i for i, axis in enumerate(leaf_axes)}
    digits = sorted({d for group in axes for d in group if d.axis in place}, key=lambda d: (place[d.axis], -d.stride))
    split = factor.reshape(*(d.size for d in digits), factor.shape[-1])
    order = [digits.index(d) for group in axes for d in group]
    sizes = [math.prod(d.size for d in group) for group in axes]
    return split.transpose(*order, len(digits)).reshape(*sizes, factor.shape[-1])


def product(
    a: Float[Array | np.ndarray, "*d_in r"],
    b: Float[Array | np.ndarray, "r *d_out"],
    in_axes: Sequence[int] | None = None,
) -> Float[Array, "..."]:
    """``a b`` in the kernel's layout; its input axes are the leading ones unless `in_axes` tells others."""
    whole = jnp.tensordot(a, b, axes=1, precision="highest")
    if in_axes is None:
        return whole
    order = [*in_axes, *(i for i in range(whole.ndim) if i not in in_axes)]
    return whole.transpose([order.index(i) for i in range(whole.ndim)])


def delta(
    a: Float[Array | np.ndarray, "*d_in r"],
    b: Float[Array | np.ndarray, "r *d_out"],
    alpha: int | float,
    in_axes: Sequence[int] | None = None,
) -> Float[Array, "..."]:
    """``alpha / r * a b``: what the adapter adds to its kernel; arguments as for `product`."""
    return product(a, b, in_axes) * (alpha / a.shape[-1])


def merge(
    params: PyTree,
    adapters: PyTree,
    *,
    alpha: int | float,
    in_axes: Mapping[str, tuple[int, ...]] | None = None,
    masks: PyTree | None = None,
) -> PyTree:
    """Parameters that compute what parameters and adapters do together (without dropout).

    Args:
      params: the frozen parameters; leaves without an adapter are left as they are.
      adapters: as `init` made them, trained.
      alpha: as for `adapt`.
      in_axes: the input axes of kernels by path; the leading ones where not given.
      masks: what is pruned stays zero (see `jprune.apply_masks`): the result then is not quite what was trained.
    """
    leaves = trees.flatten(params)
    for path, (a, b) in by_path(adapters).items():
        if path not in leaves:
            raise JpruneError(f"there is an adapter for {path!r} but no such parameter")
        change = delta(a, b, alpha, (in_axes or {}).get(path))
        if change.shape != leaves[path].shape:
            raise JpruneError(f"{path}: the adapter's product is {change.shape}, the kernel {leaves[path].shape}")
        wide = jnp.asarray(leaves[path]).astype(jnp.float32) + change.astype(jnp.float32)
        leaves[path] = wide.astype(leaves[path].dtype)
    merged = trees.replace(params, leaves)
    return merged if masks is None else trees.apply_masks(merged, masks)


def trainable_parameters(adapters: PyTree) -> int:
    """How many numbers the adapters have."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapters))


__all__ = ["adapt", "by_path", "delta", "init", "merge", "product", "trainable_parameters"]
