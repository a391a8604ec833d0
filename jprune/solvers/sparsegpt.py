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
for several blocks at a time. Within a block the errors are eliminated as in the paper, in groups of rows. That loop is
in `jprune.solvers._sweep`.

Deviations from the authors' code (methods that differ only in rounding are not listed):
- Exact counts. They threshold with `<=` at the k-th score and prune k + 1 elements per block, and all ties.
- H is a sum, not 2/n times a sum: the result does not depend on its scale.
- Dead inputs (H_ii = 0) get the mean of the live diagonal instead of 1, so that damping is not diluted by them. Their
  weights become zero, as in the original, before anything else: that costs nothing, and the loss does not count it.
  Where all are dead, the whole kernel becomes zero.
- With `keep`, elements pruned before stay zero; the original revives them.
- d_in need not be a multiple of the block size, also for N:M.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune import devices, evidence, masks
from jprune.annotations import Array, Bool, Float, Int, Shaped
from jprune.errors import JpruneError
from jprune.patterns import Pattern, known
from jprune.solvers._eliminate import Kind, pruning_scores
from jprune.solvers._sweep import Factor, block_count, sweep_blocks
from jprune.solvers.damped import live
from jprune.solvers.pruned import Pruned
from jprune.statistics import Gram
from jprune.trees import check_floating


def sparsegpt(
    kernel: Shaped[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    pattern: Pattern | Bool[Array, "d_in d_out"],
    *,
    keep: Bool[Array, "d_in d_out"] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> Pruned:
    """Prunes a kernel and updates what is left to keep its outputs.

    Args:
      kernel: weights, any float dtype; solved in float32. Those of dead inputs count as zero from the start.
      gram: sum over the calibration tokens of x x^T (any positive multiple of it gives the same result).
      pattern: `Unstructured` (compared per block of `block_size` inputs unless it says otherwise), `NM`, any other
        pattern, or a mask that is taken as it is (True = keep), so that only the weights are solved for. A pattern
        without a schedule gives its mask once, from the weights as they are.
      keep: where False, the element was pruned before and stays zero. Blocks in which more were than their share of
        the pattern get no more, and the others as many fewer, so that the count of the kernel is exact. (Not so with
        `per="output"`, where an output may end with more zeros than asked for.)
      damping: share of the mean diagonal added to the diagonal. Where the factorisation fails it is raised tenfold,
        at most twice.
      block_size: inputs whose mask is chosen together.

    Returns:
      `Pruned` with loss 1/2 tr(D^T H D), D = new - old weights and H the damped Gram matrix. What dead inputs lose is
      not in it: such inputs had no part in any output, so that D counts as zero there.

    Raises:
      JpruneError: the kernel's dtype is no float; the pattern does not fit d_in, or is none; the Gram matrix is not
        finite, has a negative diagonal or cannot be factorised (not raised under `jax.jit`, where the result is NaN).
    """
    factor = factorise(gram, damping)
    check_factor(factor, gram, "kernel")
    return sweep([kernel], factor, [pattern], [keep], block_size=block_size)[0]


@jax.jit
def factorise(gram: Float[Array, "d_in d_in"], damping: Float[Array, ""] | float) -> Factor:
    """Damps and factorises a Gram matrix; raises the damping tenfold, at most twice, until that succeeds.

    One that is not finite, or whose diagonal is negative somewhere, gives NaN.
    """
    gram = gram.astype(jnp.float32)
    dead, mean = live(gram)
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
    evidence.check(Gram(gram, jnp.int32(1)), where)
    diagonal = np.diagonal(np.asarray(gram))
    live = diagonal[diagonal > 0]
    raise JpruneError(
        f"{where}: the Gram matrix of its inputs is not positive definite even with damping {float(factor.damping):g} "
        f"(its diagonal spans {live.min():.2g} to {live.max():.2g}); use more calibration tokens or a higher damping"
    )


def sweep(
    kernels: Sequence[Shaped[Array, "d_in _"]],
    factor: Factor,
    patterns: Sequence[Any],
    keeps: Sequence[Bool[Array, "d_in _"] | None] | None = None,
    *,
    block_size: int = 128,
) -> list[Pruned]:
    """Prunes kernels that read the same input side by side, each by its own pattern or mask; see `sparsegpt`.

    Outputs are independent, so the result is that of one call a kernel, in fewer and larger steps.
    """
    for kernel in kernels:
        check_floating(kernel, "kernel")
    keeps = [None] * len(kernels) if keeps is None else keeps
    groups: dict[tuple[int, int] | None, list[int]] = {}
    for i, (kernel, pattern) in enumerate(zip(kernels, patterns, strict=True)):
        # Different M need different block boundaries, different N other counts.
        groups.setdefault(_nm(pattern, kernel.shape, block_size), []).append(i)
    results: dict[int, Pruned] = {}
    for nm, members in groups.items():
        block = block_size if nm is None else max(block_size // nm[1], 1) * nm[1]
        args = [_prepare(kernels[i], factor, patterns[i], keeps[i], block) for i in members]
        kinds, given, quotas = zip(*args)
        matrices = tuple(kernels[i] for i in members)
        pieces = devices.pieces_of_columns(matrices)
        solved = sweep_blocks(matrices, factor, given, jnp.stack(quotas, 1), kinds, block, pieces)
        results |= dict(zip(members, solved, strict=True))
    return [results[i] for i in range(len(kernels))]


def _nm(pattern: Any, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
    """(n, m) of a pattern that keeps n of every m inputs of each output; None of all others, and of masks."""
    if isinstance(pattern, jax.Array | np.ndarray):
        return None
    d_in, d_out = shape
    schedule = known(pattern).schedule(d_in, d_out, block)
    if schedule is None or not schedule.grouped:
        return None
    return schedule.size - schedule.zeros[0], schedule.size


def _prepare(
    kernel: Float[Array, "d_in d_out"],
    factor: Factor,
    pattern: Any,
    keep: Bool[Array, "d_in d_out"] | None,
    block: int,
) -> tuple[Kind, Array | None, Array | np.ndarray]:
    """Static kind, the mask that comes with it (given, or what may be kept), and zeros to choose in each block."""
    d_in, d_out = kernel.shape
    quotas = np.zeros(block_count(d_in, block), np.int32)
    if isinstance(pattern, jax.Array | np.ndarray):
        mask = jnp.asarray(pattern)
        return Kind(d_out, given=True), mask if keep is None else mask & keep, quotas
    pattern = known(pattern)
    schedule = pattern.schedule(d_in, d_out, block)
    if schedule is None:
        # Chosen once for the whole kernel, so from the weights as they are; then only solved for.
        live = jnp.where(factor.dead[:, None], 0.0, kernel.astype(jnp.float32))
        scores = pruning_scores(live, jnp.diagonal(factor.upper))
        return Kind(d_out, given=True), masks.select(scores, pattern, keep=keep), quotas
    if schedule.grouped:
        return Kind(d_out, nm=(schedule.size - schedule.zeros[0], schedule.size)), keep, quotas
    if schedule.size != block:
        raise JpruneError(
            f"{pattern}: SparseGPT chooses zeros for {block} inputs at once, and the pattern's schedule has slices of "
            f"{schedule.size}; let it have slices of the size asked for, or groups, or no schedule"
        )
    quotas[: len(schedule.zeros)] = schedule.zeros
    if schedule.per_output or keep is None:
        return Kind(d_out, per_output=schedule.per_output), keep, quotas
    return Kind(d_out), keep, _quotas_beside(keep, quotas, block)


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
