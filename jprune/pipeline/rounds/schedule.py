"""Rounds of pruning and tuning: which there are, and what is told of each.

Syed, Guo and Sundarapandiyan, ICLR 2023 Tiny Papers, "Prune and Tune: Improving Efficient Pruning Techniques for
Massive Language Models" (https://openreview.net/forum?id=cKlgcx7nSZ). Sparsities are absolute: 0.5, then 0.7 of all
prunable weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jprune import trees
from jprune.checkpoints import Checkpoint, load
from jprune.errors import JpruneError
from jprune.models import loss
from jprune.patterns import Unstructured
from jprune.pipeline.recipe import Recipe, chosen_kernels
from jprune.runs.report import RunReport
from jprune.trees import count_zeros
from jprune.tuning import Full, Lora

SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8)
"""Of the authors' rounds, who speak of densities: 1, 0.9, 0.7, 0.5, 0.3, 0.2."""
STEPS = 100
"""Of training in a round, unless said otherwise."""
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
    zeros = sum(count_zeros(np.asarray(checkpoint.read(kernel.path))) for kernel in kernels)
    return zeros / sum(kernel.size for kernel in kernels)


def tuning_of_a_round(checkpoint: Checkpoint, tuning: Full | Lora | None) -> Full | Lora:
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
    if isinstance(tuning, Lora) and tuning.keep_adapters:
        raise JpruneError("adapters cannot be kept apart: the next round prunes the weights that they are merged into")
    if tuning.teacher is not None:
        loss.distillation(checkpoint.config, load(tuning.teacher).config, hidden_weight=tuning.hidden_loss)
    return tuning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One round that is done."""

    sparsity: float
    """That was asked for."""
    zeros: int
    """In the prunable parameters."""
    steps: int
    """Of training."""
    first_loss: float
    """Of the first step of training, in nats a token."""
    last_loss: float
    perplexity_pruned: float | None
    """Before training."""
    perplexity_tuned: float | None
    """After it."""
    prune_seconds: float
    tune_seconds: float

    @classmethod
    def from_records(cls, sparsity: float, zeros: int, pruned: Mapping[str, Any] | None, tuned: Mapping[str, Any]):
        """Out of the records of the two halves of a round; there is none of the first if nothing was pruned."""
        measured = tuned.get("perplexity", {})
        return cls(
            sparsity=sparsity,
            zeros=zeros,
            steps=tuned["steps"],
            first_loss=tuned["loss"]["first"],
            last_loss=tuned["loss"]["last"],
            perplexity_pruned=measured.get("before"),
            perplexity_tuned=measured.get("after"),
            prune_seconds=pruned["seconds"]["total"] if pruned else 0.0,
            tune_seconds=tuned["seconds"]["total"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneAndTuneReport(RunReport):
    """The result of all rounds. Its seconds are those of all rounds, those before a resume included."""

    pruner: str
    tuning: str
    sparsity: trees.Sparsity
    rounds: tuple[Round, ...]

    def own_json(self) -> dict[str, Any]:
        """The fields of ``--json`` that only runs in rounds have."""
        return {
            "method": "prune-and-tune",
            "pruner": self.pruner,
            "tuning": self.tuning,
            "sparsity": self.sparsity.json(),
            "rounds": [dataclasses.asdict(each) for each in self.rounds],
        }

    @classmethod
    def from_record(cls, contents: Mapping[str, Any], out: Path) -> "PruneAndTuneReport":
        """The report of an earlier run, from its record."""
        return cls(
            **cls.common_fields(contents, out),
            pruner=contents["pruner"],
            tuning=contents["tuning"],
            sparsity=trees.Sparsity.from_json(contents["sparsity"]),
            rounds=tuple(Round(**each) for each in contents["rounds"]),
        )


def seconds_of(rounds: Sequence[Round]) -> dict[str, float]:
    """The seconds of all rounds, in all and of their halves."""
    prune, tune = sum(r.prune_seconds for r in rounds), sum(r.tune_seconds for r in rounds)
    return {"total": round(prune + tune, 3), "prune": round(prune, 3), "tune": round(tune, 3)}


def _list(sparsities: Sequence[float]) -> str:
    return ",".join(f"{s:g}" for s in sparsities)
