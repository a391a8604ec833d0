"""ALPS: ADMM whose strength rises until the mask stands, and then the best weights under it.

Meng, Behdin, Wang and Mazumder 2024, *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models*, https://arxiv.org/abs/2406.07831. The iteration is that of `jprune.solvers.splitting`. While rho is small,
masks change much; while it rises, they settle. Every three iterations a kernel's mask is compared with that of three
before; when nothing changes any more, or little after thirty, it is done. In the end conjugate gradients solve for the
weights of the mask (`jprune.solvers.refit`).

Deviations from the authors' code:
- rho rises by 1.3 every time. Theirs rises by 1.3, 1.2 or 1.1, depending on how much the mask of the kernel changes:
  kernels that read one input would need inverses of their own. Losses are the same within one per cent.
- An explicit inverse by a Cholesky factorisation for every rho, in float32, and no eigenvalues in float64.
- Exact counts, ties settled by position: what is settled stays so.
- Dead inputs, and elements that were pruned before, are treated as by SparseGPT here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jprune.annotations import Array, Bool, Float, Int, Shaped
from jprune.patterns import Pattern
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import check_factor, factorise
from jprune.solvers.splitting import Scope, improved, inverse, scaled, select, solve

FIRST_RHO, GROWTH, EVERY = 0.1, 1.3, 3
SETTLED, AFTER = 3e-4, 30
"""The share of the mask that may still change, after so many iterations."""
USUAL = 33
"""Iterations until masks of language models settle, as it was measured."""


def alps(
    kernel: Shaped[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    pattern: Pattern,
    *,
    keep: Bool[Array, "d_in d_out"] | None = None,
    damping: float = 0.01,
    iterations: int = 300,
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
      iterations: at most.
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


class _State(NamedTuple):
    """Of one kernel; see `jprune.solvers.splitting`."""

    z: Float[Array, "d_in d_out"]
    v: Float[Array, "d_in d_out"]
    mask: Bool[Array, "d_in d_out"]
    settled: Bool[Array, ""]


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
    rules = list(zip(scopes, counts, keeps, strict=True))

    def begun(weights: Array, rule: tuple) -> _State:
        mask = select(jnp.abs(weights), *rule)
        return _State(jnp.where(mask, weights, 0.0), jnp.zeros_like(weights), mask, jnp.bool_(False))

    def going_on(state: tuple) -> Array:
        t, _, states = state
        return (t < iterations) & ~jnp.all(jnp.stack([s.settled for s in states]))

    def more(state: tuple) -> tuple:
        t, rho, states = state
        p, late = inverse(problem.matrix, rho), t + EVERY >= AFTER
        each = zip(states, problem.pulls, rules, strict=True)
        # One that has settled stays, whoever is solved beside it.
        new = [
            lax.cond(s.settled, lambda s: s, functools.partial(_iterate, p, pull, rho, late, rule), s)
            for s, pull, rule in each
        ]
        return t + EVERY, rho * GROWTH, tuple(new)

    first = tuple(begun(*each) for each in zip(problem.weights, rules, strict=True))
    _, _, states = lax.while_loop(going_on, more, (jnp.int32(0), jnp.float32(FIRST_RHO), first))
    return tuple(s.mask for s in states), tuple(s.z / problem.scale[:, None] for s in states)


def _iterate(
    p: Float[Array, "d_in d_in"],
    pull: Float[Array, "d_in d_out"],
    rho: Float[Array, ""],
    late: Bool[Array, ""],
    rule: tuple[Scope, Int[Array, ""], Bool[Array, "d_in d_out"]],
    before: _State,
) -> _State:
    """One kernel after some more iterations with one rho."""

    def once(_: Array, state: _State) -> _State:
        y = improved(p, pull, state.z, state.v, rho)
        mask = select(jnp.abs(y), *rule)
        z = jnp.where(mask, y, 0.0)
        return _State(z, rho * (y - z), mask, state.settled)

    after = lax.fori_loop(0, EVERY, once, before)
    changed = jnp.sum(after.mask != before.mask).astype(jnp.float32)
    few = changed < SETTLED * jnp.sum(after.mask).astype(jnp.float32)
    return after._replace(settled=(changed == 0) | (late & few))
