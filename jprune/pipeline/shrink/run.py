"""One structured run: a checkpoint in, a smaller checkpoint and its record out.

The smaller model is a view of the larger one from the first step on (`Checkpoint.select`): it is measured, pruned
further and written as any checkpoint is, a block at a time. Where what is left is refitted (`compensation`), the run
goes through the model once more, and what it has done outlives an interruption, as does what is known of experts.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jprune import paths
from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.dtypes import activation_dtype
from jprune.data.held_out import beside
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity
from jprune.pipeline.job import Job
from jprune.pipeline.options import CalibrationText, Evaluation, Machine, Result, sorted_into
from jprune.pipeline.shrink import compensation
from jprune.pipeline.shrink.compensated import shrink_and_refit
from jprune.pipeline.shrink.experts import unseen
from jprune.pipeline.shrink.plan import check_target, planned
from jprune.pipeline.shrink.report import ShrinkReport
from jprune.pipeline.shrink.scores import smaller_model
from jprune.pipeline.shrink.work import Work, examples, format_of
from jprune.runs import failures, interrupt, output
from jprune.runs.folder import FINISHED, RunFolder, default_folder, finished
from jprune.runs.remembered import perplexity
from jprune.runs.report import Progress, environment
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes
from jprune.structured.base import UnitMethod
from jprune.structured.selection import Target

_LESS_MEMORY = ("fewer `examples`", "a shorter `sequence_length`", "`dtype` bfloat16")


def shrink_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: UnitMethod,
    target: Target | None = None,
    dtype: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> ShrinkReport:
    """Removes heads, channels, experts, hidden dimensions or layers of a model and writes the smaller one.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: e.g. `LLMPruner()`.
      target: how small; methods that say themselves which layers or experts stay need none.
      dtype: of the activations; float32 on CPU and for float16 weights, elsewhere what the weights have. Gradients
        are float32.
      progress: called often.
      **options: `calibration` and `calibration_proportions`, the source of the text that importance is read from and
        that what is left is refitted by, or token windows [n, length] for both (the method says how many and which);
        and the fields of `Evaluation`, `Result` and `Machine` in `jprune.pipeline.options`: evaluate, evaluate_length,
        evaluate_windows, format (by default "hf" if all layers end up equal, else "jprune"), overwrite, resume, memory,
        run. A run that neither refits nor looks at experts has nothing to resume: what is interrupted leaves nothing
        behind.

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
    """
    text, measured, wanted, machine = sorted_into(options, CalibrationText, Evaluation, Result, Machine)
    stopwatch = Stopwatch()
    shown, out = paths.given(out), paths.real(out)
    place = paths.real(machine.run) if machine.run else default_folder(out)
    if wanted.resume and finished(place, out):
        return ShrinkReport.from_record(record.read(out), shown, method)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    output.check(out, overwrite=wanted.overwrite, source=checkpoint.source)
    check_target(method, target)
    expected = planned(checkpoint, method, target)
    if expected is not None:  # what is certain to be refused after the work is refused before
        formats.check(expected, wanted.format or format_of(expected))
    with stopwatch.phase("data"):
        work = Work(
            checkpoint=checkpoint,
            method=method,
            target=target,
            dtype=activation_dtype(checkpoint, dtype),
            format=wanted.format,
            examples=examples(checkpoint, method, text),
            evaluation=measured.text(checkpoint),
        )
        job, why = _refitting(work, text, machine, place, resume=wanted.resume)
        if work.evaluation is not None:
            evaluation = beside(work.evaluation, work.examples, job.calibration if job else None)
            work = dataclasses.replace(work, evaluation=evaluation)
            job = job and dataclasses.replace(job, evaluation=evaluation)
    if job is None:
        report = _shrink(work, shown, place, wanted, stopwatch, progress, () if why is None else (why,))
    else:
        report = shrink_and_refit(
            work, job, out, place, wanted=wanted, machine=machine, stopwatch=stopwatch, progress=progress
        )
    return dataclasses.replace(report, out=shown)


def _refitting(
    work: Work, text: CalibrationText, machine: Machine, place: Path, *, resume: bool
) -> tuple[Job | None, str | None]:
    """What is to be refitted, with its text; or None, and why nothing is though it was to be."""
    job = compensation.job_of(work.checkpoint, work.method, text=text, dtype=work.dtype, keep=None)
    if job is None:
        return None, None
    job, why = compensation.with_text(dataclasses.replace(job, evaluation=work.evaluation))
    if job is None or (resume and place.exists()):  # a run that was begun had the memory
        return job, why
    why = compensation.too_large(job, machine, place)
    return (job, None) if why is None else (None, why)


def _shrink(
    work: Work,
    out: Path,
    place: Path,
    wanted: Result,
    stopwatch: Stopwatch,
    progress: Callable[[Progress], None],
    notices: tuple[str, ...],
) -> ShrinkReport:
    """Removes what the work says, and changes no weight that stays."""
    checkpoint, evaluation = work.checkpoint, work.evaluation

    def measure(weights: Checkpoint, phase: str) -> Perplexity | None:
        if evaluation is None:
            return None
        with stopwatch.phase("evaluation"):
            return perplexity(
                weights,
                evaluation.tokens,
                dtype=work.dtype,
                progress=lambda done, total: progress(Progress(float(done), total, evaluation.source, phase)),
            )

    with contextlib.ExitStack() as stack:
        run: RunFolder | None = None
        if work.method.needs == "experts":
            run, progress = stack.enter_context(_kept_run(work, paths.real(out), place, wanted, progress))
            folder = run.partial
        else:
            new = output.new_folder(out, overwrite=wanted.overwrite, source=checkpoint.source)
            folder = stack.enter_context(new)
        before = measure(checkpoint, "evaluate before")
        with stopwatch.phase("importance"):
            smaller, layers, _, experts = smaller_model(
                checkpoint, work.method, work.target, work.examples, work.dtype, progress, run
            )
        format = work.format_of(smaller)
        with stopwatch.phase("io"):
            told = formats.write(folder, smaller, format=format)
        try:
            after = measure(load(folder), "evaluate after")
        except JpruneError as error:  # the work is not thrown away for it
            after, told = None, (*told, f"the perplexity after pruning could not be measured: {error}")
        texts = [notice for text in (work.examples, evaluation) if text for notice in text.notices]
        report = ShrinkReport(
            out=out,
            method=work.method,
            parameters=(checkpoint.parameters, smaller.parameters),
            sizes=smaller.sizes,
            layers=layers,
            experts=experts,
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            notices=(*dict.fromkeys(texts), *notices, *unseen(experts), *told),
        )
        source = work.examples.source if work.examples else None
        record.write(folder, work.contents(report, format, source))
    return report


@contextlib.contextmanager
def _kept_run(
    work: Work, out: Path, place: Path, wanted: Result, progress: Callable[[Progress], None]
) -> Iterator[tuple[RunFolder, Callable[[Progress], None]]]:
    """A run folder for what is known of the experts, and whom to tell; its partial result becomes `out` in the end."""
    source = work.checkpoint.source
    versions = environment(work.dtype)["versions"]
    fingerprint = {
        "the model": work.checkpoint.fingerprint(),
        "--dtype": jnp.dtype(work.dtype).name,
        **work.fingerprint(),
        **{f"the version of {name}": version for name, version in versions.items()},
    }
    folder = RunFolder(place, out=out, fingerprint=fingerprint, resume=wanted.resume, overwrite=wanted.overwrite)
    with failures.explained(folder, lambda: _LESS_MEMORY), interrupt.deferred() as check:
        shutil.rmtree(folder.partial, ignore_errors=True)
        folder.partial.mkdir()

        def tell(step: Progress) -> None:
            progress(step)
            check()

        yield folder, tell
        folder.mark(FINISHED, {})
        output.publish(folder.partial, out, folder.old, overwrite=wanted.overwrite, source=source)
    folder.remove()
