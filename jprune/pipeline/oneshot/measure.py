"""The perplexity before and after: measured once in a run, and never a reason to throw the run away."""

import dataclasses
from pathlib import Path

from jprune.checkpoints import Checkpoint, load
from jprune.errors import JpruneError
from jprune.evaluate.perplexity import Perplexity
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.begin import Run
from jprune.runs import processes
from jprune.runs.remembered import perplexity
from jprune.runs.report import Progress


def before(job: Job, run: Run) -> Perplexity | None:
    """The perplexity of the job's model, from an earlier process of the run if it has measured it."""
    if job.evaluation is None:
        return None
    name = f"before-{job.evaluation.sha256}"
    if (known := processes.decided_by_first(lambda: run.folder.marked(name))) is None:
        measured = _perplexity(job, run, job.checkpoint, "evaluate before")
        assert measured is not None
        known = dataclasses.asdict(measured)
        run.folder.mark(name, known)
    return Perplexity(**known)


def after(job: Job, run: Run, result: Path) -> tuple[Perplexity | None, tuple[str, ...]]:
    """The perplexity of the result, and a notice if it cannot be measured."""
    try:
        with processes.run_together():
            model = load(result)
        return _perplexity(job, run, model, "evaluate after"), ()
    except JpruneError as error:
        return None, (f"the perplexity after pruning could not be measured: {error}",)


def _perplexity(job: Job, run: Run, weights: Checkpoint, phase: str) -> Perplexity | None:
    if (evaluation := job.evaluation) is None:
        return None
    with run.stopwatch.phase("evaluation"):
        return perplexity(
            weights,
            evaluation.tokens,
            dtype=job.dtype,
            mesh=job.mesh,
            progress=lambda done, total: run.tell(Progress(float(done), total, evaluation.source, phase)),
        )
