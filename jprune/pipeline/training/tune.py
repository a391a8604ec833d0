"""One tuning run: a pruned checkpoint in, a recovered one and its record out.

The result is a folder like any other, with jprune.json and metrics.jsonl; it appears when all is done.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jprune.checkpoints import Checkpoint, formats, load
from jprune.checkpoints.formats import Format
from jprune.checkpoints.huggingface import peft
from jprune.data import windows
from jprune.pipeline.training.domains import DynamicLoading
from jprune.pipeline.training.run import Result, TuneReport, model_writer, train_and_write
from jprune.pipeline.training.session import Training
from jprune.runs import output
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch
from jprune.train import lora
from jprune.tuning.recovery import TUNINGS, Full, Lora, Task

PyTree = Any
EPOCHS = {"lora": 2, "full": 1}
"""Unless said otherwise."""


def tune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: Lora | Full,
    data: windows.Spec | Mapping[str, windows.Spec],
    proportions: Mapping[str, int | float] | None = None,
    dynamic_loading: DynamicLoading | None = None,
    sequence_length: int | None = None,
    windows_at_most: int | None = None,
    train_on_prompt: bool = False,
    evaluate: windows.Spec | Mapping[str, windows.Spec] | None = None,
    evaluate_length: int | None = None,
    evaluate_windows: int | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    format: Format | None = None,
    fsdp: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> TuneReport:
    """Tunes a model and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes: mostly a folder that jprune has pruned.
      out: folder of the result; it appears when everything is done.
      method: `Lora(...)` or `Full(...)`.
      data: source of the training data (`jprune.data.sources`): text, or records of instructions; or token windows. Or
        the sources of several domains by name, from which windows are drawn by weights.
      proportions: the domains' weights at the beginning; by default their numbers of windows.
      dynamic_loading: how the domains' weights follow their losses; without it they stay.
      sequence_length: tokens a window; by default 2048 for text and 256 for instructions, at most the model's context
        (256 for the demo model).
      windows_at_most: take only the first so many windows or records (of each domain).
      train_on_prompt: take the loss on the prompts of instructions too.
      evaluate: source of a text whose perplexity is measured before and after, or of instructions. Or sources by
        domain, to measure the domains' losses on; of a domain without one, windows are held out for it.
      evaluate_length: tokens a window of it; by default as for `jprune eval perplexity` (512 for the demo model).
      evaluate_windows: take only the first so many of them; hold out so many of each domain (one in 20, at most 256).
      evaluate_every: steps between two evaluations on it, or of the domains; the best state is the result. By default
        the last counts; with dynamic loading, each twentieth of the steps is followed by one.
      checkpoint_every: steps between two checkpoints in ``OUT.run``; by default a tenth of all.
      format: see `jprune.checkpoints.formats`; by default "hf" if all layers are equal, else "jprune".
      fsdp: over how many devices parameters and optimizer state are cut up; the others share out the data.
      resume: go on with the run in ``OUT.run``, if there is one.
      overwrite: replace an `out`, and forget an ``OUT.run``, that an earlier run left.
      progress: called often.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    stopwatch = Stopwatch()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out).expanduser()
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    chosen: Format = format or ("hf" if checkpoint.config.uniform else "jprune")
    formats.check(checkpoint, chosen)
    name = method_name(method)
    training = Training(
        checkpoint,
        method,
        stopwatch,
        progress,
        epochs=EPOCHS[name],
        data=data,
        proportions=proportions,
        dynamic_loading=dynamic_loading,
        sequence_length=sequence_length,
        windows_at_most=windows_at_most,
        train_on_prompt=train_on_prompt,
        evaluate=evaluate,
        evaluate_length=evaluate_length,
        evaluate_windows=evaluate_windows,
        fsdp=fsdp,
    )
    with stopwatch.phase("load"):
        task = method.task(checkpoint, training.steps)
    if isinstance(method, Lora) and method.keep_adapters:
        for path in method.adapters(task.trainable):
            peft.name(checkpoint, path)
    return train_and_write(
        training,
        task,
        out,
        recipe={"method": name, **dataclasses.asdict(method)},
        result=lambda trained: _result(checkpoint, method, task, trained.trainable, chosen),
        report=TuneReport,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
    )


def method_name(method: Lora | Full) -> str:
    """The name a way of tuning has on the command line."""
    return next(name for name, kind in TUNINGS.items() if kind is type(method))


class _Tuned:
    """A model and its trained adapters as weights to be read, without a file."""

    def __init__(self, checkpoint: Checkpoint, task: Task, trainable: PyTree) -> None:
        self.config = checkpoint.config
        self._checkpoint, self._task, self._trainable = checkpoint, task, trainable

    def params(self, prefix: str) -> dict[str, Any]:
        """The subtree of parameters below a path."""
        from jprune import trees

        start = f"{prefix}/" if prefix else ""
        below = [path for path in self._checkpoint.shapes if path.startswith(start)]
        return trees.unflatten({p.removeprefix(start): self._task.read(self._trainable, p) for p in below})


def _result(checkpoint: Checkpoint, method: Lora | Full, task: Task, trainable: PyTree, format: Format) -> Result:
    """The tuned model; or its adapters, if they are to stay adapters."""
    count = lora.trainable_parameters(trainable)
    trainable = jax.tree.map(np.asarray, trainable)
    if not (isinstance(method, Lora) and method.keep_adapters):
        leaves = ((path, task.read(trainable, path)) for path in checkpoint.shapes)
        return Result(write=model_writer(checkpoint, leaves, format), trainable_parameters=count)

    def write(folder: Path) -> tuple[str, ...]:
        peft.save(folder, checkpoint, method.adapters(trainable), alpha=method.alpha, dropout=method.dropout)
        return (f"only the adapters were written; they go with {checkpoint.source}",)

    return Result(write=write, trainable_parameters=count, weights=_Tuned(checkpoint, task, trainable))
