"""All that a run in rounds is to do: its options with what follows from them for a model, before the first round."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jprune.checkpoints import Checkpoint, formats
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.batches import Batches
from jprune.data.blend import named
from jprune.data.training import training_batches
from jprune.errors import JpruneError
from jprune.methods import Method
from jprune.patterns import Unstructured
from jprune.pipeline.options import Evaluation, Schedule, TrainingData
from jprune.pipeline.recipe import Recipe, window_shape
from jprune.pipeline.registry import name_of
from jprune.pipeline.rounds.schedule import schedule as rounds_to
from jprune.pipeline.rounds.schedule import tuning_of_a_round, zeros_present
from jprune.tuning.base import Taught


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsJob:
    """What is to be done, and all that the result depends on."""

    checkpoint: Checkpoint
    sparsities: tuple[float, ...]
    """The sparsity of every round."""
    method: Method
    """What prunes."""
    tuning: Taught
    """What trains a round, with its number of steps."""
    recipe: Recipe
    """The recipe of the last round, with the sizes of its calibration windows."""
    data: TrainingData
    """What a round trains on, with the length of its windows."""
    batches: Batches
    """The training data, as each round reads it again."""
    schedule: Schedule
    evaluation: windows.Windows | None
    format: Format

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        method: Method,
        tuning: Taught | None,
        rounds: Sequence[float] | None,
        recipe: Recipe,
        data: TrainingData,
        schedule: Schedule,
        measured: Evaluation,
        format: Format,
    ) -> "RoundsJob":
        """The job for a model.

        Raises:
          JpruneError: anything that would stop a round and can be known before the first.
        """
        tuning = tuning_of_a_round(checkpoint, tuning)
        # Later rounds do not know what the model suggests.
        if isinstance(recipe.calibration, Mapping) or not windows.is_rows(recipe.calibration):
            samples, length = window_shape(checkpoint, recipe)
            recipe = dataclasses.replace(recipe, samples=samples, sequence_length=length)
        assert isinstance(recipe.pattern, Unstructured)
        sparsities = rounds_to(recipe.pattern.sparsity, rounds, present=zeros_present(checkpoint, recipe))
        formats.check(checkpoint, format)
        batches = _batches(checkpoint, tuning, data)
        return cls(
            checkpoint=checkpoint,
            sparsities=sparsities,
            method=method,
            tuning=tuning,
            recipe=recipe,
            data=dataclasses.replace(data, sequence_length=batches.length),
            batches=batches,
            schedule=schedule,
            evaluation=measured.text(checkpoint),
            format=format,
        )

    def recipe_of(self, number: int) -> Recipe:
        """The recipe of a round, counted from 1: its sparsity, and a seed of its own."""
        assert isinstance(self.recipe.pattern, Unstructured)
        pattern = dataclasses.replace(self.recipe.pattern, sparsity=self.sparsities[number - 1])
        return dataclasses.replace(self.recipe, pattern=pattern, seed=self.recipe.seed + number - 1)

    def tuning_of(self, number: int) -> Taught:
        """The training of a round, counted from 1, with a seed of its own."""
        return dataclasses.replace(self.tuning, seed=self.tuning.seed + number - 1)

    def described(self) -> dict[str, Any]:
        """The recipe as the record of the result has it, without the data."""
        assert isinstance(self.recipe.pattern, Unstructured)
        calibration = self.recipe.calibration
        recipe = {k: v for k, v in self.recipe.json().items() if k not in ("pattern", "keep_zeros", "allocate", "seed")}
        return {
            "sparsity": self.recipe.pattern.sparsity,
            "rounds": self.sparsities,
            "per": self.recipe.pattern.per,
            "pruner": name_of(self.method),
            **dataclasses.asdict(self.method),  # type: ignore[call-overload]  # methods are dataclasses
            "tuning": name_of(self.tuning),
            **dataclasses.asdict(self.tuning),
            "tune_length": self.batches.length,
            **recipe,
            "calibration": named(calibration),
        }

    def settings(self) -> dict[str, Any]:
        """What the result depends on: a run is gone on with by the same, or not at all."""
        every = self.schedule.evaluate_every
        return {
            **{name: value for name, value in self.described().items() if name != "micro_batch"},
            **({} if every is None else {"evaluate_every": every}),
            "model": self.checkpoint.fingerprint(),
            "data": self.batches.fingerprint,
            "evaluation": self.evaluation and self.evaluation.sha256,
            "calibration_seed": self.recipe.seed,
            "format": self.format,
        }


def _batches(checkpoint: Checkpoint, tuning: Taught, data: TrainingData) -> Batches:
    """The batches of a round, read to find now what is wrong with them."""
    if isinstance(data.data, Mapping):
        raise JpruneError(f"rounds train on one source, not on {len(data.data)} domains; give one as data")
    length = data.sequence_length
    if length is None and not windows.is_rows(data.data):
        length = checkpoint.suggested.training_length
    return training_batches(
        data.data,
        checkpoint,
        batch_size=tuning.batch_size,
        length=length,
        windows_at_most=data.windows_at_most,
        epochs=tuning.passes,
        seed=tuning.seed,
    )
