"""The loop of SparseGPT over blocks of inputs; equations and names are those of `jprune.solvers.sparsegpt`.

Loops are `lax` loops of fixed shape: compile time does not grow with d_in. A super-block is a number of blocks that
share one matmul with all earlier blocks (`_super_block`); a block is solved from its weights after all earlier ones
(`_block`), in groups of rows that are eliminated one by one (`eliminate`). Kernels lie side by side, as columns.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jprune import masks
from jprune.annotations import Array, Bool, Float, Int, Shaped
from jprune.solvers.pruned import Pruned

_GROUP = 16
"""Rows eliminated one by one before the rest of their block is brought up to date with one matmul."""
_SUPER = (3, 4, 5, 6)
"""Numbers of blocks that may share one matmul with all earlier blocks; what pads d_in least is taken."""


class Factor(NamedTuple):
    """The factorised, damped Gram matrix of one input. Serves every kernel that reads it."""

    upper: Float[Array, "d_in d_in"]
    """R, upper triangular, R R^T = H + damping. NaN if H was not finite or not positive definite."""
    dead: Bool[Array, "d_in"]
    """Inputs that were zero for every token."""
    damping: Float[Array, ""]
    """The damping that was needed, relative to the mean of the diagonal."""


class Kind(NamedTuple):
    """How a kernel's mask comes about; static."""

    d_out: int
    nm: tuple[int, int] | None = None
    per_output: bool = False
    given: bool = False


class _Sizes(NamedTuple):
    """What the loop is compiled for."""

    d_in: int
    block: int
    many: int
    """Blocks of a super-block."""
    kinds: tuple[Kind, ...]
    pieces: int
    """See `_join`."""


class _Problem(NamedTuple):
    """The arrays of a sweep, padded to whole super-blocks."""

    weights: Float[Array, "supers size d_out"]
    upper: Float[Array, "supers size d_padded"]
    """R, its rows by super-block."""
    allowed: Bool[Array, "d_padded d_out"] | None
    """What may be kept, or the mask itself for kernels whose mask is given."""
    quotas: Int[Array, "blocks kernels"]
    """Zeros to choose in each block, per output or per kernel."""


def block_count(d_in: int, block: int) -> int:
    """Number of blocks d_in is padded to: a multiple of one of `_SUPER`."""
    blocks = -(-d_in // block)
    return min(-(-blocks // s) * s for s in _SUPER) if blocks > _SUPER[-1] else blocks


def pruning_scores(weights: Float[Array, "n d_out"], diagonal: Float[Array, "n"]) -> Float[Array, "n d_out"]:
    """|w_i| / U_ii, the square root of the loss of pruning w_i; `diagonal` holds 1 / U_ii."""
    return jnp.abs(weights) * diagonal[:, None]


@functools.partial(jax.jit, static_argnames=("kinds", "block", "pieces"))
def sweep_blocks(
    kernels: tuple[Float[Array, "d_in _"], ...],
    factor: Factor,
    given: tuple[Bool[Array, "d_in _"] | None, ...],
    quotas: Int[Array, "blocks kernels"],
    kinds: tuple[Kind, ...],
    block: int,
    pieces: int,
) -> tuple[Pruned, ...]:
    """Prunes kernels that read one input.

    Args:
      kernels: weights.
      factor: of their input's Gram matrix.
      given: masks of the kernels whose mask is given; what may be kept in others, None for everything.
      quotas: zeros to choose in each block, per output or per kernel.
      kinds: how each kernel's mask is chosen.
      block: inputs of a block.
      pieces: see `_join`.
    """
    d_in, blocks = len(factor.upper), len(quotas)
    many = max((s for s in _SUPER if blocks % s == 0), default=blocks)
    sizes = _Sizes(d_in, block, many, kinds, pieces)
    problem = _padded(kernels, factor, given, quotas, sizes)
    step = functools.partial(_super_block, problem, sizes)
    _, (pruned, keep, loss) = lax.scan(step, jnp.zeros_like(problem.weights), jnp.arange(blocks // many))
    d_out = problem.weights.shape[-1]
    pruned = pruned.reshape(-1, d_out)[:d_in]
    keep = keep.reshape(-1, d_out)[:d_in]
    losses = jnp.sum(loss, axis=(0, 1))
    own = functools.partial(_part, kinds=kinds, pieces=pieces)
    return tuple(
        Pruned(own(pruned, i=i).astype(old.dtype), own(keep, i=i), jnp.sum(own(losses, i=i)))
        for i, old in enumerate(kernels)
    )


def _padded(
    kernels: tuple[Float[Array, "d_in _"], ...],
    factor: Factor,
    given: tuple[Bool[Array, "d_in _"] | None, ...],
    quotas: Int[Array, "blocks kernels"],
    sizes: _Sizes,
) -> _Problem:
    size, whole = sizes.many * sizes.block, len(quotas) * sizes.block
    padding = whole - sizes.d_in
    weights = _join([k.astype(jnp.float32) for k in kernels], sizes.pieces)
    weights = jnp.where(factor.dead[:, None], 0.0, weights)
    # Padding inputs are independent of all others (identity in the factor), zero, and never chosen.
    weights = jnp.pad(weights, ((0, padding), (0, 0))).reshape(-1, size, weights.shape[1])
    upper = jnp.pad(factor.upper, (0, padding)) + jnp.diag((jnp.arange(whole) >= sizes.d_in).astype(jnp.float32))
    allowed = None
    if any(g is not None for g in given):
        all_given = [jnp.ones(k.shape, bool) if g is None else g for g, k in zip(given, kernels)]
        allowed = jnp.pad(_join(all_given, sizes.pieces), ((0, padding), (0, 0)), constant_values=True)
    return _Problem(weights, upper.reshape(-1, size, whole), allowed, quotas)


def _super_block(
    problem: _Problem, sizes: _Sizes, changed: Float[Array, "supers size d_out"], s: Int[Array, ""]
) -> tuple[Float[Array, "supers size d_out"], tuple[Array, Array, Array]]:
    """One super-block; `changed` is D, the change of all earlier inputs."""
    size, d_out = problem.weights.shape[1:]
    columns = lax.dynamic_slice_in_dim(problem.upper, s * size, size, axis=2)

    def accumulate(i, total):
        return total + _transposed_matmul(columns[i], changed[i])

    old = problem.weights[s]
    pull = lax.fori_loop(0, s, accumulate, jnp.zeros((size, d_out), jnp.float32))

    def one_block(changed_here, b):
        start = b * sizes.block
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=sizes.block)
        rows = here(columns[s], axis=1)
        before = here(pull) + _transposed_matmul(rows, changed_here)
        pruned, keep, loss = _block(problem, sizes, here(old), before, here(rows), s * sizes.many + b)
        changed_here = lax.dynamic_update_slice_in_dim(changed_here, here(old) - pruned, start, axis=0)
        return changed_here, (pruned, keep, loss)

    changed_here, result = lax.scan(one_block, jnp.zeros_like(old), jnp.arange(sizes.many))
    return lax.dynamic_update_index_in_dim(changed, changed_here, s, axis=0), result


def _block(
    problem: _Problem,
    sizes: _Sizes,
    old: Float[Array, "block d_out"],
    before: Float[Array, "block d_out"],
    diagonal_block: Float[Array, "block block"],
    number: Int[Array, ""],
) -> tuple[Float[Array, "block d_out"], Bool[Array, "block d_out"], Float[Array, "d_out"]]:
    """One block; `before` is R_Pb^T D_P, what earlier inputs ask of its weights, and `diagonal_block` R_bb."""
    block, first = sizes.block, number * sizes.block
    inverse = lax.linalg.triangular_solve(
        diagonal_block, jnp.eye(block, dtype=jnp.float32), left_side=True, lower=False
    )
    return eliminate(
        old + _transposed_matmul(inverse, before),
        inverse,
        None if problem.allowed is None else lax.dynamic_slice_in_dim(problem.allowed, first, block),
        problem.quotas[number],
        jnp.arange(block) + first < sizes.d_in,
        sizes.kinds,
        sizes.pieces,
    )


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
      pieces: see `_join`.

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
        rows = here(weights) - _transposed_matmul(columns, errors)
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
        own = _part(scores, kinds, i, pieces)
        if kind.given:
            assert allowed is not None
            keeps.append(_part(allowed, kinds, i, pieces))
        elif kind.per_output:
            keeps.append(~masks.smallest(own, quotas[i]))
        else:
            keeps.append(~masks.smallest_of_all(own, quotas[i]))
    keep = _join(keeps, pieces)
    return keep if allowed is None else keep & allowed


def _transposed_matmul(a: Float[Array, "k i"], b: Float[Array, "k j"]) -> Float[Array, "i j"]:
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _join(matrices: Sequence[Array], pieces: int) -> Array:
    """Matrices side by side. Where their columns lie in pieces on devices, those of one device are brought together,
    and none is moved: the first piece of every matrix, then the second of every matrix, and so on."""
    cut = [x.reshape(len(x), pieces, -1) for x in matrices]
    return jnp.concatenate(cut, axis=2).reshape(len(matrices[0]), -1)


def _part(joined: Shaped[Array, "*rows d_out"], kinds: Sequence[Kind], i: int, pieces: int) -> Array:
    """The columns of one of the matrices that were joined."""
    start, count = sum(kind.d_out for kind in kinds[:i]) // pieces, kinds[i].d_out
    rows = joined.shape[:-1]
    return joined.reshape(*rows, pieces, -1)[..., start : start + count // pieces].reshape(*rows, count)
