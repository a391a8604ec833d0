"""SparseGPT: prune column by column and let the columns to come make up for it.

Frantar and Alistarh 2023 (https://arxiv.org/abs/2301.00774). For one kernel W with inputs x, Gram matrix H = sum x x^T
(damped), and inputs taken in order, pruning element w_i of an output costs w_i^2 / U_ii^2 and moves the remaining
inputs by -w_i/U_ii U_i, where U is upper triangular with U^T U = H^{-1}. Everything here is in Flax layout: a column
of the paper is a contiguous row, one input of all outputs.

The authors invert H and factorise the inverse. Neither is needed. Let R = U^{-1}: it is the factor R R^T = H with R
upper triangular, the Cholesky factor of H with its axes reversed. Write D = W_old - Q for what has been changed so
far and E_i = (w_i - q_i) / U_ii for the scaled errors of the paper. Then W_old - Q = U^T E, so E = R^T D, and the
weights of a block b after all earlier blocks P were pruned are

    W_b = W_old_b + U_bb^T R_Pb^T D_P          with U_bb = R_bb^{-1}, a 128 x 128 inverse.

So one Cholesky factorisation of H is all that is factorised, and the bulk of the work is the matmul R_Pb^T D_P, done
for `_SUPER` blocks at a time. Within a block the errors are eliminated as in the paper, in groups of rows. Loops are
`lax` loops of fixed shape: compile time does not grow with d_in.

Deviations from the authors' code (methods that differ only in rounding are not listed):
- Exact counts. They threshold with `<=` at the k-th score and prune k + 1 elements per block, and all ties.
- H is a sum, not 2/n times a sum: the result does not depend on its scale.
- Dead inputs (H_ii = 0) get the mean of the live diagonal instead of 1, so that damping is not diluted by them. Their
  weights become zero, as in the original.
- With `keep`, elements pruned before stay zero; the original revives them.
- d_in need not be a multiple of the block size, also for N:M.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jprune import devices, masks
from jprune.errors import JpruneError
from jprune.patterns import NM, Pattern, Unstructured
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


def sparsegpt(
    kernel: Float[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    pattern: Pattern | Bool[Array, "d_in d_out"],
    *,
    keep: Bool[Array, "d_in d_out"] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> Pruned:
    """Prunes a kernel and updates what is left to keep its outputs.

    Args:
      kernel: weights, any float dtype; solved in float32.
      gram: sum over the calibration tokens of x x^T (any positive multiple of it gives the same result).
      pattern: `Unstructured` (compared per block of `block_size` inputs unless it says otherwise), `NM`, or a mask that
        is taken as it is (True = keep), so that only the weights are solved for.
      keep: where False, the element was pruned before and stays zero. Blocks in which more were than their share of
        the pattern get no more, and the others as many fewer, so that the count of the kernel is exact. (Not so with
        `per="output"`, where an output may end with more zeros than asked for.)
      damping: share of the mean diagonal added to the diagonal. Where the factorisation fails it is raised tenfold,
        at most twice.
      block_size: inputs whose mask is chosen together.

    Returns:
      `Pruned` with loss 1/2 tr(D^T H D), D = new - old weights and H the damped Gram matrix.

    Raises:
      JpruneError: N:M does not divide d_in; the Gram matrix is not finite or cannot be factorised (not raised under
        `jax.jit`, where the result is NaN instead).
    """
    factor = factorise(gram, damping)
    check_factor(factor, gram, "kernel")
    return sweep([kernel], factor, [pattern], [keep], block_size=block_size)[0]


@jax.jit
def factorise(gram: Float[Array, "d_in d_in"], damping: Float[Array, ""] | float) -> Factor:
    """Damps and factorises a Gram matrix; raises the damping tenfold, at most twice, until that succeeds."""
    gram = gram.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1.0)
    # Reversed axes: the lower Cholesky factor of the reversed matrix, reversed back, is the upper R with R R^T = H.
    reversed_gram = gram[::-1, ::-1]
    filled = jnp.where(dead, mean, 0.0)[::-1]

    def attempt(state):
        tries, _ = state
        added = filled + damping * 10.0 ** tries.astype(jnp.float32) * mean
        lower = lax.linalg.cholesky(reversed_gram + jnp.diag(added), symmetrize_input=False)
        return tries + 1, lower

    def failed(state):
        tries, lower = state
        return (tries < 3) & ~jnp.isfinite(lower[-1, -1])

    start = jnp.int32(0), jnp.full(gram.shape, jnp.nan, jnp.float32)
    tries, lower = lax.while_loop(failed, attempt, start)
    return Factor(lower[::-1, ::-1], dead, damping * 10.0 ** (tries - 1).astype(jnp.float32))


def check_factor(factor: Factor, gram: Float[Array, "d_in d_in"], where: str) -> None:
    """Raises a `JpruneError` that names `where` if the factorisation failed, and says why; nothing under a trace."""
    if isinstance(factor.upper, jax.core.Tracer) or np.isfinite(factor.upper[0, 0]):
        return
    values = np.asarray(gram)
    if not np.isfinite(values).all():
        raise JpruneError(
            f"{where}: the Gram matrix of its inputs has NaN or inf in {int((~np.isfinite(values)).any(0).sum())} of "
            f"{len(values)} inputs; the activations overflow before this kernel: use a wider dtype or check the weights"
        )
    diagonal = np.diagonal(values)
    live = diagonal[diagonal > 0]
    raise JpruneError(
        f"{where}: the Gram matrix of its inputs is not positive definite even with damping {float(factor.damping):g} "
        f"(its diagonal spans {live.min():.2g} to {live.max():.2g}); use more calibration tokens or a higher damping"
    )


class _Kind(NamedTuple):
    """How a kernel's mask comes about; static."""

    d_out: int
    nm: tuple[int, int] | None = None
    per_output: bool = False
    given: bool = False


def sweep(
    kernels: Sequence[Float[Array, "d_in _"]],
    factor: Factor,
    patterns: Sequence[Pattern | Bool[Array, "d_in _"]],
    keeps: Sequence[Bool[Array, "d_in _"] | None] | None = None,
    *,
    block_size: int = 128,
) -> list[Pruned]:
    """Prunes kernels that read the same input side by side, each by its own pattern; see `sparsegpt`.

    Outputs are independent, so the result is that of one call a kernel, in fewer and larger steps.
    """
    keeps = [None] * len(kernels) if keeps is None else keeps
    groups: dict[NM | None, list[int]] = {}
    for i, pattern in enumerate(patterns):  # different m need different block boundaries, different n other counts
        groups.setdefault(pattern if isinstance(pattern, NM) else None, []).append(i)
    results: dict[int, Pruned] = {}
    for nm, members in groups.items():
        block = block_size if nm is None else max(block_size // nm.m, 1) * nm.m
        args = [_prepare(kernels[i], factor, patterns[i], keeps[i], block) for i in members]
        kinds, given, quotas = zip(*args)
        matrices = tuple(kernels[i] for i in members)
        pieces = devices.pieces_of_columns(matrices)
        solved = _sweep(matrices, factor, given, jnp.stack(quotas, 1), kinds, block, pieces)
        results |= dict(zip(members, solved, strict=True))
    return [results[i] for i in range(len(kernels))]


def _prepare(kernel, factor, pattern, keep, block) -> tuple[_Kind, Array | None, Array | np.ndarray]:
    """Static kind, the mask that comes with it (given, or what may be kept), and zeros to choose in each block."""
    d_in, d_out = kernel.shape
    ends = np.minimum(np.arange(_blocks(d_in, block) + 1) * block, d_in)
    kind = _Kind(d_out)
    match pattern:
        case NM(n, m):
            pattern.check(d_in)
            kind, quota = kind._replace(nm=(n, m)), ends * 0
        case Unstructured(per="kernel"):
            # Chosen once for the whole kernel, so from the weights as they are; then only solved for.
            live = jnp.where(factor.dead[:, None], 0.0, kernel.astype(jnp.float32))
            scores = _scores(live, jnp.diagonal(factor.upper))
            keep, kind, quota = masks.select(scores, pattern, keep=keep), kind._replace(given=True), ends * 0
        case Unstructured(sparsity, "output"):
            kind, quota = kind._replace(per_output=True), [int(e * sparsity) for e in ends]
        case Unstructured(sparsity):
            quota = [int(e * d_out * sparsity) for e in ends]
            if keep is not None:
                return kind, keep, _quotas_beside(keep, np.diff(quota), block)
        case _:
            keep = pattern if keep is None else pattern & keep
            kind, quota = kind._replace(given=True), ends * 0
    return kind, keep, np.diff(np.asarray(quota)).astype(np.int32)


def _quotas_beside(keep: Bool[Array, "d_in d_out"], quotas: np.ndarray, block: int) -> Int[Array, "blocks"]:
    """Zeros of each block, those that were pruned before included, that add up to the sum of `quotas` if they can.

    What blocks with too many old zeros have too much, the others prune less, each by the same share of its new zeros.
    """
    padded = jnp.pad(~keep, ((0, len(quotas) * block - len(keep)), (0, 0)))
    old = jnp.sum(padded.reshape(len(quotas), -1), axis=1, dtype=jnp.int32)
    new = jnp.maximum(jnp.asarray(quotas, jnp.int32) - old, 0)
    wanted = jnp.maximum(int(quotas.sum()) - jnp.sum(old), 0)
    reached = jnp.cumsum(new)
    share = wanted.astype(jnp.float32) / jnp.maximum(reached[-1], 1).astype(jnp.float32)
    # Cumulatively, so that roundings do not add up; and the last sum exactly, where float32 may not be.
    ends = jnp.minimum(jnp.round(reached.astype(jnp.float32) * share).astype(jnp.int32), wanted)
    ends = jnp.where(reached == reached[-1], wanted, ends)
    ends = jnp.where(wanted == reached[-1], reached, ends)
    return old + jnp.diff(ends, prepend=jnp.int32(0))


def _blocks(d_in: int, block: int) -> int:
    """Number of blocks d_in is padded to: a multiple of one of `_SUPER`."""
    blocks = -(-d_in // block)
    return min(-(-blocks // s) * s for s in _SUPER) if blocks > _SUPER[-1] else blocks


def _scores(weights, diagonal):
    """|w_i| / U_ii, the square root of the loss of pruning w_i."""
    return jnp.abs(weights) * diagonal[:, None]


def _transposed_matmul(a: Float[Array, "k i"], b: Float[Array, "k j"]) -> Float[Array, "i j"]:
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _join(matrices: Sequence[Array], pieces: int) -> Array:
    """Matrices side by side. Where their columns lie in pieces on devices, those of one device are brought together,
    and none is moved: the first piece of every matrix, then the second of every matrix, and so on."""
    cut = [x.reshape(len(x), pieces, -1) for x in matrices]
    return jnp.concatenate(cut, axis=2).reshape(len(matrices[0]), -1)


def _part(joined: Shaped[Array, "*rows d_out"], kinds: Sequence[_Kind], i: int, pieces: int) -> Array:
    """The columns of one of the matrices that were joined."""
    start, count = sum(kind.d_out for kind in kinds[:i]) // pieces, kinds[i].d_out
    rows = joined.shape[:-1]
    return joined.reshape(*rows, pieces, -1)[..., start : start + count // pieces].reshape(*rows, count)


@functools.partial(jax.jit, static_argnames=("kinds", "block", "pieces"))
def _sweep(
    kernels: tuple[Float[Array, "d_in _"], ...],
    factor: Factor,
    given: tuple[Bool[Array, "d_in _"] | None, ...],
    quotas: Int[Array, "blocks kernels"],
    kinds: tuple[_Kind, ...],
    block: int,
    pieces: int,
) -> tuple[Pruned, ...]:
    d_in = len(factor.upper)
    blocks = len(quotas)
    many = max((s for s in _SUPER if blocks % s == 0), default=blocks)
    padding = blocks * block - d_in
    super_size = many * block

    weights = _join([k.astype(jnp.float32) for k in kernels], pieces)
    weights = jnp.where(factor.dead[:, None], 0.0, weights)
    d_out = weights.shape[1]
    # Padding inputs are independent of all others (identity in the factor), zero, and never chosen.
    weights = jnp.pad(weights, ((0, padding), (0, 0))).reshape(-1, super_size, d_out)
    upper = jnp.pad(factor.upper, (0, padding)) + jnp.diag((jnp.arange(blocks * block) >= d_in).astype(jnp.float32))
    upper = upper.reshape(-1, super_size, blocks * block)
    may_keep = None
    if any(g is not None for g in given):
        all_given = [jnp.ones(k.shape, bool) if g is None else g for g, k in zip(given, kernels)]
        may_keep = jnp.pad(_join(all_given, pieces), ((0, padding), (0, 0)), constant_values=True)

    def super_block(changed, s):
        """`changed` is D, the change of all earlier inputs."""
        columns = lax.dynamic_slice_in_dim(upper, s * super_size, super_size, axis=2)

        def accumulate(i, total):
            return total + _transposed_matmul(columns[i], changed[i])

        old = weights[s]
        pull = lax.fori_loop(0, s, accumulate, jnp.zeros((super_size, d_out), jnp.float32))

        def one_block(changed_here, b):
            start = b * block
            rows = lax.dynamic_slice_in_dim(columns[s], start, block, axis=1)
            diagonal_block = lax.dynamic_slice_in_dim(rows, start, block)
            before = lax.dynamic_slice_in_dim(pull, start, block) + _transposed_matmul(rows, changed_here)
            old_here = lax.dynamic_slice_in_dim(old, start, block)
            inverse = lax.linalg.triangular_solve(
                diagonal_block, jnp.eye(block, dtype=jnp.float32), left_side=True, lower=False
            )
            here = s * super_size + start
            allowed = None if may_keep is None else lax.dynamic_slice_in_dim(may_keep, here, block)
            pruned, keep, loss = _eliminate(
                old_here + _transposed_matmul(inverse, before),
                inverse,
                allowed,
                quotas[s * many + b],
                jnp.arange(block) + here < d_in,
                kinds,
                pieces,
            )
            changed_here = lax.dynamic_update_slice_in_dim(changed_here, old_here - pruned, start, axis=0)
            return changed_here, (pruned, keep, loss)

        changed_here, result = lax.scan(one_block, jnp.zeros_like(old), jnp.arange(many))
        return lax.dynamic_update_index_in_dim(changed, changed_here, s, axis=0), result

    _, (pruned, keep, loss) = lax.scan(super_block, jnp.zeros_like(weights), jnp.arange(blocks // many))
    pruned = pruned.reshape(-1, d_out)[:d_in]
    keep = keep.reshape(-1, d_out)[:d_in]
    losses = jnp.sum(loss, axis=(0, 1))
    own = functools.partial(_part, kinds=kinds, pieces=pieces)
    return tuple(
        Pruned(own(pruned, i=i).astype(old.dtype), own(keep, i=i), jnp.sum(own(losses, i=i)))
        for i, old in enumerate(kernels)
    )


def _eliminate(
    weights: Float[Array, "block d_out"],
    inverse: Float[Array, "block block"],
    allowed: Bool[Array, "block d_out"] | None,
    quotas: Int[Array, "kernels"],
    real: Bool[Array, "block"],
    kinds: tuple[_Kind, ...],
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
    n, chosen_together = nm or (0, 1)
    most = max(1, _GROUP // chosen_together)
    size = chosen_together * next(k for k in range(most, 0, -1) if block // chosen_together % k == 0)

    # N:M is chosen on the way, from weights that make up for all inputs before; else the whole block is chosen here.
    keep = jnp.ones(weights.shape, bool) if allowed is None else allowed
    if not nm:
        keep = _choose(weights, scale, allowed, quotas, real, kinds, pieces)

    def group(errors, j):
        start = j * size

        def here(x):
            return lax.dynamic_slice_in_dim(x, start, size)

        columns = lax.dynamic_slice_in_dim(inverse, start, size, axis=1)
        square = jnp.triu(here(columns), 1)
        scale_here, real_here = here(scale), here(real)[:, None]

        def row(i, state):
            rows, errors_here, keep_here = state
            error = jnp.where(keep_here[i], 0.0, rows[i]) * scale_here[i]
            rows = rows - square[i][:, None] * error
            return rows, lax.dynamic_update_index_in_dim(errors_here, error, i, axis=0), keep_here

        def choose_and_eliminate(i, state):
            rows, errors_here, allowed_here = state
            first = i * chosen_together
            scores = jnp.where(allowed_here, _scores(rows, scale_here), -jnp.inf)
            best = masks.keep_n_of_m(lax.dynamic_slice_in_dim(scores, first, chosen_together), n, chosen_together)
            best &= lax.dynamic_slice_in_dim(allowed_here, first, chosen_together)
            best |= ~lax.dynamic_slice_in_dim(real_here, first, chosen_together)
            keep_here = lax.dynamic_update_slice_in_dim(allowed_here, best, first, axis=0)
            return lax.fori_loop(first, first + chosen_together, row, (rows, errors_here, keep_here))

        rows = here(weights) - _transposed_matmul(columns, errors)
        state = rows, jnp.zeros((size, d_out), jnp.float32), here(keep)
        if nm:
            state = lax.fori_loop(0, size // chosen_together, choose_and_eliminate, state)
        else:
            state = lax.fori_loop(0, size, row, state)
        rows, errors_here, keep_here = state
        errors = lax.dynamic_update_slice_in_dim(errors, errors_here, start, axis=0)
        return errors, (jnp.where(keep_here, rows, 0.0), keep_here)

    errors, (pruned, keep) = lax.scan(group, jnp.zeros_like(weights), jnp.arange(block // size))
    loss = 0.5 * jnp.sum(jnp.square(errors), axis=0)
    return pruned.reshape(weights.shape), keep.reshape(weights.shape), loss


def _choose(weights, scale, allowed, quotas, real, kinds, pieces):
    """The mask of a block from its weights, for every kernel that has not been given one."""
    scores = _scores(weights, scale)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    scores = jnp.where(real[:, None], scores, jnp.inf)
    keeps = []
    for i, kind in enumerate(kinds):
        own = _part(scores, kinds, i, pieces)
        if kind.given:
            keeps.append(_part(allowed, kinds, i, pieces))
        elif kind.per_output:
            keeps.append(~masks.smallest(own, quotas[i]))
        else:
            keeps.append(~masks.smallest_of_all(own, quotas[i]))
    keep = _join(keeps, pieces)
    return keep if allowed is None else keep & allowed
