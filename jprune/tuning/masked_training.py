"""What is trained while a model is sheared: its weights under masks that are drawn anew, and the masks themselves.

The trainable tree is ``{"model": parameters with blocks stacked, "log_alpha": by kind, "multipliers": by kind}``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Float, Key
from jprune.checkpoints import Checkpoint
from jprune.checkpoints.dtypes import cast
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.train.loop import Batch
from jprune.train.shearing import hard_concrete, lagrangian
from jprune.tuning.masked_model import MaskedModel
from jprune.tuning.weights import Sums

PyTree = Any
DIVERGED = 1e5
"""A multiplier beyond this has run away: those of the published runs stay below some thousands."""


def start(masked: MaskedModel) -> dict[str, Any]:
    """The masks' log alpha and the multipliers to begin with."""
    log_alpha = {kind: hard_concrete.initial(shape) for kind, shape in masked.shapes.items()}
    return {"log_alpha": log_alpha, "multipliers": lagrangian.initial_multipliers(log_alpha)}


def masked_loss(masked: MaskedModel, dtype: Any) -> Callable[[PyTree, PyTree, Batch], Sums]:
    """(parameters with blocks stacked, masks, batch) -> sum of the weighted cross-entropies, and of the weights."""
    language_model = loss.causal_lm(masked.checkpoint.config, around=masked.around(dtype))

    def sums(params: PyTree, masks: PyTree, batch: Batch) -> Sums:
        operands, aside = masked.operands(params, masks)
        ends = {name: x for name, x in operands.items() if name != "blocks"}  # blocks are cast one by one
        cast = jax.tree.map(lambda x: x.astype(dtype), ends)
        return language_model({**cast, "blocks": operands["blocks"]}, batch, aside)

    return sums


def sample(log_alpha: lagrangian.LogAlpha, key: Key[Array, ""]) -> dict[str, Float[Array, "*rows n"]]:
    """Masks, each kind with randomness of its own."""
    kinds = sorted(log_alpha)
    return {k: hard_concrete.sample(log_alpha[k], jax.random.fold_in(key, i)) for i, k in enumerate(kinds)}


def rounded(log_alpha: lagrangian.LogAlpha) -> dict[str, Float[Array, "*rows n"]]:
    """Soft masks, of which each row has as many as it expects to keep, rounded."""
    counts = {kind: jnp.round(jnp.sum(hard_concrete.expected(x), -1, keepdims=True)) for kind, x in log_alpha.items()}
    return {kind: hard_concrete.deterministic(x, counts[kind]) for kind, x in log_alpha.items()}


def final_masks(masked: MaskedModel, log_alpha: lagrangian.LogAlpha) -> dict[str, Float[Array, "*rows n"]]:
    """Soft masks, of which each row has as many as the target says."""
    return {kind: hard_concrete.deterministic(x, masked.targets[kind]) for kind, x in log_alpha.items()}


def result(masked: MaskedModel, trainable: PyTree) -> tuple[Checkpoint, Iterator[tuple[str, np.ndarray]]]:
    """The smaller model as a view of the one before, and its own parameters by path, in its dtypes."""
    masks = final_masks(masked, trainable["log_alpha"])
    smaller = masked.left(masks)
    params = stacked.unstack(jax.tree.map(np.asarray, trainable["model"]))
    leaves = masked.sheared(params, masks)
    return smaller, ((path, cast(np.asarray(x), smaller.shapes[path].dtype, path)) for path, x in leaves)


def expected_shape(masked: MaskedModel, log_alpha: lagrangian.LogAlpha) -> dict[str, float]:
    """The sizes that the masks expect, the mean over layers."""
    found = masked.shape({kind: float(size) for kind, size in lagrangian.sizes(log_alpha).items()})
    return {name: round(size, 3) for name, size in found.items()}


def watch(masked: MaskedModel, warmup: int) -> Callable[[PyTree, PyTree], dict[str, float]]:
    """What the metrics say of every step: expected sizes, multipliers and the Lagrangian's value.

    The function raises `JpruneError` when a multiplier has run away.
    """

    @jax.jit
    def measured(trainable: PyTree, step: Array) -> tuple[Any, Any, Array]:
        log_alpha, multipliers = trainable["log_alpha"], trainable["multipliers"]
        gone = lagrangian.gone(masked.targets, log_alpha, step, warmup)
        return lagrangian.sizes(log_alpha), multipliers, lagrangian.penalty(log_alpha, multipliers, gone)

    def watch(trainable: PyTree, state: PyTree) -> dict[str, float]:
        left, multipliers, value = jax.device_get(measured(trainable, state[0].step))
        for kind, pair in multipliers.items():
            if not np.all(np.abs(pair) < DIVERGED):
                raise JpruneError(
                    f"the multipliers of {kind} have run away ({pair[0]:.3g} and {pair[1]:.3g}): lower "
                    "`multiplier_learning_rate` or `mask_learning_rate`, or raise `target_warmup`. The state that was "
                    "saved last is kept"
                )
        found = masked.shape({kind: float(size) for kind, size in left.items()})
        line = {f"expected/{name}": round(size, 4) for name, size in found.items()}
        for kind, pair in multipliers.items():
            line |= {f"multiplier/{kind}/{i + 1}": float(x) for i, x in enumerate(pair)}
        return {**line, "lagrangian": float(value)}

    return watch
