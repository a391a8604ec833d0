"""A training run over a checkpoint, whatever is trained: its data, its state on disk, and what it is measured on.

OUT.run      the state of the run while it lasts: checkpoints of everything, for --resume
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import Checkpoint, load, record
from jprune.data import windows
from jprune.data.batches import Batches, Rows
from jprune.data.held_out import overlap
from jprune.data.mixture import Mixture
from jprune.data.training import evaluation_batches, training_batches
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity, perplexity
from jprune.models.batching import windows_at_once
from jprune.models.weights import Weights
from jprune.pipeline.training import domains
from jprune.pipeline.training.domains import Balance, Domains, DynamicLoading, mean_loss
from jprune.runs import interrupt
from jprune.runs.folder import state_folder
from jprune.runs.report import Progress, environment
from jprune.runs.stopwatch import Stopwatch
from jprune.train import loop, sharding
from jprune.train.loop import Schedule, Trained, train
from jprune.tuning.recovery import Task, Tuning

PyTree = Any
DEMO_LENGTH = 256
"""Tokens a window of text for the demo model: steps of a minute on two cores."""
DEMO_EVALUATION_LENGTH = 512
REWEIGHINGS = 20
"""How often dynamic loading sets the domains' weights in a run, unless said otherwise."""


class Training:
    """One run, from the options that all kinds of training share.

    Args:
      checkpoint: the model.
      method: how long to train, and in what batches.
      stopwatch: counts the phases.
      progress: called often.
      epochs: how often the data is gone through if `method` says neither that nor how many steps.
      fsdp: over how many devices parameters and optimizer state are cut up; the others share out the data.
      data: as the rest, as `tune_model` describes it.

    Attributes:
      checkpoint: the model.
      stopwatch: the phases.
      steps: updates.
      notices: what the user should know of the data.

    Raises:
      JpruneError: data that there is not, or too little of, or devices that do not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Tuning,
        stopwatch: Stopwatch,
        progress: Callable[[Progress], None],
        *,
        epochs: int,
        data: windows.Spec | Mapping[str, windows.Spec],
        proportions: Mapping[str, int | float] | None = None,
        dynamic_loading: DynamicLoading | None = None,
        sequence_length: int | None = None,
        windows_at_most: int | None = None,
        train_on_prompt: bool = False,
        evaluate: windows.Spec | Mapping[str, windows.Spec] | None = None,
        evaluate_length: int | None = None,
        evaluate_windows: int | None = None,
        fsdp: int = 1,
    ):
        self.checkpoint, self.stopwatch = checkpoint, stopwatch
        self._method, self._progress = method, progress
        self._mesh = sharding.make_mesh(fsdp=fsdp)
        demo = checkpoint.source == "demo"
        with stopwatch.phase("data"):
            passes = None if method.steps is not None else method.epochs or epochs
            short = demo and sequence_length is None and not _all_rows(data)
            options: dict[str, Any] = {
                "batch_size": method.batch_size,
                "length": DEMO_LENGTH if short else sequence_length,
                "windows_at_most": windows_at_most,
                "seed": method.seed,
                "train_on_prompt": train_on_prompt,
            }
            self._batches: Batches | Mixture
            self._domains: Domains | None = None
            by_domain = evaluate if isinstance(evaluate, Mapping) else None
            if isinstance(data, Mapping):
                self._domains = domains.read(
                    data,
                    checkpoint,
                    **options,
                    proportions=proportions,
                    loading=dynamic_loading,
                    evaluate=by_domain,
                    evaluate_windows=evaluate_windows,
                    evaluate_length=evaluate_length,
                    mesh=self._mesh,
                )
                self._batches = self._domains.mixture
            elif proportions is not None or dynamic_loading is not None or by_domain is not None:
                raise JpruneError(
                    "proportions, dynamic loading and --evaluate NAME=SOURCE are about domains; give --data NAME=SOURCE"
                )
            else:
                self._batches = training_batches(data, checkpoint, epochs=passes, **options)
            self.steps = method.steps or self._batches.per_epoch * (passes or 1)
            self._rows = method.micro_batch or windows_at_once(self._batches.length)
            self._held_out: Batches | None = None
            if evaluate is not None and not isinstance(evaluate, Mapping):
                if demo and evaluate_length is None:
                    evaluate_length = DEMO_EVALUATION_LENGTH
                self._held_out = evaluation_batches(
                    evaluate,
                    checkpoint,
                    batch_size=self._rows,
                    length=None if windows.is_rows(evaluate) else evaluate_length,
                    windows_at_most=evaluate_windows,
                    train_on_prompt=train_on_prompt,
                )
        self.notices = _notices(self._batches, self._held_out)
        if self._domains is not None:
            self.notices = (*self._domains.notices, *self.notices)

    def perplexity(self, weights: Weights, dtype: Any, phase: str) -> Perplexity | None:
        """By the standard protocol, of a text; None for instructions, or where there is nothing to measure on."""
        batches = self._held_out
        if batches is None or not isinstance(batches.examples, Rows):
            return None
        tokens = batches.examples.take(np.arange(batches.windows))["tokens"]
        with self.stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                tokens,
                dtype=dtype,
                progress=lambda done, total: self._progress(Progress(float(done), total, batches.source, phase)),
            )

    def perplexity_after(self, result: Path | Weights, dtype: Any) -> tuple[Perplexity | None, tuple[str, ...]]:
        """Of the result, and a notice if that fails: hours of work are not thrown away for it."""
        try:
            weights = load(result) if isinstance(result, Path) else result
            return self.perplexity(weights, dtype, "evaluate after"), ()
        except JpruneError as error:
            return None, (f"the perplexity after training could not be measured: {error}",)

    def train(
        self,
        task: Task,
        folder: Path,
        *,
        recipe: Mapping[str, Any],
        evaluate_every: int | None = None,
        checkpoint_every: int | None = None,
        keep_best: bool = True,
        watch: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Trained:
        """Trains, with the state in `folder`, which stays there until whoever wrote the result removes it.

        Args:
          task: what is trained, and how.
          folder: made if it is not there.
          recipe: what the result depends on, besides model and data; a run begun with another is not resumed.
          evaluate_every: steps between two measurements of the loss on the evaluation data, or of the domains' losses;
            by default one at the end; with dynamic loading, a twentieth of all.
          checkpoint_every: steps between two checkpoints; by default a tenth of all.
          keep_best: whether the best state by these measurements comes back, or the last; see `loop.train`.
          watch: see `loop.train`.
          resume: go on with the run in the folder, if there is one.
          overwrite: forget a run that is there; not if it is to be resumed.

        Raises:
          JpruneError: see `loop.train`.
          jprune.train.loop.Interrupted: Ctrl-C, after the state was saved.
        """
        mixed, held_out = self._domains, self._held_out
        if mixed is not None and mixed.loading is not None and evaluate_every is None:
            evaluate_every = max(1, self.steps // REWEIGHINGS)
        settings = {
            **recipe,
            "model": self.checkpoint.fingerprint(),
            "data": self._batches.fingerprint,
            "evaluation": held_out and held_out.sha256,
            "evaluate_every": evaluate_every,
            "domains": mixed and mixed.settings,
        }
        schedule = Schedule(
            steps=self.steps,
            micro_batch=self._rows,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every or max(1, self.steps // 10),
            seed=self._method.seed,
        )
        self._progress(Progress(0.0, self.steps, "compiling", "train"))
        stream: loop.Batches
        evaluate: Callable[[PyTree, PyTree], float] | None = None
        if mixed is not None:
            balance = Balance(mixed, task.evaluation, self._mesh, watch)
            stream, evaluate, watch = balance.stream, balance.evaluate, balance.watch
        else:
            stream = self._batches.__iter__()  # of a union, iter() is less to mypy
            if held_out is not None and evaluate_every is not None:
                evaluate = functools.partial(mean_loss(task.evaluation, self._mesh), held_out)
        with (
            state_folder(folder, forget=overwrite and not resume),
            interrupt.deferred() as ctrl_c,
            self.stopwatch.phase("train"),
        ):
            trained = train(
                task.loss,
                task.trainable,
                task.frozen,
                stream,
                task.optimizer,
                schedule,
                evaluate=evaluate,
                keep_best=keep_best,
                rate=self._method.adamw().rate(self.steps),
                watch=watch,
                folder=folder,
                settings=settings,
                resume=resume,
                mesh=self._mesh,
                progress=lambda p: self._progress(_shown(p)),
                stop=lambda: ctrl_c.pressed,
            )
        if mixed is not None:
            self.notices += mixed.repeated(trained.history)
        return trained

    def domains(self, trained: Trained) -> dict[str, dict[str, Any]]:
        """What is known of every domain after training; empty if the data has none."""
        return {} if self._domains is None else self._domains.described(trained.history)

    def record(self, trained: Trained, dtype: Any) -> dict[str, Any]:
        """What jprune.json says of the model before, of the data, and of the losses."""

        def described(b: Batches | Mixture) -> dict[str, Any]:
            return {"source": b.source, "windows": b.windows, "sequence_length": b.length, "sha256": b.sha256}

        checkpoint = self.checkpoint
        earlier = Path(checkpoint.source) / record.NAME
        return {
            "model": {
                **checkpoint.described(),
                "record": record.read(earlier.parent) if earlier.exists() else None,
            },
            "data": described(self._batches),
            "evaluation": self._held_out and described(self._held_out),
            "losses": [round(line["loss"], 6) for line in trained.history],
            "evaluation_losses": evaluation_losses(trained),
            **environment(dtype),
        }


def evaluation_losses(trained: Trained) -> dict[int, float]:
    """By step, where they were measured."""
    return {line["step"]: line["evaluation_loss"] for line in trained.history if "evaluation_loss" in line}


def _all_rows(data: windows.Spec | Mapping[str, windows.Spec]) -> bool:
    """Whether all of the data has window lengths of its own."""
    return all(map(windows.is_rows, data.values())) if isinstance(data, Mapping) else windows.is_rows(data)


def _notices(batches: Batches | Mixture, held_out: Batches | None) -> tuple[str, ...]:
    notices = [*batches.notices, *(held_out.notices if held_out else ())]
    if held_out is not None:
        if shared := overlap(batches, held_out):
            notices.append(
                f"{100 * shared:.0f} % of the evaluation windows share text with the training data: what is measured "
                "on them is no evidence"
            )
        if not isinstance(held_out.examples, Rows):
            notices.append(f"{held_out.source} is instruction data: its loss is measured, and no perplexity of text")
    return tuple(dict.fromkeys(notices))


def _shown(p: loop.Progress) -> Progress:
    parts = []
    if p.tokens_per_second:
        parts.append(f"{p.tokens_per_second:,.0f} tokens/s")
    if p.seconds_left is not None:
        minutes, seconds = divmod(round(p.seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return Progress(p.step, p.steps, ", ".join(parts), "train", p.loss)
