"""The pytree form of all methods: `prune` finds the kernels of a tree, and the method prunes each."""

from collections.abc import Mapping
from typing import Any

from jprune import trees
from jprune.annotations import Array, Bool
from jprune.errors import JpruneError
from jprune.methods.base import Method
from jprune.patterns import Pattern, known
from jprune.statistics import Statistic

PyTree = Any


def prune(
    params: PyTree,
    statistics: Mapping[str, Statistic] | None,
    method: Method,
    pattern: Pattern,
    *,
    where: trees.Filter = "kernel$",
    skip: trees.Filter = (),
    keep: Mapping[str, Bool[Array, "..."]] | None = None,
    in_axes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[PyTree, dict[str, Bool[Array, "..."]]]:
    """Prunes the kernels of any parameter pytree.

    Args:
      params: Linen dict, `nnx.State` or nested dicts. Kernels have their input axes first, as Flax lays them out; how
        many axes are inputs is read from the size of their statistic.
      statistics: for each kernel's path what the method asks for, as `observe` returns it; None if it asks for nothing.
      method: e.g. `SparseGPT()`.
      pattern: e.g. `Unstructured(0.5)`.
      where: regular expressions over paths; a leaf is pruned if one is found in its path.
      skip: regular expressions; a leaf in whose path one is found is left alone.
      keep: masks of an earlier pruning, by path; what they pruned stays zero.
      in_axes: the input axes of kernels by path, as `matmuls` returns them, where they are not as said above.

    Returns:
      The parameters, with pruned kernels, and the masks by path.

    Raises:
      JpruneError: a filter finds nothing; a statistic is missing or does not fit; a pattern does not fit; a kernel of
        more than two axes without a statistic does not tell its inputs; a mask in `keep` is of no chosen kernel.
    """
    known(pattern)
    leaves = trees.flatten(params)
    kernels, keep = {}, keep or {}
    for path in trees.choose(leaves, where, skip):
        statistic = (statistics or {}).get(path)
        if method.statistic is not None and not isinstance(statistic, method.statistic):
            raise JpruneError(
                f"{path}: {type(method).__name__} needs a {method.statistic.__name__} of its inputs, "
                f"got {type(statistic).__name__}; gather it with jprune.observe"
            )
        kernels[path] = _input_axes(leaves[path].shape, statistic, pattern, (in_axes or {}).get(path), path)
    if strays := [path for path in keep if path not in kernels]:
        raise JpruneError(f"there is a mask to keep for {strays[0]!r}, which is not among the {len(kernels)} kernels")
    masks_by_path = {}
    for path, axes in kernels.items():
        matrix = trees.to_matrix(leaves[path], axes)
        pattern.check(len(matrix), path)
        before = {path: trees.to_matrix(keep[path], axes)} if path in keep else {}
        pruned = method.together({path: matrix}, (statistics or {}).get(path), {path: pattern}, before)[path]
        leaves[path] = trees.from_matrix(pruned.kernel, leaves[path].shape, axes)
        masks_by_path[path] = trees.from_matrix(pruned.mask, leaves[path].shape, axes)
    return trees.replace(params, leaves), masks_by_path


def _input_axes(
    shape: tuple[int, ...], statistic: Statistic | None, pattern: Pattern, given: tuple[int, ...] | None, path: str
) -> tuple[int, ...]:
    if given is not None:
        return given
    if len(shape) > 2 and statistic is None and pattern.by_input:
        raise JpruneError(f"{path}: which axes of shape {shape} are inputs? Give them as in_axes (see jprune.matmuls)")
    return trees.leading_axes(shape, None if statistic is None else statistic.d_in, path)
