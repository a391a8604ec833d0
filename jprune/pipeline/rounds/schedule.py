"""Rounds of pruning and tuning: which there are, and how each trains.

Syed, Guo and Sundarapandiyan, ICLR 2023 Tiny Papers, "Prune and Tune: Improving Efficient Pruning Techniques for
Massive Language Models" (https://openreview.net/forum?id=cKlgcx7nSZ). Sparsities are absolute: 0.5, then 0.7 of all
prunable weights.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jprune.checkpoints import Checkpoint, load
from jprune.errors import JpruneError
from jprune.models import loss
from jprune.patterns import Unstructured
from jprune.pipeline.recipe import Recipe, chosen_kernels
from jprune.trees import count_zeros
from jprune.tuning import Full
from jprune.tuning.base import Taught

SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8)
"""Sparsities of the authors' rounds; they speak of densities: 1, 0.9, 0.7, 0.5, 0.3, 0.2."""
STEPS = 100
"""Steps of training in a round, unless said otherwise."""
BY_CHANCE = 1e-3
"""Share of zeros that a dense model may have."""


def schedule(sparsity: float, rounds: Sequence[float] | None = None, *, present: float = 0.0) -> tuple[float, ...]:
    """The sparsities of the rounds.

    Args:
      sparsity: the last one.
      rounds: all of them; by default those of the authors up to `sparsity`.
      present: the share of zeros that the model has already. Of the default rounds, those below it are left out.

    Raises:
      JpruneError: they do not go up, do not end at `sparsity`, or lie below what there is.
    """
    Unstructured(sparsity)  # checks the range
    chosen = tuple(map(float, rounds or ())) or (
        *(s for s in SPARSITIES if present - BY_CHANCE <= s < sparsity),
        sparsity,
    )
    if any(not 0 <= s < 1 for s in chosen) or list(chosen) != sorted(set(chosen)):
        raise JpruneError(f"the sparsities of rounds go up within [0, 1), such as 0.3,0.5,0.7; got {_list(chosen)}")
    if chosen[-1] != sparsity:
        raise JpruneError(
            f"the rounds {_list(chosen)} end at {chosen[-1]:g} and not at the sparsity asked for, {sparsity:g}; let it "
            "be the last round, or ask for another `sparsity`"
        )
    if chosen[0] < present - BY_CHANCE:
        raise JpruneError(
            f"{100 * present:.4g} % of the prunable weights are zero already and a round is to have "
            f"{100 * chosen[0]:g} %: what is zero stays zero; ask for more, or begin with a denser model"
        )
    return chosen


def zeros_present(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """The share of zeros in the kernels that a recipe prunes; reads them."""
    kernels = chosen_kernels(checkpoint, recipe)
    zeros = sum(count_zeros(kernel.part(np.asarray(checkpoint.read(kernel.path)))) for kernel in kernels)
    return zeros / sum(kernel.size for kernel in kernels)


def tuning_of_a_round(checkpoint: Checkpoint, tuning: Taught | None) -> Taught:
    """How a round trains, with the default of its steps filled in.

    Raises:
      JpruneError: what would stop the first round after it has pruned: a warm-up that takes all steps, a teacher with
        another vocabulary, adapters that are not to be merged.
    """
    tuning = Full() if tuning is None else tuning
    if tuning.steps is None and tuning.epochs is None:
        tuning = dataclasses.replace(tuning, steps=STEPS)
    if tuning.steps is not None:
        tuning.adamw().rate(tuning.steps)
    if not tuning.makes_a_model:
        raise JpruneError("adapters cannot be kept apart: the next round prunes the weights that they are merged into")
    if tuning.teacher is not None:
        loss.distillation(checkpoint.config, load(tuning.teacher).config, hidden_weight=tuning.hidden_loss)
    return tuning


def _list(sparsities: Sequence[float]) -> str:
    return ",".join(f"{s:g}" for s in sparsities)
