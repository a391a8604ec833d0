"""From a checkpoint and a way to train to a folder with what was trained and its record.

`train_model` is the one driver of all runs that train; it knows no method but by `jprune.tuning.base.TrainedMethod`.
The result is a folder like any other, with jprune.json and metrics.jsonl; it appears when all is done.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jprune import paths
from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.formats import Format
from jprune.pipeline.options import TrainOptions
from jprune.pipeline.registry import name_of
from jprune.pipeline.training.session import Session, evaluation_losses
from jprune.runs import output
from jprune.runs.folder import default_folder, remove
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes
from jprune.train import metrics
from jprune.train.loop import Trained
from jprune.tuning.base import Outcome, TrainedMethod
from jprune.tuning.report import PrunedReport, TuneReport


def train_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    method: TrainedMethod,
    options: TrainOptions,
    progress: Callable[[Progress], None] = lambda _: None,
) -> TuneReport:
    """Trains a model by a method, and writes the result with its record.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; the state of the run is beside it until it is there, in ``OUT.run``.
      method: what is trained, and what comes out.
      options: the data, and how the run goes.
      progress: called often.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      jprune.train.loop.Interrupted: Ctrl-C; the state is kept in ``OUT.run``.
    """
    stopwatch, result = Stopwatch(), options.result
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    shown, out = paths.given(out), paths.real(out)
    output.check(out, overwrite=result.overwrite, source=checkpoint.source)
    prepared = method.prepare(checkpoint)
    format = result.format or ("hf" if prepared.planned.config.uniform else "jprune")
    formats.check(prepared.planned, format)  # what cannot be written is refused before the work
    session = Session(checkpoint, method, options, stopwatch, progress)
    with stopwatch.phase("load"):
        task = prepared.task(session.data.steps)
    before = session.perplexity(checkpoint, task.dtype, "evaluate before")
    recipe = {"method": name_of(method), **dataclasses.asdict(method), **prepared.recipe}
    folder = default_folder(out)
    trained = session.train(task, folder, {name: x for name, x in recipe.items() if name not in method.only_how})
    outcome = task.result(trained.trainable)
    with output.new_folder(out, overwrite=result.overwrite, source=checkpoint.source) as part:
        with stopwatch.phase("io"):
            told = _write(outcome, part, format)
            shutil.copy2(folder / metrics.NAME, part / metrics.NAME)
        after, failed = session.perplexity_after(part if outcome.weights is None else outcome.weights, task.dtype)
        report = outcome.report(
            out=shown,
            method=recipe["method"],
            steps=session.data.steps,
            parameters=checkpoint.parameters,
            trainable_parameters=outcome.trainable_parameters,
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            notices=(*session.notices, *outcome.notices, *told, *failed),
            domains=session.domains(trained),
            **_learnt(trained),
        )
        about = {"recipe": recipe, **outcome.details, **session.record(trained, task.dtype)}
        if isinstance(report, PrunedReport):  # new shapes are written in one format or another
            about["format"] = format
        record.write(part, {**report.json(), **about, "notices": list(report.notices)})
    remove(folder)
    return report


def _write(outcome: Outcome, folder: Path, format: Format) -> tuple[str, ...]:
    """Writes the result in its own form or as a whole model, and returns notices."""
    if outcome.write is not None:
        return outcome.write(folder)
    with formats.writer(folder, outcome.model, format=format) as writer:
        for path, values in outcome.leaves:
            writer.write(path, values)
    return formats.notices(outcome.model, format)


def _learnt(trained: Trained) -> dict[str, Any]:
    """The fields of a report that the training itself has."""
    return {
        "best_step": trained.step,
        "losses": tuple(line["loss"] for line in trained.history),
        "evaluation_losses": evaluation_losses(trained),
        "tokens_per_second": trained.tokens_per_second,
        "resumed_from": trained.resumed_from,
    }
