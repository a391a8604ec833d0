"""Stacks of kernels that have inputs of their own, such as experts: each is pruned by what it saw."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.anatomy.kernels import Kernel
from jprune.solvers.pruned import Pruned
from jprune.statistics import Stacked

Solve = Callable[[Mapping[str, jax.Array], Any, int], Mapping[str, Pruned]]
"""Prunes kernels that read one input, given as matrices by path, by the statistic of that input; they have this number
in their stacks."""


def solve_stacks(
    kernels: Mapping[str, Kernel], values: Mapping[str, jax.Array], statistic: Any, solve: Solve, *, least: int
) -> tuple[dict[str, tuple[jax.Array, Any]], tuple[int, ...]]:
    """Prunes stacks of kernels that read one stack of inputs, kernel by kernel; those that are not chosen stay.

    Args:
      kernels: what is known of each stack, by path.
      values: its values, by path.
      statistic: a `Stacked`, or None if the method needs none.
      solve: prunes one kernel of each stack.
      least: kernels that saw fewer tokens are pruned as if their inputs were all alike, by magnitude that is. (What
        other kernels of the stack saw says nothing: hidden channels of different experts have nothing in common.)

    Returns:
      The pruned stacks and their losses by path (sums over the kernels, those that saw few left out), and the numbers
      of the kernels that saw few.
    """
    count = next(iter(kernels.values())).stack[0]
    few: tuple[int, ...] = ()
    alike = None
    if isinstance(statistic, Stacked):
        few = tuple(i for i, seen in enumerate(np.asarray(statistic.tokens).tolist()) if seen < least)
        alike = jax.jit(Stacked.alike)(statistic) if few else None
    stacks = {path: jnp.moveaxis(values[path], k.batch_axes, range(len(k.batch_axes))) for path, k in kernels.items()}
    apart = {path: x.reshape(count, *x.shape[len(kernels[path].batch_axes) :]) for path, x in stacks.items()}
    axes = {path: _without(k.in_axes, k.batch_axes) for path, k in kernels.items()}
    done: dict[str, jax.Array] = {}
    losses: dict[str, list[Any]] = {path: [] for path in kernels}
    for i in range(count):
        matrices = {path: trees.to_matrix(x[i], axes[path]) for path, x in apart.items() if kernels[path].takes(i)}
        solved: Mapping[str, Pruned] = {}
        if matrices:
            own = statistic if statistic is None else alike if i in few else statistic.of(i)
            solved = solve(matrices, own, i)
        for path, x in apart.items():
            one = x[i]
            if path in solved:
                losses[path].append(0.0 if i in few and solved[path].loss is not None else solved[path].loss)
                one = trees.from_matrix(solved[path].kernel, x.shape[1:], axes[path])
            done[path] = _with(done[path], one, i) if path in done else _begun(one, count)
    results = {}
    for path, k in kernels.items():
        pruned = jnp.moveaxis(done.pop(path).reshape(stacks[path].shape), range(len(k.batch_axes)), k.batch_axes)
        results[path] = pruned, None if None in losses[path] else sum(losses[path])
    return results, few


@functools.partial(jax.jit, static_argnums=1)
def _begun(first: jax.Array, count: int) -> jax.Array:
    """A stack of so many kernels, of which there is the first."""
    return _with(jnp.zeros((count, *first.shape), first.dtype), first, 0)


@functools.partial(jax.jit, donate_argnums=0)
def _with(stack: jax.Array, one: jax.Array, i: int) -> jax.Array:
    """The stack with one more kernel, written where it lies. (All in one XLA's CPU backend would stack in float32.)"""
    return jax.lax.dynamic_update_index_in_dim(stack, one, i, 0)


def _without(axes: tuple[int, ...], gone: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers that axes have when others are gone."""
    return tuple(axis - sum(other < axis for other in gone) for axis in axes)
