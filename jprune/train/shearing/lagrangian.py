"""The Lagrangian of LLM-Shearing: how expected sizes are drawn to a target, as an Optax transformation.

For each kind of unit (layers, hidden dimensions, heads, feed-forward channels), with the expected share of units that
go ``s`` of each row (each layer has a row of heads), and the share that is to go ``t`` (arXiv:2310.06694, section 2.1,
in the form of the authors' program):

    penalty = sum over kinds of  mean over rows of  m1 (s - t) + m2 (s - t)^2

The masks' log alpha descends on it and the multipliers m1 and m2, which begin at 0, ascend; ``t`` rises to its target
over the first steps. Nothing of this depends on the data, so `lagrangian` adds its gradients to those of the loss,
whatever the micro-batches were, and counts the steps.

    parameters = {"model": ..., "log_alpha": {kind: [*rows, n]}, "multipliers": {kind: [2]}}
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError
from jprune.train.optimizer import AdamW
from jprune.train.shearing import hard_concrete

PyTree = Any
LogAlpha = Mapping[str, Float[Array, "*rows n"]]
Multipliers = Mapping[str, Float[Array, "2"]]


class LagrangianState(NamedTuple):
    """How many updates there have been."""

    step: Int[Array, ""]


def sizes(log_alpha: LogAlpha) -> dict[str, Float[Array, ""]]:
    """How many units of a row are expected to stay: the mean over rows, by kind."""
    return {kind: jnp.mean(jnp.sum(hard_concrete.expected(x), axis=-1)) for kind, x in log_alpha.items()}


def penalty(
    log_alpha: LogAlpha, multipliers: Multipliers, gone: Mapping[str, Float[Array, ""] | float]
) -> Float[Array, ""]:
    """The Lagrangian term, where of each row of a kind the share `gone` is to go."""
    total = jnp.zeros((), jnp.float32)
    for kind, x in log_alpha.items():
        excess = 1.0 - jnp.mean(hard_concrete.expected(x), axis=-1) - gone[kind]
        first, second = multipliers[kind]
        total = total + jnp.mean(first * excess + second * jnp.square(excess))
    return total


def initial_multipliers(kinds: Mapping[str, Any]) -> dict[str, Float[Array, "2"]]:
    """Zeros."""
    return {kind: jnp.zeros(2, jnp.float32) for kind in kinds}


def gone(targets: Mapping[str, int], log_alpha: LogAlpha, step: Any, warmup: int) -> dict[str, Any]:
    """The share of a row that is to go at a step, by kind: it rises linearly over `warmup` steps, and then stays."""
    risen = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / max(warmup, 1))
    return {kind: risen * (1.0 - targets[kind] / x.shape[-1]) for kind, x in log_alpha.items()}


def lagrangian(targets: Mapping[str, int], *, warmup: int) -> optax.GradientTransformation:
    """Adds the penalty's gradients to those of log alpha and of the multipliers (to be ascended).

    Args:
      targets: how many units of a row are to stay, by kind.
      warmup: updates until the target is the whole one.
    """

    def init(params: PyTree) -> LagrangianState:
        if unknown := set(targets) ^ set(params["log_alpha"]):
            raise JpruneError(f"expected a target for each mask, got one without the other for {sorted(unknown)}")
        return LagrangianState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: LagrangianState, params: PyTree | None = None) -> tuple[PyTree, LagrangianState]:
        if params is None:
            raise JpruneError("lagrangian needs the parameters: call update(updates, state, params)")
        log_alpha, multipliers = params["log_alpha"], params["multipliers"]
        now = gone(targets, log_alpha, state.step, warmup)
        added = jax.grad(penalty, argnums=(0, 1))(log_alpha, multipliers, now)
        both = updates["log_alpha"], updates["multipliers"]
        masks, pull = jax.tree.map(lambda u, g: u + g.astype(u.dtype), both, added)
        return {**updates, "log_alpha": masks, "multipliers": pull}, LagrangianState(state.step + 1)

    return optax.GradientTransformation(init, update)


def bounded() -> optax.GradientTransformation:
    """Keeps log alpha within its bounds; to be chained last."""

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise JpruneError("bounded needs the parameters: call update(updates, state, params)")
        return jax.tree.map(lambda u, p: hard_concrete.clamp(p + u) - p, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def optimizer(
    model: AdamW, masks: AdamW, multipliers: AdamW, *, targets: Mapping[str, int], steps: int, warmup: int
) -> optax.GradientTransformation:
    """One transformation for model, log alpha and multipliers, each with its own rate and clipping.

    Args:
      model: for the weights.
      masks: for log alpha.
      multipliers: for the multipliers, which go up their gradient.
      targets: as for `lagrangian`.
      steps: of the whole run.
      warmup: as for `lagrangian`.
    """
    each = {
        "model": model.transformation(steps),
        "log_alpha": masks.transformation(steps, bounded()),
        "multipliers": multipliers.transformation(steps, optax.scale(-1.0)),
    }
    return optax.chain(lagrangian(targets, warmup=warmup), optax.multi_transform(each, {name: name for name in each}))
