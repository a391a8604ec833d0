"""The pytree form of all methods: `prune` finds the kernels of a tree, and the method prunes each."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune import evidence, places, trees
from jprune.annotations import Array, Bool, Shaped
from jprune.errors import JpruneError
from jprune.methods.base import Method
from jprune.methods.magnitude import Magnitude
from jprune.patterns import Pattern, Unstructured, known
from jprune.places import Observed, Place
from jprune.statistics import Gram, Stacked, Statistic

PyTree = Any
InAxes = Mapping[str, tuple[int, ...]] | Iterable[Any] | None


def prune(
    params: PyTree,
    statistics: Observed | Mapping[str, Statistic] | None,
    method: Method,
    pattern: Pattern,
    *,
    where: trees.Filter | None = None,
    skip: trees.Filter = (),
    keep: Mapping[str, Bool[Array, "..."]] | None = None,
    in_axes: InAxes = None,
) -> tuple[PyTree, dict[str, Bool[Array, "..."]]]:
    """Prunes the kernels of any parameter pytree.

    Args:
      params: Linen dict, `nnx.State`, Equinox module, nested dicts: any pytree. What is no array in it stays.
      statistics: what the method asks for, as `observe` returns it: it knows where each kernel lies in its leaf, parts
        and stacks included. Or by the path of each kernel, for whole leaves; which of their axes are inputs is then
        read from the size of the statistic and Flax's layout, inputs first. None if the method asks for nothing.
      method: e.g. `SparseGPT()`.
      pattern: e.g. `Unstructured(0.5)`.
      where: regular expressions over paths of leaves; a leaf is pruned if one is found in its path. By default all that
        were observed, and else "kernel$".
      skip: regular expressions; a leaf in whose path one is found is left alone.
      keep: masks of an earlier pruning, by path; what they pruned stays zero.
      in_axes: the input axes of kernels by path, or what `matmuls` returns; needed where neither statistics nor shapes
        tell which axes are inputs, and it matters.

    Returns:
      The parameters, with pruned kernels, and masks of the leaves by path, True in what is of no pruned kernel. Each
      kernel of a stack has the pattern's exact count; one that saw no token is pruned as if its inputs were alike.

    Raises:
      JpruneError: a filter finds nothing, or a leaf that was not observed; a statistic is missing, does not fit, or is
        none that inputs can have; which axes are inputs is not known; weights are no floating-point numbers; a pattern
        does not fit; a mask in `keep` is of no chosen kernel.
    """
    known(pattern)
    if not isinstance(method, Method):
        raise JpruneError(f"method is a jprune.Method, such as SparseGPT(); got {method!r}")
    leaves = trees.flatten(params)
    keep = {} if keep is None else keep
    kernels = _kernels(leaves, statistics, method, pattern, _chosen(leaves, statistics, where, skip), in_axes)
    _check_keep(keep, kernels, leaves)
    masks_by_path = {}
    for path, own in kernels.items():
        leaf = jnp.asarray(leaves[path])
        mask = jnp.ones(leaf.shape, bool)
        before = keep.get(path)
        for place, statistic in own:
            leaf, mask = _pruned(place, leaf, mask, statistic, method, pattern, before)
        if before is not None:  # of what is of no kernel here too
            mask &= before
            leaf = jnp.where(mask, leaf, jnp.zeros_like(leaf))
        leaves[path], masks_by_path[path] = leaf, mask
    return trees.replace(params, leaves), masks_by_path


def refit(
    params: PyTree,
    statistics: Observed | Mapping[str, Gram],
    masks: Mapping[str, Bool[Array, "..."]],
    *,
    steps: int = 10,
    in_axes: InAxes = None,
) -> PyTree:
    """Applies masks of any origin, and solves for the weights that they keep, so that outputs change least.

    Args:
      params: dense parameters, as for `prune`.
      statistics: a `Gram` of the inputs of each kernel, as for `prune`.
      masks: True = keep, by path of leaves; other leaves stay as they are.
      steps: of conjugate gradients, see `jprune.solvers.refit`.
      in_axes: as for `prune`.

    Returns:
      The parameters, with the kernels that have masks pruned by them.

    Raises:
      JpruneError: a mask is not bool, has not the shape of its leaf, or is of no kernel; and what `prune` refuses.
    """
    where = [f"^{re.escape(path)}$" for path in masks]
    nothing_more = Unstructured(0.0, "kernel")
    method = Magnitude(refit=steps)
    return prune(params, statistics, method, nothing_more, where=where, keep=masks, in_axes=in_axes)[0]


def _chosen(
    leaves: Mapping[str, Any], statistics: Mapping[str, Any] | None, where: trees.Filter | None, skip: trees.Filter
) -> list[str]:
    """The paths of the leaves that are to be pruned."""
    if not isinstance(statistics, Observed):
        return trees.choose(leaves, "kernel$" if where is None else where, skip)
    read = {place.path for place in statistics.places.values()}
    if strays := sorted(read - leaves.keys()):
        raise JpruneError(f"there is a statistic for {strays[0]!r} but no such parameter; observe these parameters")
    chosen = trees.choose(leaves, where, skip)
    missed = [path for path in chosen if path not in read and trees.is_kernel(leaves[path])]
    if where is not None and missed:
        raise JpruneError(
            f"{missed[0]} is chosen by `where`, and no input of it was observed: jprune.report says what becomes of "
            "it; leave it out with `skip`"
        )
    if found := [path for path in chosen if path in read]:
        return found
    raise JpruneError(f"expected `where` and `skip` to leave some of the {len(read)} observed leaves, they leave none")


def _kernels(
    leaves: Mapping[str, Any],
    statistics: Mapping[str, Any] | None,
    method: Method,
    pattern: Pattern,
    chosen: Iterable[str],
    in_axes: InAxes,
) -> dict[str, list[tuple[Place, Any]]]:
    """The kernels in every chosen leaf, each with its place and statistic, checked."""
    said = places.given(() if in_axes is None else in_axes)
    given = {} if statistics is None else statistics
    observed: dict[str, list[Place]] = {}
    if isinstance(statistics, Observed):
        for place in statistics.places.values():
            observed.setdefault(place.path, []).append(place)
    kernels = {}
    for path in chosen:
        trees.check_floating(leaves[path], path)
        own = observed.get(path) or said.get(path) or [_assumed(path, leaves[path], given.get(path), method, pattern)]
        if path in observed and path in said and {p.in_axes for p in said[path]} != {p.in_axes for p in own}:
            raise JpruneError(f"{path}: expected `in_axes` to be as observed, {own}, got {list(said[path])}")
        places.check_apart(own)
        kernels[path] = [(place, given.get(place.key)) for place in own]
        for place, statistic in kernels[path]:
            _check(place, leaves[path].shape, statistic, method)
            pattern.check(place.counts(leaves[path].shape)[1], place.key)
    return kernels


def _assumed(path: str, leaf: Any, statistic: Any, method: Method, pattern: Pattern) -> Place:
    """A whole leaf in Flax's layout, if it can be told that it is one, or does not matter."""
    _check_kind(path, statistic, method)
    if isinstance(statistic, Stacked):
        raise JpruneError(
            f"{path}: which axes number the kernels of the stack? Give what jprune.matmuls returns as in_axes"
        )
    d_in = None if statistic is None else statistic.d_in
    if d_in is None and len(leaf.shape) > 1 and method.statistic is None and method.needs_axes(pattern):
        raise JpruneError(
            f"{path}: which axes of shape {leaf.shape} are inputs? {pattern} depends on it: give in_axes={{{path!r}: "
            "(0,)} if it is the first, or in_axes=jprune.matmuls(...), or the statistics that jprune.observe returns"
        )
    if not method.needs_axes(pattern):
        d_in = None
    return Place(path=path, in_axes=trees.leading_axes(leaf.shape, d_in, path))


def _check(place: Place, shape: tuple[int, ...], statistic: Any, method: Method) -> None:
    """Raises a `JpruneError` unless the statistic is what the method needs, of the kernels that lie here."""
    stack, d_in, _ = place.counts(shape)
    _check_kind(place.key, statistic, method)
    if method.statistic is None or statistic is None:
        return
    if statistic.d_in != d_in:
        raise JpruneError(f"{place.key}: expected a statistic of {d_in} inputs, got one of {statistic.d_in}")
    count = len(jax.tree.leaves(statistic)[0]) if isinstance(statistic, Stacked) else 1
    if count != stack or isinstance(statistic, Stacked) != bool(place.batch_axes):
        raise JpruneError(f"{place.key}: expected a statistic for each of {stack} kernels, got {count}")


def _check_kind(key: str, statistic: Any, method: Method) -> None:
    each = statistic.each if isinstance(statistic, Stacked) else statistic
    evidence.check_kind(each, method.statistic, key, type(method).__name__)


def _check_keep(keep: Mapping[str, Any], kernels: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    if strays := [path for path in keep if path not in kernels]:
        raise JpruneError(f"there is a mask to keep for {strays[0]!r}, which is not among the {len(kernels)} kernels")
    for path, mask in keep.items():
        if mask.shape != leaves[path].shape or mask.dtype != bool:
            raise JpruneError(
                f"{path}: expected a bool mask {leaves[path].shape} to keep, got {jnp.dtype(mask.dtype)} {mask.shape}"
            )


def _pruned(
    place: Place,
    leaf: Shaped[Array, "..."],
    mask: Bool[Array, "..."],
    statistic: Any,
    method: Method,
    pattern: Pattern,
    before: Bool[Array, "..."] | None,
) -> tuple[Shaped[Array, "..."], Bool[Array, "..."]]:
    """The leaf and its mask, with the kernels that lie here pruned one by one."""
    kernels, keeps = place.matrices(leaf), None if before is None else place.matrices(before)
    results = []
    for i, (name, own) in enumerate(_each(place, len(kernels), statistic)):
        kept = {} if keeps is None else {name: jnp.asarray(keeps[i])}
        results.append(method.together({name: kernels[i]}, own, {name: pattern}, kept)[name])
    return (
        place.put(leaf, jnp.stack([result.kernel for result in results])),
        place.put(mask, jnp.stack([result.mask for result in results])),
    )


def _each(place: Place, count: int, statistic: Any) -> Iterator[tuple[str, Any]]:
    """What messages call each kernel of a stack, and what it has seen."""
    if not place.batch_axes:
        yield place.key, statistic
        return
    for i in range(count):
        own = statistic.of(i) if isinstance(statistic, Stacked) else statistic
        if isinstance(statistic, Stacked) and evidence.has_seen_nothing(own):
            own = statistic.alike()
        yield f"{place.key}, kernel {i} of {count}", own
