"""The training of a run, whatever is trained: the loop over its data, its state on disk, and what it is measured on.

OUT.run      the state of the run while it lasts: checkpoints of everything, for `resume`
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import Checkpoint, load, record
from jprune.data.batches import Batches, Rows
from jprune.data.mixture import Mixture
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity
from jprune.models.weights import Weights
from jprune.pipeline.options import TrainOptions
from jprune.pipeline.training import data
from jprune.pipeline.training.domains import Balance, mean_loss
from jprune.runs import interrupt
from jprune.runs.folder import state_folder
from jprune.runs.remembered import perplexity
from jprune.runs.report import Progress, environment
from jprune.runs.stopwatch import Stopwatch
from jprune.train import loop, sharding
from jprune.train.loop import Trained, train
from jprune.tuning.base import Task, TrainedMethod

PyTree = Any
REWEIGHINGS = 20
"""How often dynamic loading sets the domains' weights in a run, unless said otherwise."""


class Session:
    """A model, its data and the devices that it is trained on.

    Args:
      checkpoint: the model.
      method: how long is trained, and in which batches.
      options: the data, and how the run goes.
      stopwatch: counts the phases.
      progress: called often.

    Attributes:
      data: what is trained and measured on.
      notices: what the user should know of the data and of its use.

    Raises:
      JpruneError: data that there is not, or too little of, or devices that do not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: TrainedMethod,
        options: TrainOptions,
        stopwatch: Stopwatch,
        progress: Callable[[Progress], None],
    ):
        self._checkpoint, self._method, self._options = checkpoint, method, options
        self._stopwatch, self._progress = stopwatch, progress
        self._mesh = sharding.make_mesh(fsdp=options.schedule.fsdp)
        with stopwatch.phase("data"):
            self.data = data.read(checkpoint, method, options.data, options.evaluation, self._mesh)
        self.notices = self.data.notices

    @property
    def _evaluate_every(self) -> int | None:
        domains, given = self.data.domains, self._options.schedule.evaluate_every
        if given is None and domains is not None and domains.loading is not None:
            return max(1, self.data.steps // REWEIGHINGS)
        return given

    def perplexity(self, weights: Weights, dtype: Any, phase: str) -> Perplexity | None:
        """The perplexity on a text, by the standard protocol; None for instructions, or with nothing to measure on."""
        batches = self.data.held_out
        if batches is None or not isinstance(batches.examples, Rows):
            return None
        tokens = batches.examples.take(np.arange(batches.windows))["tokens"]
        with self._stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                tokens,
                dtype=dtype,
                progress=lambda done, total: self._progress(Progress(float(done), total, batches.source, phase)),
            )

    def perplexity_after(self, result: Path | Weights, dtype: Any) -> tuple[Perplexity | None, tuple[str, ...]]:
        """The perplexity of the result, and a notice if that fails: hours of work are not thrown away for it."""
        try:
            weights = load(result) if isinstance(result, Path) else result
            return self.perplexity(weights, dtype, "evaluate after"), ()
        except JpruneError as error:
            return None, (f"the perplexity after training could not be measured: {error}",)

    def train(self, task: Task, folder: Path, recipe: Mapping[str, Any]) -> Trained:
        """Trains, with the state in `folder`, which stays there until whoever wrote the result removes it.

        Args:
          task: what is trained, and how.
          folder: made if it is not there.
          recipe: what the result depends on, besides model and data; a run begun with another is not resumed.

        Raises:
          JpruneError: see `loop.train`.
          jprune.train.loop.Interrupted: Ctrl-C, after the state was saved.
        """
        mixed, result = self.data.domains, self._options.result
        self._progress(Progress(0.0, self.data.steps, "compiling", "train"))
        stream, evaluate, watch = self._followed(task)
        with (
            state_folder(folder, forget=result.overwrite and not result.resume),
            interrupt.deferred() as ctrl_c,
            self._stopwatch.phase("train"),
        ):
            trained = train(
                task.loss,
                task.trainable,
                task.frozen,
                stream,
                task.optimizer,
                self._schedule(),
                evaluate=evaluate,
                keep_best=self._method.keep_best,
                rate=self._method.adamw().rate(self.data.steps),
                watch=watch,
                folder=folder,
                settings=self._settings(recipe),
                resume=result.resume,
                mesh=self._mesh,
                progress=lambda p: self._progress(_shown(p)),
                stop=lambda: ctrl_c.pressed,
            )
        if mixed is not None:
            self.notices += mixed.repeated(trained.history)
        return trained

    def _followed(
        self, task: Task
    ) -> tuple[loop.Batches, Callable[[PyTree, PyTree], float] | None, Callable[[PyTree, PyTree], Any] | None]:
        """The stream of batches, what is measured on the way, and what the metrics say besides."""
        data = self.data
        if data.domains is not None:
            balance = Balance(data.domains, task.evaluation, self._mesh, task.watch)
            return balance.stream, balance.evaluate, balance.watch
        stream = data.batches.__iter__()  # of a union, iter() is less to mypy
        if data.held_out is None or self._evaluate_every is None:
            return stream, None, task.watch
        return stream, functools.partial(mean_loss(task.evaluation, self._mesh), data.held_out), task.watch

    def _schedule(self) -> loop.Schedule:
        return loop.Schedule(
            steps=self.data.steps,
            micro_batch=self.data.micro_batch,
            evaluate_every=self._evaluate_every,
            checkpoint_every=self._options.schedule.checkpoint_every or max(1, self.data.steps // 10),
            seed=self._method.seed,
        )

    def _settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """What the trained numbers depend on, as JSON."""
        mixed, held_out = self.data.domains, self.data.held_out
        return {
            **recipe,
            "model": self._checkpoint.fingerprint(),
            "data": self.data.batches.fingerprint,
            "evaluation": held_out and held_out.sha256,
            "evaluate_every": self._evaluate_every,
            "domains": mixed and mixed.settings,
        }

    def domains(self, trained: Trained) -> dict[str, dict[str, Any]]:
        """What is known of every domain after training; empty if the data has none."""
        return {} if self.data.domains is None else self.data.domains.described(trained.history)

    def record(self, trained: Trained, dtype: Any) -> dict[str, Any]:
        """What jprune.json says of the model before, of the data, and of the losses."""

        def described(b: Batches | Mixture) -> dict[str, Any]:
            return {"source": b.source, "windows": b.windows, "sequence_length": b.length, "sha256": b.sha256}

        checkpoint = self._checkpoint
        earlier = Path(checkpoint.source) / record.NAME
        return {
            "model": {
                **checkpoint.described(),
                "record": record.read(earlier.parent) if earlier.exists() else None,
            },
            "data": described(self.data.batches),
            "evaluation": self.data.held_out and described(self.data.held_out),
            "losses": [round(line["loss"], 6) for line in trained.history],
            "evaluation_losses": evaluation_losses(trained),
            **environment(dtype),
        }


def evaluation_losses(trained: Trained) -> dict[int, float]:
    """The losses on the evaluation data by step, where they were measured."""
    return {line["step"]: line["evaluation_loss"] for line in trained.history if "evaluation_loss" in line}


def _shown(p: loop.Progress) -> Progress:
    parts = []
    if p.tokens_per_second:
        parts.append(f"{p.tokens_per_second:,.0f} tokens/s")
    if p.seconds_left is not None:
        minutes, seconds = divmod(round(p.seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return Progress(p.step, p.steps, ", ".join(parts), "train", p.loss)
