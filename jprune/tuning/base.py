"""What a way to train says of itself to the run that trains: one contract, in two steps.

    prepare(checkpoint)   before a text or a weight is read: the shapes of the result, its plan
    task(steps)           when the data has said how many steps there are: what the loop needs, and the way back

Between the two lies all that a run does (`jprune.pipeline.training.run`), which knows no method; and a method knows no
run: no folder, no data, no format.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optax

from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import loss, stacked
from jprune.models.weights import Weights
from jprune.train.loop import Batch, Loss
from jprune.train.optimizer import AdamW, Schedule
from jprune.tuning.report import TuneReport
from jprune.tuning.weights import BaseDtype, Sums, compute_dtype, read_stacked

PyTree = Any
KERNELS = "kernel$"
"""Regular expression of what gets adapters by default; kernels of experts have other names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out of a training, not yet written."""

    model: Checkpoint
    """The shapes and the config of the result, as a view of the model before."""
    leaves: Iterable[tuple[str, np.ndarray]]
    """The parameters of the result by path, in any order; each is made when it is asked for."""
    trainable_parameters: int
    report: Callable[..., TuneReport] = TuneReport
    """Makes the report of the fields of `TuneReport`, and adds those that only this method has."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What jprune.json says besides."""
    notices: tuple[str, ...] = ()
    """What the user should know, one sentence each."""
    write: Callable[[Path], tuple[str, ...]] | None = None
    """Writes the result into a folder in a form of its own, and returns notices; by default as a whole model."""
    weights: Weights | None = None
    """Weights whose perplexity is measured, if the folder does not hold a whole model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What the training loop needs, and the way back."""

    trainable: PyTree
    frozen: PyTree
    loss: Loss
    """The loss that is minimised, with dropout, distillation and so on."""
    evaluation: Callable[[PyTree, PyTree, Batch], Sums]
    """(trainable, frozen, batch) -> sum of the weighted cross-entropies, and sum of the weights."""
    optimizer: optax.GradientTransformation
    result: Callable[[PyTree], Outcome]
    """trainable -> what is written."""
    dtype: Any
    """The dtype of the activations."""
    watch: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None
    """(trainable, the optimizer's state) after a step -> what the metrics say of it besides, as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a method makes of a model, before any data is read."""

    planned: Checkpoint
    """The shapes of the result, as a view of the model: its plan, and what its format is checked with."""
    task: Callable[[int], Task]
    """Number of steps -> the task. Reads weights."""
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the method as the model has resolved them, for the record and for resuming."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How long is trained, in which batches, and with which optimizer."""

    steps: int | None = None
    """Updates; instead of `epochs`."""
    epochs: int | None = None
    """How often the data is gone through, if no `steps` are given."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: constant, linear or cosine, down to zero at the end."""
    warmup: int | None = None
    """Steps of warm-up. By default 100, but at most a tenth of all."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Global norm that gradients are cut to; 0 leaves them."""
    batch_size: int = 64
    """Windows an update."""
    micro_batch: int | None = None
    """Windows computed at once. By default as many as have 1024 tokens on CPU, elsewhere 8192. Dropout and random masks
    are drawn for each such part; without them the result does not depend on it but for rounding."""
    seed: int = 0
    """Seed of the order of the data, the adapters' start and dropout."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JpruneError(f"`{name}` must be at least 1, got {value}")
        if self.steps is not None and self.epochs is not None:
            raise JpruneError("give either `steps` or `epochs`, not both")
        self.adamw()

    def adamw(self) -> AdamW:
        """The optimizer that the options describe."""
        return AdamW(
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedMethod(Tuning, abc.ABC):
    """A way to train a model: options as fields, and `prepare`.

    To add one, write such a class and list it in `jprune.pipeline.registry`.
    """

    epochs_by_default: ClassVar[int] = 1
    """Passes over the data, if neither steps nor epochs are given."""
    keep_best: ClassVar[bool] = True
    """Whether the best state on the evaluation data is the result, or the last: masks cost quality while they grow."""
    only_how: ClassVar[tuple[str, ...]] = ("micro_batch",)
    """Fields that say how to compute or to write, which may change on resuming. No trained number depends on them, but
    for what is drawn at random for each micro-batch."""

    trains_weights: ClassVar[bool] = True
    """Whether the model's weights have gradients and moments; adapters beside them take next to nothing."""

    @property
    def makes_a_model(self) -> bool:
        """Whether the result is a whole model, which a later run can read."""
        return True

    @abc.abstractmethod
    def prepare(self, checkpoint: Checkpoint) -> Prepared:
        """What a run asks of the method, for a model of which it reads no weight.

        Raises:
          JpruneError: the model, or the options for it, are not what the method can work with.
        """

    @property
    def passes(self) -> int | None:
        """Passes over the data; None if the number of steps is given."""
        return None if self.steps is not None else self.epochs or self.epochs_by_default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught(TrainedMethod):
    """A way to train that can learn from a teacher."""

    teacher: str | None = None
    """A model with the same vocabulary, such as the one before pruning: learn its predictions instead of the text."""
    temperature: float = 1.0
    """Temperature at which predictions are compared."""
    teacher_weight: float = 1.0
    """Share of the teacher in the loss; the rest is the cross-entropy of the text."""
    hidden_loss: float = 0.0
    """Weight of the distance of hidden states to the teacher's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise JpruneError(f"`temperature` must be above 0, got {self.temperature}")
        if not 0 <= self.teacher_weight <= 1 or self.hidden_loss < 0:
            raise JpruneError(
                f"`teacher_weight` must be in [0, 1] and `hidden_loss` not negative, got {self.teacher_weight} and "
                f"{self.hidden_loss}"
            )
        if self.teacher is None and (self.hidden_loss or self.temperature != 1.0 or self.teacher_weight != 1.0):
            raise JpruneError(
                "`temperature`, `teacher_weight` and `hidden_loss` are about a teacher; give `teacher` MODEL"
            )

    def distillation(
        self, checkpoint: Checkpoint, dtype: Any, *, around: stacked.Around | None = None
    ) -> tuple[Callable[..., Sums] | None, PyTree]:
        """The loss of (params, the teacher's params, batch, aside), and the teacher's params; None and nothing without.

        Raises:
          JpruneError: its vocabulary, or a hidden size that matters, is not that of the model.
        """
        from jprune.checkpoints import load

        if self.teacher is None:
            return None, {}
        teacher = load(self.teacher)
        distance = loss.distillation(
            checkpoint.config,
            teacher.config,
            temperature=self.temperature,
            teacher_weight=self.teacher_weight,
            hidden_weight=self.hidden_loss,
            around=around,
            frozen=not self.trains_weights,
        )
        return distance, read_stacked(teacher, stacked.runs(teacher.config, teacher.shapes), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(TrainedMethod):
    """A way to train low-rank adapters beside frozen weights."""

    epochs_by_default: ClassVar[int] = 2
    trains_weights: ClassVar[bool] = False

    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """The adapters' products count alpha / rank."""
    dropout: float = 0.05
    """Dropout of what the adapters read."""
    base_dtype: BaseDtype | None = None
    """Frozen weights while training: float32, bfloat16, or int8 with a scale for each output. By default float32 on
    CPU, else bfloat16. The result's weights are not affected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise JpruneError(f"`rank` must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise JpruneError(f"`dropout` must be in [0, 1), got {self.dropout}")

    def frozen(self, checkpoint: Checkpoint, runs: stacked.Runs, in_axes: Mapping[str, tuple[int, ...]]) -> PyTree:
        """The weights in `base_dtype`, equal blocks stacked."""
        axes = in_axes if self.base_dtype == "int8" else {}
        return read_stacked(checkpoint, runs, dtype=compute_dtype(checkpoint, self.base_dtype), quantised=axes)


__all__ = ["KERNELS", "Adapters", "Outcome", "Prepared", "Task", "Taught", "TrainedMethod", "Tuning"]
