"""One run: a checkpoint in, a pruned checkpoint and its record out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jprune import paths
from jprune.checkpoints import Checkpoint, formats, load, record
from jprune.checkpoints.formats import Format
from jprune.methods import Method
from jprune.patterns import Pattern
from jprune.pipeline.auto import Auto
from jprune.pipeline.forecast.allocation import with_allocation
from jprune.pipeline.forecast.forecast import Forecast, Plan
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot import measure, result
from jprune.pipeline.oneshot.allocate import allocated
from jprune.pipeline.oneshot.begin import Run
from jprune.pipeline.oneshot.report import KernelReport, Report
from jprune.pipeline.options import Evaluation, Machine, Result, sorted_into
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.registry import name_of
from jprune.runs import failures, interrupt, output, processes
from jprune.runs.folder import FINISHED, RunFolder, default_folder, finished
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch, peak_memory_bytes


def prune_model(
    model: Checkpoint | str | Path,
    out: str | Path,
    *,
    method: Method | Auto,
    pattern: Pattern,
    mesh: Mesh | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Prunes a model and writes the result, block by block.

    Where `jax.distributed.initialize` has joined several processes, all call this with the same arguments; process 0
    writes.

    Args:
      model: a checkpoint, or what `jprune.load` takes.
      out: folder of the result; it appears when everything is done.
      method: e.g. `SparseGPT()`; or `Auto()`, which chooses one.
      pattern: e.g. `Unstructured(0.5)`.
      mesh: the devices, see `jprune.devices`; by default all of them, with windows of calibration shared out.
      progress: called often.
      **options: the other fields of `Recipe` (calibration, filters and the like), and those of `Evaluation`, `Result`
        and `Machine` in `jprune.pipeline.options`: format ("hf"), evaluate, overwrite, resume, run, memory, ...

    Raises:
      JpruneError: anything that does not fit; `out` is then untouched.
      KeyboardInterrupt: Ctrl-C, at the next safe point. What is done is kept, as after any failure.
    """
    stopwatch = Stopwatch()
    recipe, measured, wanted, machine = sorted_into(
        {"pattern": pattern, **options}, Recipe, Evaluation, Result, Machine
    )
    shown, out = paths.given(out), paths.real(out)
    place = paths.real(machine.run) if machine.run else default_folder(out)
    if wanted.resume and processes.decided_by_first(lambda: finished(place, out)):
        return Report.from_record(record.read(out), shown)
    with processes.run_together(), stopwatch.phase("data"):
        checkpoint = model if isinstance(model, Checkpoint) else load(model)
        format: Format = wanted.format or "hf"
        output.check(out, overwrite=wanted.overwrite, source=checkpoint.source)
        formats.check(checkpoint, format)
        job = Job.planned(checkpoint, method, recipe, mesh, format).with_text(measured)
    folder = _opened(job, place, out, wanted)
    forecast = Forecast(job, machine)
    with failures.explained(folder, forecast.advice), interrupt.deferred() as check:

        def tell(step: Progress) -> None:
            progress(step)
            check()

        run = Run.begin(job, forecast, folder, stopwatch, tell)
        before = measure.before(job, run)
        job, planned = allocated(job, run, machine), job
        done = result.pruned(job, run)
        after, failure = measure.after(job, run, folder.partial)
        report = Report(
            out=folder.partial,
            method=name_of(job.method),
            pattern=str(pattern),
            sparsity=job.sparsity(done["zeros"]),
            before=before,
            after=after,
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
            kernels=tuple(map(KernelReport.from_json, done["kernels"])),
            allocation=planned.blocks_json(job),
            chosen=job.chosen and job.chosen.json(),
            notices=(*run.notices, *failure, *_few_tokens(job, done["kernels"])),
        )
        result.write_record(job, run, report)
        with processes.run_together():
            if processes.is_first():
                folder.mark(FINISHED, {})
                output.publish(folder.partial, out, folder.old, overwrite=wanted.overwrite, source=checkpoint.source)
    folder.remove()
    return dataclasses.replace(report, out=shown)


def _opened(job: Job, place: Path, out: Path, wanted: Result) -> RunFolder:
    """The run folder, locked, after all processes have agreed on what is to be done."""
    fingerprint = job.fingerprint()
    text = {"the evaluation text or its windows": job.evaluation.sha256 if job.evaluation else None}
    processes.check_alike({"--out": str(out.resolve()), "--run": str(place.resolve()), **fingerprint, **text})
    return RunFolder(place, out=out, fingerprint=fingerprint, resume=wanted.resume, overwrite=wanted.overwrite)


def _few_tokens(job: Job, kernels: list[dict[str, Any]]) -> tuple[str, ...]:
    """A notice, if experts were pruned by magnitude because they saw too little."""
    few = {k["path"]: len(k["few_tokens"]) for k in kernels if k.get("few_tokens")}
    if not few:
        return ()
    return (
        f"{max(few.values())} experts of {max(few, key=lambda path: few[path])} saw fewer than "
        f"{job.recipe.least_tokens} calibration tokens and were pruned by magnitude (so were some in "
        f"{len(few)} kernels in all, see few_tokens in jprune.json); more calibration text helps",
    )


def plan_run(
    model: Checkpoint | str | Path,
    *,
    method: Method | Auto,
    pattern: Pattern,
    out: str | Path = ".",
    mesh: Mesh | None = None,
    **options: Any,
) -> Plan:
    """What `prune_model` would do, without reading a weight or a text; arguments are the same.

    Of the options it takes those of `Recipe` and `Machine`. Compiles the programs of each kind of block, to ask what
    they take, and measures this machine for two seconds.

    Raises:
      JpruneError: as `prune_model`, for what can be known from shapes.
    """
    recipe, machine = sorted_into({"pattern": pattern, **options}, Recipe, Machine)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    job = Job.planned(checkpoint, method, recipe, mesh)
    return with_allocation(Forecast(job, machine).plan(paths.given(out)), job, machine, paths.given(out))
