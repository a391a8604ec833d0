"""The loop of SparseGPT over blocks of inputs; equations and names are those of `jprune.solvers.sparsegpt`.

Loops are `lax` loops of fixed shape: compile time does not grow with d_in. A super-block is a number of blocks that
share one matmul with all earlier blocks (`_super_block`); a block is solved from its weights after all earlier ones
(`_block`), in groups of rows that are eliminated one by one (`eliminate`). Kernels lie side by side, as columns; they
are read block by block, since fresh memory for copies of all of them took a CPU a fifth of the sweep.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jprune.annotations import Array, Bool, Float, Int, Shaped
from jprune.solvers._eliminate import Kind, eliminate, join, of_first, part, transposed_matmul
from jprune.solvers.pruned import Pruned

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


class _Sizes(NamedTuple):
    """What the loop is compiled for."""

    d_in: int
    block: int
    many: int
    """Blocks of a super-block."""
    kinds: tuple[Kind, ...]
    pieces: int
    """See `join`."""


class _Problem(NamedTuple):
    """The arrays of a sweep."""

    kernels: tuple[Float[Array, "d_in _"], ...]
    given: tuple[Bool[Array, "d_in _"] | None, ...]
    """What may be kept, or the mask itself for kernels whose mask is given."""
    dead: Bool[Array, "d_padded"]
    upper: Float[Array, "supers size d_padded"]
    """R, padded to whole super-blocks, its rows by super-block."""
    quotas: Int[Array, "blocks kernels"]
    """Zeros to choose in each block, per output or per kernel."""


def block_count(d_in: int, block: int) -> int:
    """Number of blocks d_in is padded to: a multiple of one of `_SUPER`."""
    blocks = -(-d_in // block)
    return min(-(-blocks // s) * s for s in _SUPER) if blocks > _SUPER[-1] else blocks


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
      pieces: see `join`.
    """
    d_in, blocks = len(factor.upper), len(quotas)
    many = max((s for s in _SUPER if blocks % s == 0), default=blocks)
    sizes = _Sizes(d_in, block, many, kinds, pieces)
    dead = _padded(factor.dead, blocks * block)
    problem = _Problem(kernels, given, dead, _padded_upper(factor, sizes, blocks), quotas)
    d_out = sum(kernel.shape[1] for kernel in kernels)
    changed = jnp.zeros((blocks // many, many * block, d_out), jnp.float32)
    step = functools.partial(_super_block, problem, sizes)
    changed, (keep, loss) = lax.scan(step, changed, jnp.arange(blocks // many))
    changed, keep = (x.reshape(-1, d_out)[:d_in] for x in (changed, keep))
    losses = jnp.sum(loss, axis=(0, 1))
    own = functools.partial(part, kinds=kinds, pieces=pieces)

    def result(i: int, old: Array) -> Pruned:
        mask = own(keep, i=i)
        new = jnp.where(mask & ~factor.dead[:, None], old.astype(jnp.float32) - own(changed, i=i), 0.0)
        return Pruned(new.astype(old.dtype), mask, jnp.sum(own(losses, i=i)))

    return tuple(result(i, old) for i, old in enumerate(kernels))


def _padded(x: Shaped[Array, "d_in *rest"], size: int) -> Shaped[Array, "size *rest"]:
    return jnp.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)))


def _padded_upper(factor: Factor, sizes: _Sizes, blocks: int) -> Float[Array, "supers size d_padded"]:
    """Padding inputs are independent of all others: identity in the factor."""
    whole = blocks * sizes.block
    padding = (0, whole - sizes.d_in)
    upper = jnp.pad(factor.upper, padding) + jnp.diag((jnp.arange(whole) >= sizes.d_in).astype(jnp.float32))
    return upper.reshape(-1, sizes.many * sizes.block, whole)


def _of_block(matrix: Shaped[Array, "d_in d_out"], number: Int[Array, ""], block: int) -> Shaped[Array, "block d_out"]:
    """The rows of a block, zeros where it is padding; no copy of the matrix is padded for it."""
    last, over = divmod(len(matrix) - 1, block)
    end = _padded(matrix[last * block :], block)
    if not last:
        return end  # further blocks are padding, and what stands there means nothing
    here = lax.dynamic_slice_in_dim(matrix, jnp.minimum(number * block, len(matrix) - block), block)
    return here if over == block - 1 else jnp.where(number < last, here, end)


def _super_block(
    problem: _Problem, sizes: _Sizes, changed: Float[Array, "supers size d_out"], s: Int[Array, ""]
) -> tuple[Float[Array, "supers size d_out"], tuple[Array, Array]]:
    """One super-block; `changed` is D, the change of all earlier inputs."""
    size, d_out = changed.shape[1:]
    columns = lax.dynamic_slice_in_dim(problem.upper, s * size, size, axis=2)

    def accumulate(i, total):
        return total + transposed_matmul(columns[i], changed[i])

    pull = lax.fori_loop(0, s, accumulate, jnp.zeros((size, d_out), jnp.float32))

    def one_block(changed_here, b):
        start = b * sizes.block
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=sizes.block)
        rows = here(columns[s], axis=1)
        before = here(pull) + of_first(b, sizes.many, sizes.block, rows, changed_here)
        change, keep, loss = _block(problem, sizes, before, here(rows), s * sizes.many + b)
        return lax.dynamic_update_slice_in_dim(changed_here, change, start, axis=0), (keep, loss)

    changed_here, result = lax.scan(one_block, jnp.zeros((size, d_out), jnp.float32), jnp.arange(sizes.many))
    return lax.dynamic_update_index_in_dim(changed, changed_here, s, axis=0), result


def _block(
    problem: _Problem,
    sizes: _Sizes,
    before: Float[Array, "block d_out"],
    diagonal_block: Float[Array, "block block"],
    number: Int[Array, ""],
) -> tuple[Float[Array, "block d_out"], Bool[Array, "block d_out"], Float[Array, "d_out"]]:
    """The change of one block, its mask, and losses; `before` is R_Pb^T D_P, what earlier inputs ask of its weights,
    and `diagonal_block` R_bb."""
    block, first = sizes.block, number * sizes.block
    inverse = lax.linalg.triangular_solve(
        diagonal_block, jnp.eye(block, dtype=jnp.float32), left_side=True, lower=False
    )
    real = jnp.arange(block) + first < sizes.d_in
    old = join([_of_block(kernel, number, block).astype(jnp.float32) for kernel in problem.kernels], sizes.pieces)
    # Padding is zero and never chosen; dead inputs are zero before anything else.
    old = jnp.where((real & ~lax.dynamic_slice_in_dim(problem.dead, first, block))[:, None], old, 0.0)
    pruned, keep, loss = eliminate(
        old + transposed_matmul(inverse, before),
        inverse,
        _allowed(problem, sizes, number, real),
        problem.quotas[number],
        real,
        sizes.kinds,
        sizes.pieces,
    )
    return old - pruned, keep, loss


def _allowed(
    problem: _Problem, sizes: _Sizes, number: Int[Array, ""], real: Bool[Array, "block"]
) -> Bool[Array, "block d_out"] | None:
    """What may be kept in a block, or the mask itself for kernels whose mask is given; None for everything."""
    if all(given is None for given in problem.given):
        return None
    masks_here = [
        jnp.ones((sizes.block, kind.d_out), bool) if given is None else _of_block(given, number, sizes.block)
        for given, kind in zip(problem.given, sizes.kinds)
    ]
    return join(masks_here, sizes.pieces) | ~real[:, None]
