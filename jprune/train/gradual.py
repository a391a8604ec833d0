"""Gradual pruning: masks that are chosen anew as training goes on, along a sparsity schedule.

Zhu and Gupta 2017 (https://arxiv.org/abs/1710.01878). Every few steps the lowest scores are pruned, as many as the
schedule says by then; in between, and after the schedule's end, masks stay as they are. Chained last, as `keep_masked`
is, it turns the updates of pruned parameters into what makes them exactly zero.

What is pruned stays pruned. In the paper that follows: a pruned weight is zero, and its magnitude the lowest there is.
Here it is made sure of, so that it also holds for scores of other kinds, and where other weights become zero.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from jprune import masks, places, scores, trees
from jprune.annotations import Array, Bool, Float, Int, UInt8
from jprune.errors import JpruneError
from jprune.patterns import Scope
from jprune.places import Place
from jprune.train.keep_masked import pack, to_zero, unpack
from jprune.train.schedules import SparsitySchedule

PyTree = Any
Score = Callable[..., Float[Array, "d_in d_out"]]
"""(kernel in its matrix view) or (kernel, statistic) -> importance of each element, higher = keep."""


class GradualState(NamedTuple):
    """What `gradual` knows between two steps."""

    step: Int[Array, ""]
    """Updates made."""
    masks: dict[str, UInt8[Array, "..."]]
    """By path of the kernel, packed by `jprune.train.keep_masked.pack`."""


def gradual(
    schedule: SparsitySchedule,
    score: Score = scores.magnitude,
    *,
    every: int = 100,
    per: Scope = "kernel",
    where: trees.Filter = "kernel$",
    skip: trees.Filter = (),
    in_axes: Mapping[str, tuple[int, ...]] | Iterable[Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training; to be chained last: ``optax.chain(optax.adamw(1e-4), gradual(cubic(0.8, end=5000)))``.

    At each step that is due (`SparsitySchedule.due`), the parameters as they are before the update are scored, and the
    kernels have exactly the zeros that the schedule says after it. The other steps cost what `keep_masked` costs.
    A model that is pruned already stays so if ``keep_masked(masks)`` is chained too.

    A leaf counts as one kernel. Where it is a stack of layers ``[layers, d_in, d_out]``, ``per="output"`` with
    ``in_axes={path: (1,)}`` keeps every layer's outputs apart.

    Args:
      schedule: how sparse after how many updates, see `jprune.train.schedules`.
      score: importance of a kernel's elements: `scores.magnitude`, `scores.wanda`, or a function of yours.
      every: updates between two choices of masks.
      per: where scores compete: in the whole kernel, or among the inputs of each output.
      where: regular expressions over paths; a leaf is pruned if one is found in its path.
      skip: regular expressions; a leaf in whose path one is found is left alone.
      in_axes: the input axes of kernels by path, or what `jprune.matmuls` returns; needed for ``per="output"`` where no
        statistic tells which axes are inputs, or others would fit it as well.

    Returns:
      A transformation whose ``update(updates, state, params, statistics=...)`` needs the parameters and, for a score of
      two arguments, an array ``[d_in, ...]`` for the path of each kernel. They are read at the steps that are due only.
      All can be jitted, and the state sharded.

    Raises:
      JpruneError: `every` is below 1; in ``init``, a filter finds nothing, a leaf is of no floats or by `in_axes` of
        several kernels, or which of its axes are inputs is not known; in ``update``, parameters or statistics are
        missing.
    """
    if every < 1:
        raise JpruneError(f"masks are chosen anew every 1 or more steps, got {every}")
    if per == "block":
        raise JpruneError('per="block" is for SparseGPT, which sees a kernel block by block; use "output" or "kernel"')
    reads_statistic = _required(score) > 1
    said = places.given(() if in_axes is None else in_axes)
    matrix_axes = functools.partial(_input_axes, said, needed=per == "output" and not reads_statistic)

    def init(params: PyTree) -> GradualState:
        leaves = trees.flatten(params)
        chosen = trees.choose(leaves, where, skip)
        for path in chosen:
            trees.check_floating(leaves[path], path)
            matrix_axes(path, leaves[path].shape, None)
        return GradualState(jnp.int32(0), {path: pack(jnp.ones(leaves[path].shape, bool)) for path in chosen})

    def update(
        updates: PyTree,
        state: GradualState,
        params: PyTree | None = None,
        *,
        statistics: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> tuple[PyTree, GradualState]:
        del others  # of other transformations in the chain
        if params is None:
            raise JpruneError("gradual needs the parameters: call update(updates, state, params)")
        given = dict(statistics or {}) if reads_statistic else {}
        if reads_statistic and (missing := [path for path in state.masks if path not in given]):
            raise JpruneError(
                f"{missing[0]}: the score reads a statistic; call update(updates, state, params, statistics=...) with "
                "one for the path of each kernel"
            )
        leaves = trees.flatten(params)

        def choose(packed: UInt8[Array, "..."], path: str) -> UInt8[Array, "..."]:
            kernel = leaves[path]
            axes = matrix_axes(path, kernel.shape, given.get(path))
            matrix = trees.to_matrix(kernel, axes)
            keep: Bool[Array, "d_in d_out"] = trees.to_matrix(unpack(packed, kernel.shape), axes)
            importance = score(matrix, given[path]) if reads_statistic else score(matrix)
            count = schedule.zeros(state.step, len(matrix) if per == "output" else matrix.size)
            mask = masks.without_lowest(importance, count, per=per, keep=keep)
            return pack(trees.from_matrix(mask, kernel.shape, axes))

        chosen = lax.cond(
            schedule.due(state.step, every),
            lambda before: {path: choose(packed, path) for path, packed in before.items()},
            lambda before: before,
            state.masks,
        )
        return to_zero(updates, params, chosen), GradualState(optax.safe_increment(state.step), chosen)

    return optax.GradientTransformationExtraArgs(init, update)


def _input_axes(
    said: Mapping[str, Sequence[Place]], path: str, shape: tuple[int, ...], statistic: Any, *, needed: bool
) -> tuple[int, ...]:
    """The input axes of a leaf: as somebody says, or else read from its statistic and Flax's layout."""
    if path in said:
        first, *others = said[path]
        if others or first.part is not None or first.shape is not None:
            raise JpruneError(f"expected `in_axes` of whole leaves, got {first}; gradual prunes no parts: leave it out")
        return first.in_axes
    if statistic is None and needed:
        raise JpruneError(
            f"{path}: which axes of shape {shape} are inputs? Give in_axes={{{path!r}: (0,)}} if it is the first, or "
            "in_axes=jprune.matmuls(...)"
        )
    return trees.leading_axes(shape, None if statistic is None else len(statistic), path)


def _required(score: Score) -> int:
    """How many arguments a score asks for."""
    parameters = inspect.signature(score).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
