"""A whole function made smaller in one call: coupled groups, importance, selection and surgery.

Groups are what `jprune.coupled_axes` finds; each is scored by a criterion of LLM-Pruner (see `importance`), summed over
everything that goes with a unit, and loses its least important units.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jprune import devices, trees
from jprune.annotations import Int
from jprune.errors import JpruneError
from jprune.places import Observed
from jprune.statistics import Gram
from jprune.structured import importance, selection
from jprune.structured.importance import CRITERIA, Criterion
from jprune.structured.kinds import members
from jprune.structured.selection import Target
from jprune.structured.surgery import shrink, size
from jprune.structured.units import Units
from jprune.trace.coupling.axes import coupled_axes
from jprune.trace.coupling.group import Group, Groups
from jprune.trace.coupling.named import Numbers
from jprune.trace.matmuls import matmuls
from jprune.trace.observe import observe

PyTree = Any
Gradients = dict[str, jax.Array]


def shrink_function(
    f: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Sequence[PyTree]],
    target: Target,
    *,
    loss: Callable[..., Any] | None = None,
    criterion: Criterion | Literal["random"] = "param_first",
    where: trees.Filter | None = None,
    believed: bool = False,
    numbers: Numbers | None = None,
    round_to: int = 1,
    compensate: bool = True,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[PyTree, dict[str, Int[np.ndarray, "units"]]]:
    """Removes the least important units of a function's coupled groups.

    Args:
      f: any traceable function of (params, *args) that computes with the sizes of its arrays.
      params: its parameters.
      batches: argument tuples, taken one by one; the first is traced, and the loss is that of all. Criteria go by the
        mean gradient over the batches and by the mean of the batches' squared gradients, so an example a batch is what
        the authors have.
      target: how small: a share of the units of each group, or a size of all parameters.
      loss: a number, of the arguments of f; f itself if None. Criteria that go by weights alone need none.
      criterion: how important a unit is, as for `LLMPruner`.
      where: regular expressions over the names of groups: which are to be smaller; all that are safe if None.
      believed: whether groups count as safe of which that is believed, and not proven (see `coupled_axes`).
      numbers: what numbers in f come from, as for `coupled_axes`.
      round_to: makes what stays of a group a multiple of it, where units are one channel wide.
      compensate: whether kernels that lose inputs are refitted to make up for them (see `shrink`), by what they read in
        f before anything goes, over all batches. A Gram matrix of each is in memory then. Not so the readers of units
        that a norm takes a mean over: what they read is scaled anew.
      seed: of the criterion "random".
      mesh: devices that share each batch, along its first axis; JAX's default device if None.

    Returns:
      The smaller parameters, and which units stay of each group, by its name; `Groups.keep` makes of these what
      `jprune.shrink` takes for other trees of the same shapes, as an optimizer's state.

    Raises:
      JpruneError: there is no batch; no group is safe, or one that `where` finds is not; the loss is no number; what
        the target asks for cannot be had.
    """
    stream = iter(batches)
    if (beginning := next(stream, None)) is None:
        raise JpruneError("expected at least one batch, got none")
    first = tuple(beginning)
    if criterion != "random" and criterion not in CRITERIA:
        raise JpruneError(f"expected a criterion out of {', '.join([*CRITERIA, 'random'])}, got {criterion!r}")
    groups = coupled_axes(f, params, *first, numbers=numbers)
    chosen = _chosen(groups, where, believed)
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    whole = [m for m in matmuls(f, params, *first) if not m.batch_axes and m.part is None and m.shape is None]
    in_axes: dict[str, tuple[int, ...]] = {}
    for m in whole:
        in_axes.setdefault(m.path, m.in_axes)
    units = [_units(group, shapes, in_axes) for group in chosen]
    every = (devices.spread(tuple(args), mesh) for args in itertools.chain([first], stream))
    readers = _readers(units, in_axes) if compensate else set()
    seen = _Seen(f, params, every, readers)
    scores = _scores(units, params, seen, loss or f, criterion, seed)

    def choose(ratio: float) -> selection.Kept:
        return selection.select(units, scores, ratio, round_to=round_to)

    def count(kept: selection.Kept) -> int:
        return size(params, groups.keep(kept))

    kept = target.reach(choose, count, size(params))
    keep = groups.keep(kept)
    cut = {(path, axis) for path, axes in keep.items() for axis, left in axes.items() if len(left) < shapes[path][axis]}
    loses = any((path, axis) in cut for path in readers for axis in in_axes[path])
    return shrink(params, keep, seen.grams() if loses else None), kept


def _readers(units: Sequence[Units], in_axes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The kernels that sum over units, and read nothing that becomes another number when units go."""
    read = {True: set[str](), False: set[str]()}
    for u in units:
        read[u.renormalised] |= {m.path for m in u.members if m.axis in in_axes.get(m.path, ())}
    return read[False] - read[True]


class _Seen:
    """Batches that are gone through once, and the Grams of what some kernels read in those that have been."""

    def __init__(
        self, f: Callable[..., PyTree], params: PyTree, batches: Iterator[tuple[PyTree, ...]], readers: set[str]
    ) -> None:
        self._params, self._batches, self._readers = params, batches, readers
        self._observe = jax.jit(observe(f, Gram, where=readers.__contains__))
        self._grams: Observed | None = None

    def __iter__(self) -> Iterator[tuple[PyTree, ...]]:
        return self

    def __next__(self) -> tuple[PyTree, ...]:
        args = next(self._batches)
        if self._readers:
            _, new = self._observe(self._params, *args)
            self._grams = new if self._grams is None else self._grams.merge(new)
        return args

    def grams(self) -> Observed | None:
        """Those over all batches, the ones that nobody has asked for included."""
        for _ in self:
            pass
        return self._grams


def _chosen(groups: Groups, where: trees.Filter | None, believed: bool) -> list[Group]:
    """The groups that are to be smaller."""
    several = [group for group in groups if group.size > 1]
    named = set(trees.choose([group.name for group in several], where))
    asked = [group for group in several if group.name in named]
    safe = [group for group in asked if group.frozen is None and (group.proven or believed)]
    left = [group for group in asked if group not in safe]
    if left and (where is not None or not safe):
        left.sort(key=lambda group: group.frozen is not None)
        more = f"; and {len(left) - 1} more, see jprune.coupled_axes" if len(left) > 1 else ""
        advice = "" if left[0].frozen else "; `believed` takes what is only believed to be safe"
        raise JpruneError(f"expected groups that are proven to be safe to prune, got {left[0]}{more}{advice}")
    if not safe:
        raise JpruneError("expected a function with axes of parameters that can shrink, found none")
    if unsure := [group for group in left if group.frozen is None]:
        warnings.warn(
            f"left as they are, because it is not proven that they may shrink: {', '.join(g.name for g in unsure)}; "
            "`believed` takes them too",
            UserWarning,
            stacklevel=3,
        )
    return safe


def _units(group: Group, shapes: Mapping[str, tuple[int, ...]], in_axes: Mapping[str, tuple[int, ...]]) -> Units:
    return Units(
        kind="mlp",  # nothing here goes by it
        name=group.name,
        count=group.size,
        members=members(group, shapes, in_axes),
        renormalised=group.renormalised,
    )


def _scores(
    units: Sequence[Units],
    params: PyTree,
    batches: Iterator[tuple[PyTree, ...]],
    loss: Callable[..., Any],
    criterion: Criterion | Literal["random"],
    seed: int,
) -> dict[str, np.ndarray]:
    """The importance of the units of each group, by its name."""
    if criterion == "random":
        return {u.name: importance.random(u, seed) for u in units}
    formula = CRITERIA[criterion]
    leaves = trees.flatten(params)
    needed = {m.path: leaves[m.path] for u in units for m in u.members if m.counted}
    gradients, squares = None, None
    if formula.needs:
        gradients, squares = _gradients(loss, params, needed, batches)
    scores = {}
    for u in units:
        found = importance.vectors(u, criterion, needed, gradients, squares)
        scores[u.name] = importance.combine(u, found, formula.reduction)
    return scores


def _gradients(
    loss: Callable[..., Any], params: PyTree, needed: Gradients, batches: Iterator[tuple[PyTree, ...]]
) -> tuple[Gradients, Gradients]:
    """The gradient of the mean loss, and the mean of the batches' squared gradients, in float32, by path."""

    def value(needed: Gradients, args: Sequence[PyTree]) -> Any:
        return loss(trees.replace(params, {**trees.flatten(params), **needed}), *args)

    first = next(batches)
    shape = jax.eval_shape(functools.partial(value, needed), first)
    if getattr(shape, "shape", None) != ():
        raise JpruneError(
            f"expected a loss that is one number, got {jax.tree.map(lambda x: x.shape, shape)}; give `loss`, or a "
            "`criterion` that goes by weights alone (l1, l2)"
        )

    @jax.jit
    def add(sums: tuple[Gradients, Gradients], args: Sequence[PyTree]) -> tuple[Gradients, Gradients]:
        found = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(value)(needed, args))
        return jax.tree.map(jnp.add, sums[0], found), jax.tree.map(lambda s, g: s + g * g, sums[1], found)

    zeros = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in needed.items()}
    sums, count = (zeros, zeros), 0
    for args in itertools.chain([first], batches):
        sums, count = add(sums, args), count + 1
    gradients, squares = jax.tree.map(lambda total: total / count, sums)
    return gradients, squares


__all__ = ["shrink_function"]
