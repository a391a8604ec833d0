"""How much a unit matters: LLM-Pruner's criteria (Ma, Fang and Wang 2023, https://arxiv.org/abs/2305.11627).

With a weight w, the gradient g of the mean loss and the mean a of the squared gradients of single examples (the
diagonal of the Fisher information, for that of the Hessian), a unit's removal changes the loss by about

    param_first   sum |w g|                     each weight by itself, first order
    param_second  sum |w a w|                   second order
    param_mix     sum |w g - w a w / 2|         both
    vectorize     sum over channels |sum w g|   the weights of a channel together

l1 and l2 are sum |w| and sum w^2 (no root), random is random. All go the same way: what a kernel's weights say is
summed over the side of the kernel that the unit is not on (`vectorize` takes |.| after this sum, the others before),
which leaves a number for each channel; these are combined across the kernels channel by channel, and summed to units.

A KV head has head_dim channels in k and v, and those of all of its query heads in q and o. The latter are summed over
the query heads first: seen as [kv_heads, queries, head_dim] they are summed over `queries`. The authors' program sums
over the first axis of [queries, kv_heads * head_dim], which are mostly query heads of other KV heads, and so prunes
heads for the importance of others.

Weights count wherever units lie, but biases do not, as in the authors' program: kernels in blocks, and also norms and
the embedding for the hidden dimension.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.annotations import Array, Float, Float64
from jprune.errors import JpruneError
from jprune.structured.units import Units

PyTree = Any
Reduction = Literal["sum", "mean", "max", "prod", "first", "last"]
Criterion = Literal["param_first", "param_second", "param_mix", "vectorize", "l1", "l2"]
"""The names in `CRITERIA`."""


class Formula(NamedTuple):
    """What each weight contributes to the score of its unit."""

    contribution: Callable[[Array, Array, Array], Array]
    """Number of each weight, before |.|, from the weight, its gradient and its mean squared gradient."""
    needs: tuple[Literal["gradient", "square"], ...] = ()
    """What must be there beside the weight."""
    together: bool = False
    """Whether |.| is taken of the sum over a channel, and not of each number."""
    reduction: Reduction = "sum"
    """How the kernels of a unit are put together unless asked for otherwise."""


CRITERIA: dict[str, Formula] = {
    "param_first": Formula(lambda w, g, a: w * g, ("gradient",)),
    "param_second": Formula(lambda w, g, a: w * a * w, ("square",)),
    "param_mix": Formula(lambda w, g, a: w * g - 0.5 * w * a * w, ("gradient", "square")),
    "vectorize": Formula(lambda w, g, a: w * g, ("gradient",), together=True),
    "l1": Formula(lambda w, g, a: jnp.abs(w), reduction="mean"),
    "l2": Formula(lambda w, g, a: w * w, reduction="mean"),
}
"""All criteria. A new one is one entry here, and its name above."""

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda kernels: kernels.sum(0),
    "mean": lambda kernels: kernels.mean(0),
    "max": lambda kernels: kernels.max(0),
    "prod": lambda kernels: kernels.prod(0),
    "first": lambda kernels: kernels[0],
    "last": lambda kernels: kernels[-1],
}
"""From the kernels, in the order of their matmuls, to one number for each channel."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def channels(
    criterion: Criterion,
    side: tuple[int, ...],
    kernel: Float[Array, "..."],
    gradient: Float[Array, "..."] | None = None,
    square: Float[Array, "..."] | None = None,
) -> Float[Array, " channels"]:
    """What the weights of each channel say, float32.

    Args:
      criterion: which one.
      side: the axes of the kernel that number the channels; flattened they are the result's axis.
      kernel: the weights, in any precision.
      gradient: of the mean loss; for param_first, param_mix and vectorize.
      square: the mean of examples' squared gradients; for param_second and param_mix.

    Raises:
      JpruneError: a gradient is missing.
    """
    formula = CRITERIA[criterion]
    if ("gradient" in formula.needs and gradient is None) or ("square" in formula.needs and square is None):
        raise JpruneError(f"{criterion} needs gradients (and their squares): see `mean_and_square`")
    w, g, a = (jnp.zeros(()) if x is None else x.astype(jnp.float32) for x in (kernel, gradient, square))
    salience = trees.to_matrix(formula.contribution(w, g, a), side)
    if formula.together:
        return jnp.abs(jnp.sum(salience, axis=1))
    return jnp.sum(jnp.abs(salience), axis=1)


Vectors = dict[int, Float64[np.ndarray, "count width"]]
"""By the index of a member of units: the importance of each channel of each unit there."""


def vectors(
    units: Units,
    criterion: Criterion,
    params: PyTree,
    gradients: PyTree | None = None,
    squares: PyTree | None = None,
    *,
    prefix: str = "",
) -> Vectors:
    """What the parameters at hand say of units: one small array a kernel, after which kernels and gradients can go.

    For units whose members lie in many blocks, call it for one block after the other and put the results together:
    ``collected |= vectors(hidden, ..., prefix="blocks/3")``. `combine` needs them all.

    Args:
      units: which.
      criterion: which.
      params: all parameters, or some, as one block's.
      gradients: of the mean loss, in a tree like that of the parameters.
      squares: the mean of the examples' squared gradients, in such a tree.
      prefix: of the paths in these trees, to make them the paths of the units' members.

    Returns:
      For each member among the parameters an array [count, width]: what the channels of each unit say.
    """
    by_path = [{} if tree is None else trees.flatten(tree) for tree in (params, gradients, squares)]
    kernels, *_ = by_path = [{f"{prefix}/{p}" if prefix else p: x for p, x in leaves.items()} for leaves in by_path]
    found: Vectors = {}
    for i, member in enumerate(units.members):
        if not member.counted or member.path not in kernels:
            continue
        if (shape := kernels[member.path].shape) != member.shape:
            raise JpruneError(f"{member.path}: the units are those of shape {member.shape}, the parameter's is {shape}")
        given = jax.tree.map(jnp.asarray, [leaves.get(member.path) for leaves in by_path])
        flat = np.asarray(channels(criterion, member.side, *given), np.float64)
        found[i] = flat[member.channels]
    return found


def combine(
    units: Units, collected: Mapping[int, np.ndarray], reduction: Reduction = "sum"
) -> Float64[np.ndarray, " count"]:
    """The importance of each unit, from what `vectors` found in all of its members.

    Channel by channel, the kernels' numbers are reduced to one; a unit's is the sum of its channels'.

    Raises:
      JpruneError: some member's numbers are missing.
    """
    if missing := [m.path for i, m in enumerate(units.members) if m.counted and i not in collected]:
        raise JpruneError(f"{units.name}: nothing was collected from {', '.join(missing)}")
    width = min(array.shape[1] for array in collected.values())
    if odd := [i for i, array in collected.items() if array.shape[1] % width]:
        path = units.members[odd[0]].path
        raise JpruneError(
            f"{units.name}: {collected[odd[0]].shape[1]} channels of {path} cannot be folded onto {width}"
        )
    # The channels of a KV head in q are [queries, head_dim].
    folded = [collected[i].reshape(units.count, -1, width).sum(1) for i in sorted(collected)]
    return REDUCTIONS[reduction](np.stack(folded)).sum(1)


def random(units: Units, seed: int) -> Float64[np.ndarray, " count"]:
    """Uniform in [0, 1): the same for the same name, count and seed, whatever else is drawn."""
    return np.random.default_rng([seed, zlib.crc32(units.name.encode())]).random(units.count)


def mean_and_square(
    loss: Callable[[PyTree, Any], Float[Array, ""]], params: PyTree, examples: PyTree, *, squares: bool = True
) -> tuple[PyTree, PyTree | None]:
    """The gradient of the mean loss, and the mean of the examples' squared gradients; float32, one example at a time.

    Args:
      loss: of the parameters and one example.
      params: any pytree of floating-point arrays.
      examples: a pytree of arrays with a leading axis of n examples.
      squares: whether they are wanted; else None comes back for them.
    """
    n = jax.tree.leaves(examples)[0].shape[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def add(sums: tuple[PyTree, PyTree | None], example: PyTree) -> tuple[tuple[PyTree, PyTree | None], None]:
        mean, square = sums
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(params, example))
        mean = jax.tree.map(lambda total, g: total + g / n, mean, gradient)
        if squares:
            square = jax.tree.map(lambda total, g: total + g * g / n, square, gradient)
        return (mean, square), None

    return jax.lax.scan(add, (zeros, zeros if squares else None), examples)[0]


@jax.jit
def block_influence(x: Float[Array, "*tokens d_model"], y: Float[Array, "*tokens d_model"]) -> Float[Array, ""]:
    """1 - the mean cosine similarity of what enters a block and what leaves it (Men et al. 2024, arXiv:2403.03853).

    The mean goes over all tokens. 0 for a block that changes no direction; a zero vector is like none.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    cosines = jnp.sum(x * y, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    return 1 - jnp.mean(cosines)
