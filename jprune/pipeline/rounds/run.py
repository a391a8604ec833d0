"""Prune-and-Tune: a model becomes sparse in rounds, and is trained between them.

A round (`jprune.pipeline.rounds.schedule`) calibrates anew, prunes to the next sparsity, where what is zero stays zero
and is among the zeros asked for, and trains what is left. A round at sparsity 0 only trains, as the first of the
authors does.

Rounds are made of `prune_model` and `tune_model` and of nothing else: done by hand, they end in the same bits.

OUT.run/settings.json     what the run is of
OUT.run/round-K/pruned    the model before training, until it is trained; pruned.run while it is made
OUT.run/round-K/tuned     the model after the round, with the records of both; tuned.run while it is trained

A folder is there whole or not at all, so a run goes on with the first one that is missing.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jprune import paths
from jprune.checkpoints import Checkpoint, load, record
from jprune.checkpoints.formats import Format
from jprune.data.windows import Spec
from jprune.errors import JpruneError
from jprune.methods import Method, SparseGPT
from jprune.patterns import Scope, Unstructured
from jprune.pipeline.oneshot.run import prune_model
from jprune.pipeline.options import Evaluation, Machine, Result, Schedule, TrainingData, fields_of, sorted_into
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.rounds.job import RoundsJob
from jprune.pipeline.rounds.report import PruneAndTuneReport, contents_of, report_of
from jprune.pipeline.training import tune_model
from jprune.runs import output
from jprune.runs.folder import default_folder, remove, state_folder
from jprune.runs.memory import trim
from jprune.runs.report import Progress
from jprune.settings import as_json, begin_or_resume
from jprune.tuning.base import Taught


def prune_and_tune(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    sparsity: float,
    data: Spec,
    rounds: Sequence[float] | None = None,
    method: Method | None = None,
    per: Scope | None = None,
    tuning: Taught | None = None,
    tune_length: int | None = None,
    windows_at_most: int | None = None,
    keep_rounds: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> PruneAndTuneReport:
    """Prunes and trains a model in rounds, and writes the result.

    Args:
      model: a checkpoint, or what `jprune.load` takes. Where it is zero it stays so.
      out: folder of the result; it appears when everything is done.
      sparsity: share of zeros after the last round, in [0, 1).
      data: source of the training data, as for `tune_model`.
      rounds: the sparsities of all rounds, see `jprune.pipeline.rounds.schedule.schedule`.
      method: prunes; by default `SparseGPT()`.
      per: where weights compete, see `Unstructured`.
      tuning: trains; by default `Full()`. Of each round: its steps (100 unless it says steps or epochs), and its
        learning rate from the warm-up on.
      tune_length: tokens of a training window, as `sequence_length` of `tune_model`.
      windows_at_most: number of windows or records taken from the beginning of the training data; by default all.
      keep_rounds: leave the models of all rounds in the folder ``rounds`` of the result.
      progress: called often; phases begin with the number of the round.
      **options: the other fields of `Recipe` (calibration, filters and the like), and those of `Schedule`,
        `Evaluation`, `Result` and `Machine` in `jprune.pipeline.options`. The seeds of the recipe and of `tuning` go up
        by one a round, so that other windows come, in another order.

    Raises:
      JpruneError: anything that does not fit, found before the first round; or the failure of one, which is named. What
        is done is kept in ``OUT.run``, and `out` untouched.
      KeyboardInterrupt: Ctrl-C, at the next safe point; what is done is kept too.
    """
    recipe, schedule, measured, result, machine = sorted_into(
        dict(pattern=Unstructured(sparsity, per), keep_zeros=True, **options),
        *(Recipe, Schedule, Evaluation, Result, Machine),
    )
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    shown, out = paths.given(out), paths.real(out)
    if not result.resume:  # else it may be the result of this very run
        output.check(out, overwrite=result.overwrite, source=checkpoint.source)
    method = SparseGPT() if method is None else method
    training = TrainingData(data=data, sequence_length=tune_length, windows_at_most=windows_at_most)
    format: Format = result.format or "hf"
    job = RoundsJob.of(checkpoint, method, tuning, rounds, recipe, training, schedule, measured, format)
    settings = as_json(job.settings())
    folder = paths.real(machine.run) if machine.run else default_folder(out)
    if result.resume and _finished(out, settings):
        remove(folder)
        return PruneAndTuneReport.from_record(record.read(out), shown)
    output.check(out, overwrite=result.overwrite, source=checkpoint.source)
    work = _Rounds(job=job, folder=folder, machine=machine, progress=progress)
    with state_folder(folder, forget=result.overwrite and not result.resume):
        begin_or_resume(folder, settings, resume=result.resume)
        work.do()
        with output.new_folder(out, overwrite=result.overwrite, source=checkpoint.source) as part:
            work.gather(part, keep_rounds=keep_rounds)
            report = report_of(job, work.records(), shown)
            record.write(part, contents_of(job, work.records(), report, settings))
        remove(folder)
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rounds:
    """The rounds, in a run folder that is locked."""

    job: RoundsJob
    folder: Path
    machine: Machine
    progress: Callable[[Progress], None]

    def do(self) -> None:
        """Does what is not done."""
        model: Checkpoint | Path = self.job.checkpoint
        for number, sparsity in enumerate(self.job.sparsities, start=1):
            name = f"round {number} of {len(self.job.sparsities)} (sparsity {sparsity:g})"
            try:
                model = self._round(number, sparsity, model)
            except JpruneError as error:
                self._remove_if_empty()
                raise type(error)(f"{name}: {error}") from error
            except KeyboardInterrupt:
                kept = f"what is done is kept in {self.folder}: go on with the same command and `resume`"
                raise KeyboardInterrupt(
                    f"in {name}; {'nothing was done' if self._remove_if_empty() else kept}"
                ) from None

    def _round(self, number: int, sparsity: float, model: Checkpoint | Path) -> Path:
        """The folder of the model after a round."""
        folder = self._folder(number)
        pruned, tuned = folder / "pruned", folder / "tuned"
        if not (tuned / record.NAME).exists():
            folder.mkdir(exist_ok=True)
            for left in folder.glob(".tuned.*"):  # of a process that was killed while it wrote
                shutil.rmtree(left)
            if sparsity > 0 and not (pruned / record.NAME).exists():
                self._prune(number, model, pruned)
            self._tune(number, pruned if sparsity > 0 else model, tuned)
        shutil.rmtree(pruned, ignore_errors=True)  # its record is part of that of the tuned model
        return tuned

    def _prune(self, number: int, model: Checkpoint | Path, out: Path) -> None:
        evaluation = self.job.evaluation if number == 1 else None  # later, it is known from the round before
        prune_model(
            model,
            out,
            method=self.job.method,
            evaluate=evaluation and evaluation.tokens,
            resume=True,
            progress=self._told(number),
            **fields_of(self.job.recipe_of(number), dataclasses.replace(self.machine, run=None)),
        )
        trim()

    def _tune(self, number: int, model: Checkpoint | Path, out: Path) -> None:
        job = self.job
        tune_model(
            model,
            out,
            method=job.tuning_of(number),
            evaluate=job.evaluation and job.evaluation.tokens,
            format=job.format if number == len(job.sparsities) else None,
            resume=True,
            progress=self._told(number),
            **fields_of(job.data, job.schedule),
        )
        trim()

    def _told(self, number: int) -> Callable[[Progress], None]:
        """Tells the progress of a round under its number."""
        count = len(self.job.sparsities)
        return lambda step: self.progress(dataclasses.replace(step, phase=f"{number}/{count} {step.phase}"))

    def gather(self, part: Path, *, keep_rounds: bool) -> None:
        """Puts together the result: the files of the last round, and what is kept of all; by links, where there are."""
        kept = self.job.sparsities if keep_rounds else ()
        last = self._folder(len(self.job.sparsities)) / "tuned"
        shutil.copytree(last, part, ignore=shutil.ignore_patterns(record.NAME), copy_function=_link, dirs_exist_ok=True)
        for number, sparsity in enumerate(kept, start=1):
            to = part / "rounds" / f"{number}-sparsity-{sparsity:g}"
            shutil.copytree(self._folder(number) / "tuned", to, copy_function=_link)

    def records(self) -> list[dict[str, Any]]:
        """The record of the tuned model of every round; that of the pruned model is part of it."""
        return [record.read(self._folder(number + 1) / "tuned") for number in range(len(self.job.sparsities))]

    def _folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _remove_if_empty(self) -> bool:
        """Removes a run of which nothing is done, so that nobody is asked to resume it."""
        empty = not any(any(path.iterdir()) for path in self.folder.glob("round-*"))
        if empty:
            remove(self.folder)
        return empty


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is the result of the same run, which was cut short before its folder was removed."""
    return (out / record.NAME).exists() and record.read(out).get("run") == settings


def _link(source: str, target: str) -> None:
    """One file under a second name, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
