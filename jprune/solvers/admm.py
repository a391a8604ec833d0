"""ADMM pruning: a fixed strength, one inverse, and a mask that closes step by step.

Boža 2024, *Fast and Effective Weight Update for Pruned Large Language Models*, https://arxiv.org/abs/2401.02938. The
iteration is that of `jprune.solvers.splitting` with rho = 1. In the first three quarters of T iterations fewer elements
are pruned than the pattern asks for: in the t-th, the share 1 - (1 - t / (3/4 T))^3 of its zeros, the least important
ones. In the end conjugate gradients solve for the weights of the mask that came of it (`jprune.solvers.refit`).

With rho = 1, masks of inputs that have nothing to do with each other stand: y is w for what is kept and for what is
pruned. With less it is larger where it is pruned, and masks go back and forth.

Deviations from the authors' code:
- Exact counts, and ties settled by position.
- The mask closes gradually for every pattern: of the elements that the pattern would prune, the largest stay for a
  while. Theirs does that for 2:4, and takes the final sparsity at once where a kernel is pruned as a whole.
- Damping is SparseGPT's, a share of the mean diagonal of the Gram matrix; theirs is 0.1 of each entry.
- The last weights are those of conjugate gradients, and not of one more iteration.
- Dead inputs, and elements that were pruned before, are treated as by SparseGPT here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jprune import masks
from jprune.annotations import Array, Bool, Float, Int, Shaped
from jprune.patterns import Pattern
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import check_factor, factorise
from jprune.solvers.splitting import Scope, improved, inverse, scaled, select, solve

RHO = 1.0


def admm(
    kernel: Shaped[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    pattern: Pattern,
    *,
    keep: Bool[Array, "d_in d_out"] | None = None,
    damping: float = 0.01,
    iterations: int = 20,
    refit: int = 10,
) -> Pruned:
    """Prunes a kernel and updates what is left to keep its outputs.

    Args:
      kernel: weights, any float dtype; solved in float32. Those of dead inputs count as zero from the start.
      gram: sum over the calibration tokens of x x^T (any positive multiple of it gives the same result).
      pattern: any; weights compete in the whole kernel if it does not say.
      keep: where False, the element was pruned before, stays zero, and is among the zeros asked for.
      damping: share of the mean diagonal added to the diagonal. Where the factorisation fails it is raised tenfold,
        at most twice.
      iterations: T.
      refit: steps of conjugate gradients at the end.

    Returns:
      `Pruned`, with the loss as `jprune.solvers.refit` has it.

    Raises:
      JpruneError: as `jprune.solvers.sparsegpt`.
    """
    factor = factorise(gram, damping)
    check_factor(factor, gram, "kernel")
    find = functools.partial(find_masks, iterations=iterations)
    name = "kernel"
    return solve({name: kernel}, gram, factor.damping, {name: pattern}, {name: keep}, find, steps=refit)[name]


@functools.partial(jax.jit, static_argnames="scopes")
def find_masks(
    kernels: tuple[Float[Array, "d_in _"], ...],
    gram: Float[Array, "d_in d_in"],
    damping: Float[Array, ""],
    counts: tuple[Int[Array, ""], ...],
    keeps: tuple[Bool[Array, "d_in _"], ...],
    scopes: tuple[Scope, ...],
    iterations: Int[Array, ""] | int,
) -> tuple[tuple[Bool[Array, "d_in _"], ...], tuple[Float[Array, "d_in _"], ...]]:
    """Masks of kernels that read one input, and weights under them; see `jprune.solvers.splitting.solve`."""
    problem = scaled(kernels, gram, damping)
    rho = jnp.float32(RHO)
    p = inverse(problem.matrix, rho)
    rules = list(zip(scopes, counts, keeps, strict=True))
    closing = 0.75 * jnp.asarray(iterations, jnp.float32)

    def step(t: Int[Array, ""], ys: tuple[Array, ...]) -> tuple[Array, ...]:
        left = jnp.maximum(1 - (t.astype(jnp.float32) + 1) / closing, 0.0)
        zs = [gradual(y, 1 - left**3, *each) for y, each in zip(ys, rules, strict=True)]
        return tuple(improved(p, pull, z, rho * (y - z), rho) for pull, z, y in zip(problem.pulls, zs, ys, strict=True))

    ys = lax.fori_loop(0, iterations, step, problem.weights)
    found = tuple(select(jnp.abs(y), *each) for y, each in zip(ys, rules, strict=True))
    return found, tuple(jnp.where(m, y, 0.0) / problem.scale[:, None] for m, y in zip(found, ys, strict=True))


def gradual(
    y: Float[Array, "d_in d_out"],
    share: Float[Array, ""],
    scope: Scope,
    count: Int[Array, ""],
    keep: Bool[Array, "d_in d_out"],
) -> Float[Array, "d_in d_out"]:
    """y without that share of what the pattern would prune now, and without all that was pruned before."""
    size = jnp.abs(y)
    if scope == "kernel":  # the smallest of what the pattern would prune are the smallest of all
        before = jnp.sum(~keep)
        number = before + _share(share, jnp.maximum(count - before, 0))
        return jnp.where(masks.without_lowest(size, number, per="kernel", keep=keep), y, 0.0)
    going = keep & ~select(size, scope, count, keep)
    gone = masks.smallest_of_all(jnp.where(going, size, jnp.inf), _share(share, jnp.sum(going)))
    return jnp.where(keep & ~gone, y, 0.0)


def _share(share: Float[Array, ""], number: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.round(share * number.astype(jnp.float32)).astype(jnp.int32)
