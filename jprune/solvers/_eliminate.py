"""Within a block of SparseGPT: its mask, and the elimination of its rows, in groups; see `jprune.solvers._sweep`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jprune import masks
from jprune.annotations import Array, Bool, Float, Int, Shaped

_GROUP = 16
"""Rows eliminated one by one before the rest of their block is brought up to date with one matmul."""
_LENGTHS = 8
"""Of how many lengths a matmul with what is done may be."""


class Kind(NamedTuple):
    """How a kernel's mask comes about; static."""

    d_out: int
    nm: tuple[int, int] | None = None
    per_output: bool = False
    given: bool = False


def pruning_scores(weights: Float[Array, "n d_out"], diagonal: Float[Array, "n"]) -> Float[Array, "n d_out"]:
    """|w_i| / U_ii, the square root of the loss of pruning w_i; `diagonal` holds 1 / U_ii."""
    return jnp.abs(weights) * diagonal[:, None]


def eliminate(
    weights: Float[Array, "block d_out"],
    inverse: Float[Array, "block block"],
    allowed: Bool[Array, "block d_out"] | None,
    quotas: Int[Array, "kernels"],
    real: Bool[Array, "block"],
    kinds: tuple[Kind, ...],
    pieces: int,
) -> tuple[Float[Array, "block d_out"], Bool[Array, "block d_out"], Float[Array, "d_out"]]:
    """Chooses the mask of one block and prunes it row by row.

    Args:
      weights: the block's weights after all earlier blocks.
      inverse: U_bb, the block of U on the diagonal.
      allowed: what may be kept, or the mask itself for kernels whose mask is given.
      quotas: zeros to choose in the block, per output or per kernel.
      real: False for padding.
      kinds: how each kernel's mask is chosen.
      pieces: see `join`.

    Returns:
      Pruned weights, mask, and loss of every output.
    """
    block, d_out = weights.shape
    scale = 1 / jnp.diagonal(inverse)
    nm = kinds[0].nm
    chosen_together = nm[1] if nm else 1
    most = max(1, _GROUP // chosen_together)
    size = chosen_together * next(k for k in range(most, 0, -1) if block // chosen_together % k == 0)

    # N:M is chosen on the way, from weights that make up for all inputs before; else the whole block is chosen here.
    keep = jnp.ones(weights.shape, bool) if allowed is None else allowed
    if not nm:
        keep = _choose(weights, scale, allowed, quotas, real, kinds, pieces)

    def group(errors, j):
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=j * size, slice_size=size)
        columns = here(inverse, axis=1)
        parts = _Group(jnp.triu(here(columns), 1), here(scale), here(real)[:, None])
        rows = here(weights) - of_first(j, block // size, size, columns, errors)
        state = rows, jnp.zeros((size, d_out), jnp.float32), here(keep)
        if nm:
            step = functools.partial(_choose_and_eliminate, parts, *nm)
        else:
            step = functools.partial(_eliminate_row, parts)
        rows, errors_here, keep_here = lax.fori_loop(0, size // chosen_together, step, state)
        errors = lax.dynamic_update_slice_in_dim(errors, errors_here, j * size, axis=0)
        return errors, (jnp.where(keep_here, rows, 0.0), keep_here)

    errors, (pruned, keep) = lax.scan(group, jnp.zeros_like(weights), jnp.arange(block // size))
    loss = 0.5 * jnp.sum(jnp.square(errors), axis=0)
    return pruned.reshape(weights.shape), keep.reshape(weights.shape), loss


class _Group(NamedTuple):
    """What a group of rows needs of U, and which of its rows are no padding."""

    square: Float[Array, "rows rows"]
    scale: Float[Array, "rows"]
    real: Bool[Array, "rows 1"]


_Rows = tuple[Array, Array, Array]
"""Weights of a group after the rows that are done, errors of those rows, and the mask."""


def _eliminate_row(group: _Group, i: Int[Array, ""] | int, state: _Rows) -> _Rows:
    rows, errors, keep = state
    error = jnp.where(keep[i], 0.0, rows[i]) * group.scale[i]
    rows = rows - group.square[i][:, None] * error
    return rows, lax.dynamic_update_index_in_dim(errors, error, i, axis=0), keep


def _choose_and_eliminate(group: _Group, n: int, m: int, i: Int[Array, ""] | int, state: _Rows) -> _Rows:
    """Chooses n of the next m rows to keep, and then eliminates these rows."""
    rows, errors, allowed = state
    first = i * m
    scores = jnp.where(allowed, pruning_scores(rows, group.scale), -jnp.inf)
    best = masks.keep_n_of_m(lax.dynamic_slice_in_dim(scores, first, m), n, m)
    best &= lax.dynamic_slice_in_dim(allowed, first, m)
    best |= ~lax.dynamic_slice_in_dim(group.real, first, m)
    keep = lax.dynamic_update_slice_in_dim(allowed, best, first, axis=0)
    return lax.fori_loop(first, first + m, functools.partial(_eliminate_row, group), (rows, errors, keep))


def _choose(
    weights: Float[Array, "block d_out"],
    scale: Float[Array, "block"],
    allowed: Bool[Array, "block d_out"] | None,
    quotas: Int[Array, "kernels"],
    real: Bool[Array, "block"],
    kinds: tuple[Kind, ...],
    pieces: int,
) -> Bool[Array, "block d_out"]:
    """The mask of a block from its weights, for every kernel that has not been given one."""
    scores = pruning_scores(weights, scale)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    scores = jnp.where(real[:, None], scores, jnp.inf)
    keeps = []
    for i, kind in enumerate(kinds):
        own = part(scores, kinds, i, pieces)
        if kind.given:
            assert allowed is not None
            keeps.append(part(allowed, kinds, i, pieces))
        elif kind.per_output:
            keeps.append(~masks.smallest(own, quotas[i]))
        else:
            keeps.append(~masks.smallest_of_all(own, quotas[i]))
    keep = join(keeps, pieces)
    return keep if allowed is None else keep & allowed


def transposed_matmul(a: Float[Array, "k i"], b: Float[Array, "k j"]) -> Float[Array, "i j"]:
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def of_first(
    n: Int[Array, ""], most: int, size: int, a: Float[Array, "k i"], b: Float[Array, "k j"]
) -> Float[Array, "i j"]:
    """a^T b where only the first `n` of `most` times `size` rows of b are not zero.

    A CPU takes one of a few matmuls, with little more than those rows; elsewhere choosing costs more than it saves.
    """
    if jax.default_backend() != "cpu":
        return transposed_matmul(a, b)
    each = -(-most // _LENGTHS)
    counts = [min(k * each, most) * size for k in range(-(-(most - 1) // each) + 1)]
    first = [functools.partial(lambda count, a, b: transposed_matmul(a[:count], b[:count]), count) for count in counts]
    return lax.switch((n + each - 1) // each, first, a, b)


def join(matrices: Sequence[Array], pieces: int) -> Array:
    """Matrices side by side. Where their columns lie in pieces on devices, those of one device are brought together,
    and none is moved: the first piece of every matrix, then the second of every matrix, and so on."""
    cut = [x.reshape(len(x), pieces, -1) for x in matrices]
    return jnp.concatenate(cut, axis=2).reshape(len(matrices[0]), -1)


def part(joined: Shaped[Array, "*rows d_out"], kinds: Sequence[Kind], i: int, pieces: int) -> Array:
    """The columns of one of the matrices that were joined."""
    start, count = sum(kind.d_out for kind in kinds[:i]) // pieces, kinds[i].d_out
    if pieces == 1:  # the reshapes below would make XLA copy all of it
        return joined[..., start : start + count]
    rows = joined.shape[:-1]
    return joined.reshape(*rows, pieces, -1)[..., start : start + count // pieces].reshape(*rows, count)
