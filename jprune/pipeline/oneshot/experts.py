"""Stacks of kernels that have inputs of their own, such as experts: each is pruned by what it saw."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel
from jprune.methods import Method
from jprune.statistics import Stacked


def solve_stacks(
    method: Method,
    kernels: Mapping[str, tuple[Kernel, jax.Array]],
    statistic: Any,
    least: int,
    mesh: Mesh,
    *,
    keep_zeros: bool = False,
) -> tuple[dict[str, tuple[jax.Array, Any]], tuple[int, ...]]:
    """Prunes stacks of kernels that read one stack of inputs, kernel by kernel.

    Args:
      method: how.
      kernels: what is known of each stack, and its values, by name.
      statistic: a `Stacked`, or None if the method needs none.
      least: kernels that saw fewer tokens are pruned as if their inputs were all alike, by magnitude that is. (What
        other kernels of the stack saw says nothing: hidden channels of different experts have nothing in common.)
      mesh: the devices; outputs of every kernel are shared out.
      keep_zeros: what is zero stays zero.

    Returns:
      The pruned stacks and their losses by name (sums over the kernels, those that saw few left out), and the numbers
      of the kernels that saw few.
    """
    first, _ = next(iter(kernels.values()))
    count = first.stack[0]
    few: tuple[int, ...] = ()
    alike = None
    if isinstance(statistic, Stacked):
        few = tuple(i for i, seen in enumerate(np.asarray(statistic.tokens).tolist()) if seen < least)
        alike = jax.jit(Stacked.alike)(statistic) if few else None
    stacks = {
        name: jnp.moveaxis(values, k.batch_axes, range(len(k.batch_axes))) for name, (k, values) in kernels.items()
    }
    apart = {name: x.reshape(count, *x.shape[len(kernels[name][0].batch_axes) :]) for name, x in stacks.items()}
    axes = {name: _without(k.in_axes, k.batch_axes) for name, (k, _) in kernels.items()}
    patterns = {name: k.pattern for name, (k, _) in kernels.items()}
    done: dict[str, list[jax.Array]] = {name: [] for name in kernels}
    losses: dict[str, list[Any]] = {name: [] for name in kernels}
    for i in range(count):
        own = statistic if statistic is None else alike if i in few else statistic.of(i)
        matrices = {name: trees.to_matrix(x[i], axes[name]) for name, x in apart.items()}
        matrices = devices.spread_columns(mesh, matrices)
        keeps = {name: matrix != 0 for name, matrix in matrices.items()} if keep_zeros else {}
        for name, result in jax.block_until_ready(method.together(matrices, own, patterns, keeps)).items():
            done[name].append(trees.from_matrix(result.kernel, apart[name].shape[1:], axes[name]))
            losses[name].append(0.0 if i in few and result.loss is not None else result.loss)
    results = {}
    for name, (k, _) in kernels.items():
        stack = jnp.stack(done[name]).reshape(stacks[name].shape)
        values = jnp.moveaxis(stack, range(len(k.batch_axes)), k.batch_axes)
        results[name] = values, None if None in losses[name] else sum(losses[name])
    return results, few


def _without(axes: tuple[int, ...], gone: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers that axes have when others are gone."""
    return tuple(axis - sum(other < axis for other in gone) for axis in axes)
