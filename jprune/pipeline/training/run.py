"""From a checkpoint and a task to a folder with what was trained and its record: what all training runs have in common.

The result is a folder like any other, with jprune.json and metrics.jsonl; it appears when all is done.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jprune.checkpoints import Checkpoint, formats, record
from jprune.checkpoints.formats import Format
from jprune.evaluate.perplexity import Perplexity
from jprune.models.weights import Weights
from jprune.pipeline.training.session import Training, evaluation_losses
from jprune.runs import output
from jprune.runs.folder import default_folder, remove
from jprune.runs.stopwatch import peak_memory_bytes
from jprune.train import metrics
from jprune.train.loop import Trained
from jprune.tuning.recovery import Task

PyTree = Any
_ONLY_HOW = ("micro_batch", "keep_adapters")
"""Fields of methods that say how to compute or to write, on which no trained number depends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneReport:
    """The result of a training run."""

    out: Path
    method: str
    steps: int
    best_step: int
    """After which step the parameters are those of the result."""
    trainable_parameters: int
    parameters: int
    """Of the whole model before."""
    losses: tuple[float, ...]
    """Of every step, in nats a token."""
    evaluation_losses: dict[int, float]
    """By step, where they were measured."""
    tokens_per_second: float | None
    before: Perplexity | None
    after: Perplexity | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    resumed_from: int
    notices: tuple[str, ...]
    """What the user should know, one sentence each."""
    domains: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By name, if the data has any: source, windows, weights, losses; see `Balance.described`."""

    def json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        result: dict[str, Any] = {
            "method": self.method,
            "steps": self.steps,
            "best_step": self.best_step,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "loss": {"first": self.losses[0], "last": self.losses[-1]},
            "tokens_per_second": self.tokens_per_second,
            "resumed_from": self.resumed_from,
        }
        if self.evaluation_losses:
            result["evaluation_loss"] = min(self.evaluation_losses.values())
        if self.domains:
            result["domains"] = self.domains
        if self.before:
            result["perplexity"] = {
                "before": self.before.value,
                "after": self.after.value if self.after else None,
                "sequence_length": self.before.sequence_length,
                "windows": self.before.windows,
            }
        return {**result, "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes, "out": str(self.out)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a training, not yet written."""

    write: Callable[[Path], tuple[str, ...]]
    """Writes the weights into a folder, and returns notices."""
    trainable_parameters: int
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the report that only this kind of run has."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What jprune.json says besides."""
    notices: tuple[str, ...] = ()
    weights: Weights | None = None
    """What the perplexity is measured of, where the folder does not hold a whole model."""


R = TypeVar("R", bound=TuneReport)


def model_writer(
    checkpoint: Checkpoint, leaves: Iterable[tuple[str, np.ndarray]], format: Format
) -> Callable[[Path], tuple[str, ...]]:
    """The `write` of a result that is a whole model.

    Args:
      checkpoint: with the shapes of the result.
      leaves: its parameters by path, in any order.
      format: see `jprune.checkpoints.formats`.
    """

    def write(folder: Path) -> tuple[str, ...]:
        with formats.writer(folder, checkpoint, format=format) as writer:
            for path, values in leaves:
                writer.write(path, values)
        return formats.notices(checkpoint, format)

    return write


def train_and_write(
    training: Training,
    task: Task,
    out: Path,
    *,
    recipe: Mapping[str, Any],
    result: Callable[[Trained], Result],
    report: Callable[..., R],
    keep_best: bool = True,
    watch: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> R:
    """Trains, and writes the result with its record.

    Args:
      training: the model and the data.
      task: what is trained, and how.
      out: folder of the result; the state of the run is beside it until it is there, in ``OUT.run``.
      recipe: the name of the method and its fields.
      result: what comes out of the trained state.
      report: makes the report, with the fields of `Result.own` besides those of `TuneReport`.
      keep_best: as the rest, see `Training.train`.

    Raises:
      JpruneError: anything that fails; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    checkpoint, stopwatch = training.checkpoint, training.stopwatch
    before = training.perplexity(checkpoint, task.dtype, "evaluate before")
    folder = default_folder(out)
    trained = training.train(
        task,
        folder,
        recipe={name: value for name, value in recipe.items() if name not in _ONLY_HOW},
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        keep_best=keep_best,
        watch=watch,
        resume=resume,
        overwrite=overwrite,
    )
    made = result(trained)
    with output.new_folder(out, overwrite=overwrite, source=checkpoint.source) as part:
        with stopwatch.phase("io"):
            told = made.write(part)
            shutil.copy2(folder / metrics.NAME, part / metrics.NAME)
        after, failed = training.perplexity_after(part if made.weights is None else made.weights, task.dtype)
        done = report(
            out=out,
            method=recipe["method"],
            steps=training.steps,
            best_step=trained.step,
            trainable_parameters=made.trainable_parameters,
            parameters=checkpoint.parameters,
            losses=tuple(line["loss"] for line in trained.history),
            evaluation_losses=evaluation_losses(trained),
            tokens_per_second=trained.tokens_per_second,
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            resumed_from=trained.resumed_from,
            notices=(*training.notices, *made.notices, *told, *failed),
            domains=training.domains(trained),
            **made.own,
        )
        contents = {
            **done.json(),
            "recipe": dict(recipe),
            **made.details,
            **training.record(trained, task.dtype),
            "notices": list(done.notices),
        }
        record.write(part, contents)
    remove(folder)
    return done
