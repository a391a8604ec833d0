"""The functions that train a model, by way: each sorts its keywords into `TrainOptions` and leaves the rest to the run.

The keywords are the fields of `TrainingData`, `Evaluation`, `Schedule` and `Result` in `jprune.pipeline.options`, where
each is explained.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from jprune.checkpoints import Checkpoint, load
from jprune.data.windows import Spec
from jprune.pipeline.options import TrainOptions
from jprune.pipeline.training.run import train_model
from jprune.runs.report import Progress
from jprune.tuning.base import TrainedMethod
from jprune.tuning.loraprune import LoRAPrune, LoRAPruneReport
from jprune.tuning.report import TuneReport
from jprune.tuning.shearing import Shearing, ShearingReport


def tune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: TrainedMethod,
    data: Spec | Mapping[str, Spec],
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> TuneReport:
    """Tunes a model and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes: mostly a folder that jprune has pruned.
      out: folder of the result; it appears when everything is done.
      method: `Lora(...)` or `Full(...)`, or any other way to train.
      data: source of the training data (`jprune.data.sources`): text, or records of instructions; or token windows. Or
        the sources of several domains by name, from which windows are drawn by weights.
      progress: called often.
      options: proportions, dynamic_loading, sequence_length, windows_at_most, train_on_prompt (see `TrainingData`);
        evaluate, evaluate_length, evaluate_windows (`Evaluation`); evaluate_every, checkpoint_every, fsdp (`Schedule`);
        format, resume, overwrite (`Result`).

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    return train_model(model, out, method, TrainOptions.of(data=data, **options), progress)


def loraprune_model(
    model: Checkpoint | str | Path, out: str | Path, *, method: LoRAPrune, **options: Any
) -> LoRAPruneReport:
    """Prunes a model while adapters are trained, and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: `LoRAPrune(ratio=0.5)` or `LoRAPrune(sparsity=0.5)`.
      options: data, progress and the rest, as for `tune_model`; what is measured on the way goes into the metrics, and
        the last state becomes the result.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    return cast(LoRAPruneReport, tune_model(model, out, method=method, **options))


def shear_model(model: Checkpoint | str | Path, out: str | Path, *, method: Shearing, **options: Any) -> ShearingReport:
    """Prunes a model to a target shape while it is trained, and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: `Shearing(target="layers=24,hidden=2048", steps=3200)`.
      options: data, progress and the rest, as for `tune_model`; what is measured on the way goes into the metrics, and
        into the weights of domains, and the last state becomes the result.

    Raises:
      JpruneError: anything that does not fit, or multipliers that run away; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    return cast(ShearingReport, tune_model(model, out, method=method, **options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run that trains would leave, as far as shapes tell."""

    parameters: tuple[int, int]
    """Number of parameters before and after."""
    sizes: tuple[dict[str, int], ...]
    """Sizes of every layer of the result."""


def plan_training(model: Checkpoint | str | Path, *, method: TrainedMethod) -> TrainingPlan:
    """The sizes of the result, without a weight or a text; a folder with a config.json is enough.

    Raises:
      JpruneError: as the run, for what can be known from shapes.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    planned = method.prepare(checkpoint).planned
    return TrainingPlan(parameters=(checkpoint.parameters, planned.parameters), sizes=planned.sizes)


plan_loraprune = plan_shearing = plan_training


__all__ = [
    "TrainingPlan",
    "loraprune_model",
    "plan_loraprune",
    "plan_shearing",
    "plan_training",
    "shear_model",
    "tune_model",
]
