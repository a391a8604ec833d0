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
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jprune import trees
from jprune.anatomy.kernels import prunable
from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.formats import Format
from jprune.data import windows
from jprune.data.for_model import evaluation_windows
from jprune.data.training import training_batches
from jprune.errors import JpruneError
from jprune.methods import Method, SparseGPT
from jprune.patterns import Scope, Unstructured
from jprune.pipeline import recipe as recipes
from jprune.pipeline.oneshot.run import prune_model
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.registry import name_of
from jprune.pipeline.rounds.schedule import (
    PruneAndTuneReport,
    Round,
    schedule,
    seconds_of,
    tuning_of_a_round,
    zeros_present,
)
from jprune.pipeline.training import tune_model
from jprune.runs import output
from jprune.runs.folder import default_folder, remove, state_folder
from jprune.runs.memory import trim
from jprune.runs.report import Progress, perplexity_of
from jprune.runs.stopwatch import peak_memory_bytes
from jprune.settings import begin_or_resume
from jprune.trees import count_zeros
from jprune.tuning import Full, Lora


def prune_and_tune(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    sparsity: float,
    data: windows.Spec,
    rounds: Sequence[float] | None = None,
    method: Method | None = None,
    per: Scope | None = None,
    tuning: Full | Lora | None = None,
    tune_length: int | None = None,
    windows_at_most: int | None = None,
    checkpoint_every: int | None = None,
    evaluate: windows.Spec | None = None,
    evaluate_length: int | None = None,
    evaluate_windows: int | None = None,
    format: Format = "hf",
    memory: int | None = None,
    fsdp: int = 1,
    keep_rounds: bool = False,
    resume: bool = False,
    overwrite: bool = False,
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
      windows_at_most: take only the first so many windows or records of the training data.
      checkpoint_every: steps of training between two checkpoints; by default a tenth of all.
      evaluate: source of a text whose perplexity is measured before, and in each round after pruning and after tuning.
      evaluate_length: tokens a window of it (512 for the demo model).
      evaluate_windows: take only the first so many of them.
      format: of the result, see `jprune.checkpoints.formats`.
      memory: bytes of memory that pruning may take.
      fsdp: devices over which the state of the training is cut up.
      keep_rounds: leave the models of all rounds in the folder ``rounds`` of the result.
      resume: go on with a run that was interrupted; begin if there is none.
      overwrite: replace an `out` that an earlier run wrote, and drop a run that was interrupted.
      progress: called often; phases begin with the number of the round.
      **options: calibration, filters and the like: other fields of `Recipe`. The seeds of it and of `tuning` go up by
        one a round, so that other windows come, in another order.

    Raises:
      JpruneError: anything that does not fit, found before the first round; or the failure of one, which is named. What
        is done is kept in ``OUT.run``, and `out` untouched.
      KeyboardInterrupt: Ctrl-C, at the next safe point; likewise.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    out = Path(out).expanduser()
    if not resume:  # else it may be the result of this very run
        output.check(out, overwrite=overwrite, source=checkpoint.source)
    method = SparseGPT() if method is None else method
    tuning = tuning_of_a_round(checkpoint, tuning)
    recipe = Recipe(pattern=Unstructured(sparsity, per), keep_zeros=True, **options)
    if not windows.is_rows(recipe.calibration):  # later rounds do not know that they are about the demo model
        samples, length = recipes.window_shape(checkpoint, recipe)
        recipe = dataclasses.replace(recipe, samples=samples, sequence_length=length)
    sparsities = schedule(sparsity, rounds, present=zeros_present(checkpoint, recipe))
    formats.check(checkpoint, format)
    if tune_length is None and not windows.is_rows(data):
        tune_length = checkpoint.suggested.training_length
    batches = training_batches(
        data,
        checkpoint,
        batch_size=tuning.batch_size,
        length=tune_length,
        windows_at_most=windows_at_most,
        epochs=tuning.passes,
        seed=tuning.seed,
    )
    evaluation = None
    if evaluate is not None:
        given = None if windows.is_rows(evaluate) else evaluate_length or checkpoint.suggested.evaluation_length
        evaluation = evaluation_windows(checkpoint, evaluate, length=given, count=evaluate_windows)
    described = {
        **{"sparsity": sparsity, "rounds": sparsities, "per": per},
        **{"pruner": name_of(method), **dataclasses.asdict(method)},
        **{"tuning": name_of(tuning), **dataclasses.asdict(tuning), "tune_length": batches.length},
        **_fields(recipe, leave_out=("pattern", "keep_zeros", "seed", "calibration", "overrides")),
        "calibration": str(recipe.calibration) if isinstance(recipe.calibration, str | Path) else None,
        "overrides": {regex: recipes.pattern_text(pattern) for regex, pattern in recipe.overrides.items()},
    }
    settings = {
        **{name: value for name, value in described.items() if name != "micro_batch"},
        "model": checkpoint.fingerprint(),
        "data": batches.fingerprint,
        "evaluation": evaluation and evaluation.sha256,
        "calibration_seed": recipe.seed,
        "format": format,
    }
    folder = default_folder(out)
    if resume and _finished(out, settings):
        remove(folder)
        return PruneAndTuneReport.from_record(record.read(out), out)
    output.check(out, overwrite=overwrite, source=checkpoint.source)
    work = _Rounds(
        checkpoint=checkpoint,
        folder=folder,
        sparsities=sparsities,
        method=method,
        tuning=tuning,
        recipe=recipe,
        evaluation=None if evaluation is None else evaluation.tokens,
        memory=memory,
        tune_options={
            "data": data,
            "sequence_length": batches.length,
            "windows_at_most": windows_at_most,
            "checkpoint_every": checkpoint_every,
            "fsdp": fsdp,
        },
        format=format,
        progress=progress,
    )
    with state_folder(folder, forget=overwrite and not resume):
        begin_or_resume(folder, settings, resume=resume)
        work.do()
        with output.new_folder(out, overwrite=overwrite, source=checkpoint.source) as part:
            work.gather(part, keep_rounds=keep_rounds)
            report = work.report(out, evaluation.notices if evaluation else ())
            about = {
                **{"recipe": {"method": "prune-and-tune", **described, "data": batches.source}, "run": settings},
                **work.details(),
                "evaluation": evaluation and evaluation.described(),
                "notices": list(report.notices),
            }
            record.write(part, {**report.json(), **about})
        remove(folder)
    return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rounds:
    """The rounds, in a run folder that is ours."""

    checkpoint: Checkpoint
    folder: Path
    sparsities: tuple[float, ...]
    method: Method
    tuning: Full | Lora
    recipe: Recipe
    evaluation: np.ndarray | None
    memory: int | None
    tune_options: dict[str, Any]
    format: Format
    progress: Callable[[Progress], None]

    def do(self) -> None:
        """Does what is not done."""
        model: Checkpoint | Path = self.checkpoint
        for number, sparsity in enumerate(self.sparsities, start=1):
            name = f"round {number} of {len(self.sparsities)} (sparsity {sparsity:g})"
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
        """The model after a round."""
        folder = self._folder(number)
        pruned, tuned = folder / "pruned", folder / "tuned"

        def tell(step: Progress) -> None:
            self.progress(dataclasses.replace(step, phase=f"{number}/{len(self.sparsities)} {step.phase}"))

        if not (tuned / record.NAME).exists():
            folder.mkdir(exist_ok=True)
            for left in folder.glob(".tuned.*"):  # of a process that was killed while it wrote
                shutil.rmtree(left)
            if sparsity > 0 and not (pruned / record.NAME).exists():
                recipe = dataclasses.replace(
                    self.recipe, pattern=self._pattern(sparsity), seed=self.recipe.seed + number - 1
                )
                prune_model(
                    model,
                    pruned,
                    method=self.method,
                    evaluate=self.evaluation if number == 1 else None,  # later, it is known from the round before
                    memory=self.memory,
                    resume=True,
                    progress=tell,
                    **_fields(recipe),
                )
                trim()
            tune_model(
                pruned if sparsity > 0 else model,
                tuned,
                method=dataclasses.replace(self.tuning, seed=self.tuning.seed + number - 1),
                evaluate=self.evaluation,
                format=self.format if number == len(self.sparsities) else None,
                resume=True,
                progress=tell,
                **self.tune_options,
            )
            trim()
        shutil.rmtree(pruned, ignore_errors=True)  # its record is part of that of the tuned model
        return tuned

    def gather(self, part: Path, *, keep_rounds: bool) -> None:
        """Puts together the result: the files of the last round, and what is kept of all; by links, where there are."""
        kept = self.sparsities if keep_rounds else ()
        last = self._folder(len(self.sparsities)) / "tuned"
        shutil.copytree(last, part, ignore=shutil.ignore_patterns(record.NAME), copy_function=_link, dirs_exist_ok=True)
        for number, sparsity in enumerate(kept, start=1):
            to = part / "rounds" / f"{number}-sparsity-{sparsity:g}"
            shutil.copytree(self._folder(number) / "tuned", to, copy_function=_link)

    def report(self, out: Path, notices: Sequence[str]) -> PruneAndTuneReport:
        """What came out, from the records of the rounds."""
        counted = prunable(self.checkpoint, recipes.chosen_kernels(self.checkpoint, self.recipe))
        sizes = {path: int(np.prod(shape.shape)) for path, shape in self.checkpoint.shapes.items()}
        zeros, done, all_records = 0, [], []
        for sparsity, pruned, tuned in self._records():
            if pruned is None:
                zeros = sum(count_zeros(np.asarray(self.checkpoint.read(path))) for path in counted)
            else:
                zeros = pruned["sparsity"]["zeros"]
            done.append(Round.from_records(sparsity, zeros, pruned, tuned))
            all_records += [tuned] if pruned is None else [pruned, tuned]
        return PruneAndTuneReport(
            out=out,
            pruner=name_of(self.method),
            tuning=name_of(self.tuning),
            sparsity=trees.Sparsity(zeros, sum(sizes[path] for path in counted), sum(sizes.values())),
            rounds=tuple(done),
            before=perplexity_of(all_records[0], "before"),
            after=perplexity_of(all_records[-1], "after"),
            seconds=seconds_of(done),
            peak_memory_bytes=max(peak_memory_bytes(), *(r["peak_memory_bytes"] for r in all_records)),
            notices=tuple(dict.fromkeys([*notices, *(notice for r in all_records for notice in r["notices"])])),
        )

    def details(self) -> dict[str, Any]:
        """What else jprune.json says: of the model before, of the data, and of the kernels at the last pruning."""
        *_, (_, pruned, tuned) = self._records()
        return {
            "model": self.checkpoint.described(),
            **{name: tuned[name] for name in ("data", "dtype", "versions", "device", "peak_device_memory_bytes")},
            **{name: pruned and pruned[name] for name in ("calibration", "kernels")},
        }

    def _records(self) -> Iterator[tuple[float, dict[str, Any] | None, dict[str, Any]]]:
        """Sparsity, record of the pruning if there was one, and record of the tuning of each round."""
        for number, sparsity in enumerate(self.sparsities, start=1):
            tuned = record.read(self._folder(number) / "tuned")
            yield sparsity, tuned["model"]["record"] if sparsity > 0 else None, tuned

    def _pattern(self, sparsity: float) -> Unstructured:
        assert isinstance(self.recipe.pattern, Unstructured)
        return dataclasses.replace(self.recipe.pattern, sparsity=sparsity)

    def _folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _remove_if_empty(self) -> bool:
        """Removes a run of which nothing is done, so that nobody is asked to resume it."""
        empty = not any(any(path.iterdir()) for path in self.folder.glob("round-*"))
        if empty:
            shutil.rmtree(self.folder, ignore_errors=True)
        return empty


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is the result of the same run, which was cut short before its folder was removed."""
    return (out / record.NAME).exists() and record.read(out).get("run") == json.loads(json.dumps(settings))


def _fields(recipe: Recipe, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(recipe)]
    return {name: getattr(recipe, name) for name in names if name not in leave_out}


def _link(source: str, target: str) -> None:
    """One file under a second name, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
