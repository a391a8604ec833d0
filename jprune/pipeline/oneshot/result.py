"""The result while it grows: the parameters that are pruned, those that are not, and its record."""

import dataclasses
from pathlib import Path
from typing import Any

from jprune.checkpoints import formats, huggingface, load, record, writing
from jprune.checkpoints.formats import Format
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.begin import Run
from jprune.pipeline.oneshot.blocks import prune_blocks
from jprune.pipeline.oneshot.cut import CutWriter
from jprune.pipeline.oneshot.journal import Journal
from jprune.pipeline.oneshot.report import Report
from jprune.runs import processes


def pruned(job: Job, run: Run) -> dict[str, Any]:
    """Prunes into the partial result as far as that is not done; returns its zeros, and reports on its kernels."""
    folder = run.folder
    done = processes.decided_by_first(lambda: folder.marked("converted"))
    if done is None:
        with processes.run_together():
            writer = _writer(job, run)
        journal = Journal(folder, writer, job.counted, run.room)
        reports = prune_blocks(job, run, journal)
        contents = {"zeros": journal.zeros, "kernels": [dataclasses.asdict(report) for report in reports]}
        with run.stopwatch.phase("io"):
            done = processes.decided_by_first(lambda: _complete(job, run, writer, contents))
    with processes.run_together():
        if job.format in formats.WHOLE and processes.is_first():
            for left in huggingface.weight_files(folder.partial):
                left.unlink()
    return done


def write_record(job: Job, run: Run, report: Report) -> None:
    """Writes jprune.json into the partial result; process 0 does."""
    contents = {
        **report.json(),
        **job.described(),
        "notices": list(report.notices),
        "kernels": [dataclasses.asdict(kernel) for kernel in report.kernels],
        "layout": dataclasses.asdict(run.layout),
        "machine": run.machine,
        "resumed": run.folder.resumed,
    }
    with processes.run_together(), writing.explained(run.folder.partial):
        if processes.is_first():
            record.write(run.folder.partial, contents)


def _writer(job: Job, run: Run) -> huggingface.Writer | CutWriter:
    """A writer of the partial result, whatever is in it already; in processes but the first only to read it."""
    partial = run.folder.partial
    if processes.is_first():
        with writing.explained(partial):
            partial.mkdir(exist_ok=True)
    on_the_way = "jprune" if job.format in formats.WHOLE else job.format
    model = job.checkpoint.select(job.cut) if job.cut else job.checkpoint
    writer = formats.writer(partial, model, format=on_the_way, reopen=True, follow=not processes.is_first())
    assert isinstance(writer, huggingface.Writer)
    return CutWriter(writer, job) if job.cut else writer


def _complete(job: Job, run: Run, writer: huggingface.Writer | CutWriter, contents: dict[str, Any]) -> dict[str, Any]:
    """Finishes the partial result, all of whose parameters are there; returns what the mark says of it."""
    writer.close()
    if job.format in formats.WHOLE:
        _write_whole(run.folder.partial, job.format)
    writing.sync_folder(run.folder.partial)
    run.folder.mark("converted", contents)
    return contents


def _write_whole(folder: Path, format: Format) -> None:
    """Adds to a Hugging Face folder the same parameters in a format that is not written kernel by kernel."""
    formats.discard(folder)  # half of one, from a process that was killed, would be taken for the model
    source = load(folder)
    with formats.writer(folder, source, format=format) as writer:
        for path in source.shapes:
            writer.write(path, source.read(path))
