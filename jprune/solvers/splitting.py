"""The alternating direction method of multipliers for the pruning problem, as ALPS and ADMM pruning share it.

Minimise 1/2 tr((W - V)^T H (W - V)) over V under a pattern, by two copies of V: one that is free and lowers the loss,
one that satisfies the pattern, and a multiplier that draws them together with strength rho (Boyd et al. 2011). Kernels
that read one input share H, and all that is made of it.

Everything is scaled to a unit diagonal, A = H / (d d^T) with d = sqrt(diag H) and O = d W, where the size of a weight
is the damage of removing it alone: the nearest point under the pattern then keeps what Wanda's scores say. With P = (A
+ rho I)^-1 and y the sum of the free copy and the multiplier over rho, an iteration is

    z = y within the mask of the largest |y|, else 0;   v = rho (y - z);   b = P (A O - v + rho z);   y = b + v / rho

so y is all that goes from one iteration to the next (rho may be another then, and v is what stays).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune import masks
from jprune.annotations import Array, Bool, Float, Int, Shaped
from jprune.patterns import NM, Pattern, Unstructured, known
from jprune.solvers.damped import damped
from jprune.solvers.pruned import Pruned
from jprune.solvers.refit import refit
from jprune.trees import check_floating


class Scaled(NamedTuple):
    """The problem of kernels that read one input, with a unit diagonal."""

    matrix: Float[Array, "d_in d_in"]
    """A."""
    scale: Float[Array, "d_in"]
    """d."""
    weights: tuple[Float[Array, "d_in _"], ...]
    """O, of each kernel; zero for dead inputs, of which nothing is known."""
    pulls: tuple[Float[Array, "d_in _"], ...]
    """A O."""


def scaled(
    kernels: Sequence[Float[Array, "d_in _"]], gram: Float[Array, "d_in d_in"], damping: Float[Array, ""]
) -> Scaled:
    """The problem of some kernels."""
    matrix, known = damped(gram, damping)
    scale = jnp.sqrt(jnp.diagonal(matrix))
    matrix = matrix / (scale[:, None] * scale[None, :])
    weights = tuple(jnp.where(known.dead[:, None], 0.0, scale[:, None] * x.astype(jnp.float32)) for x in kernels)
    return Scaled(matrix, scale, weights, tuple(product(matrix, x) for x in weights))


def inverse(matrix: Float[Array, "d_in d_in"], rho: Float[Array, ""]) -> Float[Array, "d_in d_in"]:
    """P. Never badly conditioned: the diagonal of A is 1, and rho at least a tenth."""
    identity = jnp.eye(len(matrix), dtype=jnp.float32)
    lower = lax.linalg.cholesky(matrix + rho * identity, symmetrize_input=False)
    half = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return product(half.T, half)


def product(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """A matmul in full float32."""
    return jnp.matmul(a, b, precision="highest")


def improved(
    p: Float[Array, "d_in d_in"],
    pull: Float[Array, "d_in d_out"],
    z: Float[Array, "d_in d_out"],
    v: Float[Array, "d_in d_out"],
    rho: Float[Array, ""],
) -> Float[Array, "d_in d_out"]:
    """The next y of one kernel."""
    return product(p, pull - v + rho * z) + v / rho


Scope = Literal["output", "kernel"] | int | Pattern
"""Where the elements of a mask compete: an output's, a kernel's, those of m inputs, or as a pattern says."""


class Rule(NamedTuple):
    """A pattern as compiled loops take it: numbers are arguments, so that one program serves all sparsities."""

    scope: Scope
    """Static."""
    number: int
    """Zeros of each output or of the kernel; of m inputs, how many are kept."""


def rule(pattern: Any, d_in: int, d_out: int) -> Rule:
    """The rule of a pattern; scores compete in the whole kernel where it leaves that open.

    Raises:
      JpruneError: it is no pattern, or does not fit.
    """
    pattern = known(pattern).among("kernel")
    pattern.check(d_in)
    match pattern:
        case NM(n=n, m=m):
            return Rule(m, n)
        case Unstructured(per="output"):
            return Rule("output", pattern.zeros(d_in, 1))
        case Unstructured(per="kernel"):
            return Rule("kernel", pattern.zeros(d_in, d_out))
    return Rule(pattern, 0)


def select(
    scores: Float[Array, "d_in d_out"], scope: Scope, count: Int[Array, ""], keep: Bool[Array, "d_in d_out"]
) -> Bool[Array, "d_in d_out"]:
    """The mask of the highest scores, see `jprune.masks.select`."""
    match scope:
        case int(m):
            return keep & masks.keep_n_of_m(jnp.where(keep, scores, -jnp.inf), count, m)
        case str(per):
            return masks.without_lowest(scores, count, per=per, keep=keep)
    return scope.select(scores, keep)


Find = Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]
"""(kernels, gram, damping, counts, keeps, scopes, ...) -> masks, and weights under them that are to be refitted. It is
compiled; `scopes` is static."""


def solve(
    kernels: Mapping[str, Shaped[Array, "d_in _"]],
    gram: Float[Array, "d_in d_in"],
    damping: Float[Array, ""],
    patterns: Mapping[str, Any],
    keeps: Mapping[str, Bool[Array, "d_in _"] | None],
    find: Find,
    *,
    steps: int,
) -> dict[str, Pruned]:
    """Prunes kernels that read one input side by side: finds their masks, and solves for the weights under them.

    Args:
      kernels: weights, by name.
      gram: of their input, checked.
      damping: share of its mean diagonal that is added to its diagonal.
      patterns: of each kernel.
      keeps: where False, the element was pruned before and stays zero; what is missing, or None, is everything.
      find: how masks are found.
      steps: of conjugate gradients, at the end.
    """
    for name, kernel in kernels.items():
        check_floating(kernel, name)
    rules = [rule(patterns[name], *kernel.shape) for name, kernel in kernels.items()]
    # A mask of ones costs a byte an element, and saves a program.
    given = {name: jnp.ones(x.shape, bool) if keeps.get(name) is None else keeps[name] for name, x in kernels.items()}
    found, starts = find(
        tuple(kernels.values()),
        gram,
        damping,
        tuple(np.int32(each.number) for each in rules),
        tuple(given.values()),
        scopes=tuple(each.scope for each in rules),
    )
    return {
        name: refit(kernel, gram, mask, start, steps=steps, damping=damping, where=name)
        for (name, kernel), mask, start in zip(kernels.items(), found, starts, strict=True)
    }
