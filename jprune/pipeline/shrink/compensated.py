"""A structured run whose result is refitted: in a run folder, block by block, and resumed after an interruption."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import formats, record
from jprune.pipeline.forecast.forecast import Forecast
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot import measure, result
from jprune.pipeline.oneshot.begin import Run
from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.options import Machine, Result
from jprune.pipeline.shrink.compensation import few_tokens, readers
from jprune.pipeline.shrink.report import ShrinkReport
from jprune.pipeline.shrink.scores import Positions, smaller_model, units_of
from jprune.pipeline.shrink.work import Work
from jprune.runs import failures, interrupt, output
from jprune.runs.folder import FINISHED, RunFolder
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes

KEPT = "kept"
_LESS_MEMORY = ("a shorter `compensation_length`", "`dtype` bfloat16", "not to refit (`compensate`)")


def shrink_and_refit(
    work: Work,
    job: Job,
    out: Path,
    place: Path,
    *,
    wanted: Result,
    machine: Machine,
    stopwatch: Stopwatch,
    progress: Callable[[Progress], None],
) -> ShrinkReport:
    """Removes what the work says, refits what the job says, and writes the result.

    Args:
      work: what is to go.
      job: what is refitted by which text, with every kernel that may lose inputs.
      out: folder of the result.
      place: the run folder.
      wanted: whether to resume, or to overwrite.
      machine: memory that may be taken.
      stopwatch: gets all phases.
      progress: called often.
    """
    source = work.checkpoint.source
    fingerprint = {**job.fingerprint(), **work.fingerprint()}
    folder = RunFolder(place, out=out, fingerprint=fingerprint, resume=wanted.resume, overwrite=wanted.overwrite)
    with failures.explained(folder, lambda: _LESS_MEMORY), interrupt.deferred() as check:

        def tell(step: Progress) -> None:
            progress(step)
            check()

        with stopwatch.phase("importance"):
            keep = _kept(work, folder, tell)
        smaller = work.checkpoint.select(keep)
        kernels = readers(work.checkpoint, units_of(work.checkpoint, work.method), keep)
        job = dataclasses.replace(job, kernels=kernels, cut=keep, format=work.format_of(smaller))
        run = Run.begin(job, Forecast(job, machine), folder, stopwatch, tell)
        before = measure.before(job, run)
        done = result.pruned(job, run)
        after, failure = measure.after(job, run, folder.partial)
        texts = work.examples.notices if work.examples else ()
        refitted = tuple(map(KernelReport.from_json, done["kernels"]))
        told = (*few_tokens(job, refitted), *formats.notices(smaller, job.format))
        report = ShrinkReport(
            out=out,
            method=work.method,
            parameters=(work.checkpoint.parameters, smaller.parameters),
            sizes=smaller.sizes,
            layers=tuple(range(smaller.config.layers)),
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            notices=tuple(dict.fromkeys((*texts, *run.notices, *told, *failure))),
            kernels=refitted,
        )
        record.write(folder.partial, _contents(work, job, run, report))
        folder.mark(FINISHED, {})
        output.publish(folder.partial, out, folder.old, overwrite=wanted.overwrite, source=source)
    folder.remove()
    return report


def _kept(work: Work, folder: RunFolder, tell: Callable[[Progress], None]) -> Positions:
    """The positions that stay, by path and axis: decided once in a run."""
    if (known := folder.marked(KEPT)) is None:
        found = smaller_model(work.checkpoint, work.method, work.target, work.examples, work.dtype, tell).keep
        known = {path: {str(axis): kept.tolist() for axis, kept in axes.items()} for path, axes in found.items()}
        folder.mark(KEPT, known)
    return {path: {int(axis): np.array(kept) for axis, kept in axes.items()} for path, axes in known.items()}


def _contents(work: Work, job: Job, run: Run, report: ShrinkReport) -> dict[str, Any]:
    """jprune.json."""
    assert job.calibration is not None  # `compensation.with_text`
    return {
        **work.contents(report, job.format, job.calibration.source),
        "compensation": {
            "calibration": job.calibration.described(),
            "kernels": [dataclasses.asdict(kernel) for kernel in report.kernels],
        },
        "layout": dataclasses.asdict(run.layout),
        "machine": run.machine,
        "resumed": run.folder.resumed,
    }
