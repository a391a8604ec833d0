"""Parameter pytrees: leaves by path, masks over them, and their sparsity.

A path is the "/"-joined keys of a leaf, as in ``blocks/3/attn/q/kernel``; the ``/value`` that NNX puts at the end is
left out. Filters are regular expressions searched for anywhere in the path. What is no array, as the functions in a
module of Equinox, has no path here, and stays where it is.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Shaped
from jprune.errors import JpruneError

PyTree = Any
Filter = str | Iterable[str]


def path_name(path: tuple) -> str:
    """The readable name of a key path from `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def flatten(tree: PyTree) -> dict[str, Any]:
    """All arrays of a tree, and what stands for one and has its shape, by their path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if is_array(leaf)}


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one and has its shape."""
    return hasattr(leaf, "shape")


def is_kernel(leaf: Any) -> bool:
    """Whether a leaf can be a kernel: floating-point numbers, with at least one input and one output axis."""
    return is_array(leaf) and len(leaf.shape) > 1 and jnp.issubdtype(getattr(leaf, "dtype", np.void), jnp.floating)


def check_floating(leaf: Any, where: str) -> None:
    """Raises a `JpruneError` that names `where` if these are no floating-point numbers."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise JpruneError(
            f"{where}: expected weights in floating point, got {jnp.dtype(leaf.dtype)}; prune before they are "
            "quantised, or leave them out"
        )


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """Nested dicts out of leaves by path; the inverse of `flatten` for trees of dicts with string keys."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with its arrays taken from `leaves`, by path."""
    return jax.tree_util.tree_map_with_path(lambda path, x: leaves[path_name(path)] if is_array(x) else x, tree)


def to_matrix(kernel: Shaped[Array, "..."], in_axes: tuple[int, ...]) -> Shaped[Array, "d_in d_out"]:
    """The matrix view: input axes first and flattened, then all others flattened."""
    out_axes = [axis for axis in range(kernel.ndim) if axis not in in_axes]
    d_in = math.prod(kernel.shape[axis] for axis in in_axes)
    return kernel.transpose(*in_axes, *out_axes).reshape(d_in, -1)


def from_matrix(
    matrix: Shaped[Array, "d_in d_out"], shape: tuple[int, ...], in_axes: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """The kernel of `shape` whose matrix view this is; the inverse of `to_matrix`."""
    axes = [*in_axes, *(axis for axis in range(len(shape)) if axis not in in_axes)]
    return matrix.reshape([shape[axis] for axis in axes]).transpose(*(axes.index(axis) for axis in range(len(shape))))


def leading_axes(shape: tuple[int, ...], d_in: int | None, path: str) -> tuple[int, ...]:
    """The leading axes whose sizes multiply to `d_in`: where Flax keeps a kernel's inputs. One axis, if None.

    Raises:
      JpruneError: it has no output axis, no leading axes fit, or others would fit as well.
    """
    if len(shape) < 2:
        raise JpruneError(f"{path}: a kernel has at least one input and one output axis, this leaf's shape is {shape}")
    if d_in is None:
        return (0,)
    leading = [tuple(range(n)) for n in range(1, len(shape)) if math.prod(shape[:n]) == d_in]
    if not leading:
        raise JpruneError(
            f"{path}: no leading axes of shape {shape} make the {d_in} inputs of its statistic; if others do, say "
            "which by `in_axes`, for example as jprune.matmuls returns them"
        )
    wide = [axis for axis, size in enumerate(shape) if size > 1]  # axes of one number change no matrix view
    subsets = (axes for n in range(1, len(wide) + 1) for axes in itertools.combinations(wide, n))
    fits = [axes for axes in subsets if math.prod(shape[axis] for axis in axes) == d_in]
    if len(fits) > 1:
        raise JpruneError(
            f"{path}: its statistic has {d_in} inputs, and of shape {shape} axes {' or '.join(map(str, fits))} may be "
            f"these; say which: in_axes={{{path!r}: {leading[0]}}} as Flax has them, or in_axes=jprune.matmuls(...), "
            "or prune by what jprune.observe returns, which knows"
        )
    return leading[0]


def choose(paths: Iterable[str], where: Filter | None = None, skip: Filter = ()) -> list[str]:
    """The paths that some expression of `where` finds (all, if None) and none of `skip` does, in their order.

    Raises:
      JpruneError: an expression does not compile, or finds nothing; the message lists the nearest paths.
    """
    paths = paths if isinstance(paths, Mapping) else list(paths)
    where = [where] if isinstance(where, str) else where
    skip = [skip] if isinstance(skip, str) else skip
    wanted = set(paths) if where is None else {p for pattern in where for p in found(pattern, paths)}
    unwanted = {p for pattern in skip for p in found(pattern, paths)}
    return [p for p in paths if p in wanted - unwanted]


def found(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths in which `pattern` is found; an error that lists near misses if there are none.

    Of leaves by path, those that can be kernels are the nearer misses.
    """
    paths = paths if isinstance(paths, Mapping) else list(paths)
    if hits := matching(pattern, paths):
        return hits
    raise JpruneError(missed(pattern, paths))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names in which a regular expression is found; an error if it is none."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise JpruneError(f"{pattern!r} is not a regular expression: {error}") from error
    return [name for name in names if regex.search(name)]


def missed(pattern: str, paths: Mapping[str, Any] | list[str]) -> str:
    """What is said of an expression that is found in none of the paths: with near misses."""
    what = "leaves" if isinstance(paths, Mapping) and any(map(is_array, paths.values())) else "kernels"
    return f"{pattern!r} matches none of the {len(paths)} {what}; {_near(pattern, paths)}"


def _near(wanted: str, paths: Mapping[str, Any] | list[str]) -> str:
    """The three paths that are most like the one wanted, kernels first if leaves are given by path."""
    first = {p for p, leaf in paths.items() if is_kernel(leaf)} if isinstance(paths, Mapping) else set[str]()
    parts = [p for p in paths if p in first], [p for p in paths if p not in first]
    near = [p for part in parts for p in difflib.get_close_matches(wanted, part, n=3, cutoff=0.0)]
    return f"near misses: {', '.join(near[:3])}" if near else "there are none at all"


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters with the pruned elements set to zero.

    Args:
      params: any pytree.
      masks: bool leaves by path, as `prune` returns them, or in a tree like that of the parameters. Leaves whose mask
        is None or left out are untouched.

    Raises:
      JpruneError: a mask's path or shape is not that of a parameter.
    """
    by_path = flatten(masks)
    leaves = flatten(params)
    for path, mask in by_path.items():
        if path not in leaves:
            raise JpruneError(f"there is a mask for {path!r} but no such parameter; {_near(path, leaves)}")
        if mask.shape != leaves[path].shape:
            raise JpruneError(f"{path}: the mask's shape is {mask.shape}, the parameter's {leaves[path].shape}")
        leaves[path] = jnp.where(mask, leaves[path], jnp.zeros_like(leaves[path]))
    return replace(params, leaves)


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Zeros among the prunable parameters, and both denominators."""

    zeros: int
    prunable_parameters: int
    total_parameters: int

    @property
    def achieved(self) -> float:
        """Zeros / prunable parameters."""
        return self.zeros / max(self.prunable_parameters, 1)

    def __float__(self) -> float:
        return self.achieved

    def json(self) -> dict[str, Any]:
        """The achieved sparsity and the counts, as reports and records have them."""
        return {"achieved": self.achieved, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, contents: Mapping[str, Any]) -> "Sparsity":
        """A sparsity from what `json` made of it."""
        return cls(**{field.name: contents[field.name] for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        of_all = 100 * self.zeros / max(self.total_parameters, 1)
        return (
            f"{100 * self.achieved:.1f} % of {_count(self.prunable_parameters)} prunable "
            f"({of_all:.1f} % of {_count(self.total_parameters)})"
        )


def sparsity(params: PyTree, where: Filter | None = "kernel$") -> Sparsity:
    """Counts the zeros of the leaves that `where` finds; by default every kernel."""
    leaves = flatten(params)
    chosen = choose(leaves, where)
    return Sparsity(
        zeros=sum(int(leaves[p].size) - int(jnp.count_nonzero(leaves[p])) for p in chosen),
        prunable_parameters=sum(int(leaves[p].size) for p in chosen),
        total_parameters=sum(int(x.size) for x in leaves.values()),
    )


def count_zeros(values: np.ndarray) -> int:
    """Number of elements that are exactly zero (or minus zero), counted fast for every float dtype."""
    bits = values.view(f"u{values.dtype.itemsize}")
    return int(values.size - np.count_nonzero(bits << 1))


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return str(n)
