"""Pruning the kernels of a part that read one input, and a report on each."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel
from jprune.errors import JpruneError
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.experts import solve_stacks
from jprune.pipeline.oneshot.report import KernelReport
from jprune.solvers.pruned import Pruned
from jprune.statistics import Statistic


def solve(
    job: Job, kernels: Mapping[str, Kernel], values: Mapping[str, jax.Array], statistic: Statistic | None
) -> tuple[dict[str, jax.Array], list[KernelReport]]:
    """The pruned values of kernels that read one input, where the old ones lie, and a report on each.

    Args:
      job: how they are pruned.
      kernels: which, by their paths in the part.
      values: their values, by the same paths, perhaps among others.
      statistic: what is known of the input; None if the method needs nothing.

    Raises:
      JpruneError: weights that are not finite come out.
    """
    by_path = {kernel.path: kernel for kernel in kernels.values()}  # messages name kernels by their whole paths
    given = {kernel.path: values[path] for path, kernel in kernels.items()}

    def together(matrices: Mapping[str, jax.Array], statistic: Any, number: int = 0) -> dict[str, Pruned]:
        patterns = {path: by_path[path].pattern.of(number) for path in matrices}
        spread = devices.spread_columns(job.mesh, matrices)
        # What is zero counts as pruned before: it stays zero, and is among the zeros asked for.
        keeps = {path: matrix != 0 for path, matrix in spread.items()} if job.recipe.keep_zeros else {}
        return jax.block_until_ready(job.method.together(spread, statistic, patterns, keeps))

    few: tuple[int, ...] = ()
    results: Mapping[str, tuple[jax.Array, Any]]
    if next(iter(kernels.values())).stack:
        results, few = solve_stacks(by_path, given, statistic, together, least=job.recipe.least_tokens)
    else:
        solved = together({path: trees.to_matrix(x, by_path[path].in_axes) for path, x in given.items()}, statistic)
        results = {
            path: (trees.from_matrix(solved[path].kernel, k.shape, k.in_axes), solved[path].loss)
            for path, k in by_path.items()
        }
    pruned, reports = {}, []
    for path, kernel in kernels.items():
        new, loss = results[kernel.path]
        pruned[path] = devices.moved(new, values[path].sharding)
        reports.append(_report(kernel, pruned[path], loss, few))
    return pruned, reports


def _report(kernel: Kernel, pruned: jax.Array, loss: Any, few: tuple[int, ...]) -> KernelReport:
    loss = None if loss is None else float(loss)
    if loss is not None and not math.isfinite(loss):
        raise JpruneError(f"{kernel.path}: pruning it gave weights that are not finite (loss {loss})")
    if pruned.dtype == jnp.float16 and not bool(jnp.isfinite(pruned).all()):
        raise JpruneError(f"{kernel.path}: pruning it gave weights beyond float16; convert the model to bfloat16")
    return KernelReport(
        path=kernel.path,
        shape=kernel.shape,
        pattern=str(kernel.pattern),
        zeros=int(kernel.size - jnp.count_nonzero(kernel.part(pruned))),
        size=kernel.size,
        loss=loss,
        few_tokens=tuple(filter(kernel.takes, few)),
        experts=kernel.chosen,
    )
