"""The block pipeline: a whole model, one block at a time, stage by stage, each matmul computed once per token.

For every block: read its weights; for every stage of it (q, k, v; then o; then gate, up; then down) feed every
micro-batch of calibration tokens up to the inputs of the stage's matmuls, gather the method's statistic of each
distinct input, prune, and go on with the pruned weights. What leaves the last stage is the next block's input. The
originals run every block twice: once to gather statistics with its weights still dense, once more with them pruned.

While a block computes, one thread reads the weights of the next and another writes those of the last. Three blocks'
weights are in memory at most, however many there are.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import devices, trees
from jprune.anatomy.parts import Part
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.pipeline.forecast import programs
from jprune.pipeline.forecast.layout import hidden_specs
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.begin import Run
from jprune.pipeline.oneshot.journal import Journal, Step, route
from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.oneshot.stages import PartRun
from jprune.runs import processes
from jprune.runs.activations import Batches, Specs
from jprune.runs.background import Background


def prune_blocks(job: Job, run: Run, journal: Journal) -> list[KernelReport]:
    """Prunes the job's kernels, writes every parameter of the model to the journal's result, and skips what is done.

    Weights are read part by part, and keep their dtype.

    Args:
      job: what is to be done.
      run: where, and whom to tell.
      journal: knows what is done, and takes what is.

    Returns:
      One report per pruned kernel, in the order of the parts; in process 0, the others get none.

    Raises:
      JpruneError: weights or activations that are not finite, a Gram matrix that cannot be factorised, a full disk.
    """
    with jax.default_matmul_precision("highest"):  # float32 means float32: no TF32, no bfloat16 passes
        return _Blocks(job, run, journal).all()


class _Blocks:
    """One pass over a model."""

    def __init__(self, job: Job, run: Run, journal: Journal):
        self.job, self.run, self.journal = job, run, journal
        self.checkpoint, self.parts = job.checkpoint, job.parts
        self.stopwatch = run.stopwatch
        self.specs = (
            []
            if job.shape is None
            else hidden_specs(job.checkpoint.model.d_model, job.shape, run.layout, job.dtype, job.mesh, job.streams)
        )

        if job.recipe.reconstruct and len(self.specs) < 2:
            raise JpruneError(
                f"reconstruct={job.recipe.reconstruct} holds windows out: expected at least two calibration windows "
                f"for each of {job.mesh.shape[devices.DATA]} devices, got {job.shape and job.shape[0]}; give more "
                "`samples`, or reconstruct=0"
            )

    def all(self) -> list[KernelReport]:
        """Does what is not done; returns the reports of all."""
        with self.stopwatch.phase("io"):
            done = processes.decided_by_first(
                lambda: [self.journal.done(part.name, self._paths(part)) for part in self.parts]
            )
        missing = [i for i, finished in enumerate(done) if not finished]
        largest = max(sum(math.prod(shape) * np.dtype(d).itemsize for _, shape, d in u.shapes) for u in self.parts)
        with Background() as reading, Background(limit=largest) as writing:
            if self.job.method.statistic is None:
                steps = [Step(i, True, False) for i in missing]
            else:
                saved = self._load(missing)
                steps = route(missing, saved)
            self._walk(steps, saved if self.job.method.statistic else {}, reading, writing)
            self._rest(writing)
            with self.stopwatch.phase("io"):
                writing.wait()
        if not processes.is_first():
            return []
        return [report for part in self.parts for report in self.journal.reports(part.name)]

    def _load(self, missing: Sequence[int]) -> dict[int, Batches]:
        """The saved activations from which some missing part can start, in every process."""
        found = {}
        with self.stopwatch.phase("io"):
            for i in range(1, max(missing, default=-1) + 1):
                if (batches := self.journal.load(i, self.specs)) is not None:
                    found[i] = batches
            everywhere = set.intersection(*map(set, processes.gathered(list(found))))
        return {i: batches for i, batches in found.items() if i in everywhere}

    def _walk(self, steps: Sequence[Step], saved: dict[int, Batches], reading: Background, writing: Background) -> None:
        ahead: dict[int, Future] = {}
        hidden: Batches | None = None

        def read(at: int) -> None:
            if at < len(steps):
                ahead[at] = reading.submit(functools.partial(self._read, self.parts[steps[at].unit], steps[at].prune))

        read(0)
        for at, step in enumerate(steps):
            i, part = step.unit, self.parts[step.unit]
            where = part.shardings(self.job.mesh, self.checkpoint.model.d_model)
            with self.stopwatch.phase("io"):
                # Emptied on the way, so that no array is held twice.
                params, *others = (
                    {path: devices.place(values.pop(path), where[path]) for path, _, _ in part.shapes}
                    for values in ahead.pop(at).result()
                )
            read(at + 1)
            check_finite({part.path(path): value for path, value in params.items()})
            run = PartRun(i, self.job, self.run)
            after = None
            if self.job.method.statistic is None:
                params = run.without_data(params)
            else:
                if step.load:
                    hidden = saved.pop(i) if i in saved else self._embed(writing)
                assert hidden is not None
                goes_on = at + 1 < len(steps) and not steps[at + 1].load
                make = functools.partial(self._after, i, writing) if goes_on else None
                params, after = run.with_data(
                    params, hidden, make, dense=others[0] if others else None, pruned=not step.prune
                )
                if not hidden.saved:
                    hidden.drop()
            named = {part.path(path): devices.readable(value, self.job.mesh) for path, value in params.items()}
            with self.stopwatch.phase("io"):
                self.journal.save(part.name, i, named, run.reports, after, writing, written=not step.prune)
            del params, named, run, others
            hidden = after

    def _read(self, part: Part, prune: bool) -> list[dict[str, np.ndarray]]:
        """A part's weights: those of the model; or what has become of them, and again those of the model, if that is
        computed too."""
        if prune:
            return [read_part(self.checkpoint, part)]
        now = {path: self.journal.read(part.path(path)) for path, _, _ in part.shapes}
        return [now, read_part(self.checkpoint, part)] if self.job.streams > 1 else [now]

    def _paths(self, part: Part) -> list[str]:
        return [part.path(path) for path, _, _ in part.shapes]

    def _after(self, index: int, writing: Background) -> Batches:
        return self.journal.batches(index + 1, self.specs, writing, save=self.journal.due())

    def _rest(self, writing: Background) -> None:
        """Copies what belongs to no part that was gone through, in parts; process 0 does."""
        if not processes.is_first():
            return
        seen = {path for part in self.parts for path in self._paths(part)}
        parts: dict[str, list[str]] = {}
        for path in self.checkpoint.shapes:
            if path not in seen:
                parts.setdefault("/".join(path.split("/")[: 2 if path.startswith("blocks/") else 1]), []).append(path)
        with self.stopwatch.phase("io"):
            for name, paths in parts.items():
                if not self.journal.done(f"rest/{name}", paths):
                    values = {path: self.checkpoint.read(path) for path in paths}
                    self.journal.save(f"rest/{name}", len(self.parts), values, (), None, writing)

    def _embed(self, writing: Background) -> Batches:
        """The hidden states of all windows before the first part."""
        with self.stopwatch.phase("calibration"):
            return embedded(self.job, self.specs, self.journal.batches(0, self.specs, writing, save=False))


def embedded(job: Job, specs: Sequence[Specs], batches: Batches) -> Batches:
    """The hidden states of all calibration windows of a job before its first part, put into `batches`."""
    assert job.calibration is not None
    embed = embedding(job)
    start = 0
    for j, (x, *_) in enumerate(specs):
        tokens = job.calibration.tokens[start : start + x.shape[0]]
        start += x.shape[0]
        batches.put(j, (jax.block_until_ready(embed(tokens, x.sharding)),) * job.streams)
    return batches


def embedding(job: Job) -> Callable[[np.ndarray, Any], jax.Array]:
    """f(tokens [n, length], sharding): the hidden states before the first part, as they lie on the devices."""
    everywhere = devices.replicated(job.mesh)
    read = job.checkpoint.params("embed")
    params = {"embed": jax.tree.map(lambda value: devices.place(value, everywhere), read)}
    check_finite(trees.flatten(params))
    embed = job.checkpoint.model.embed
    return lambda tokens, where: programs.forward(embed, where)(params, devices.place(tokens, where)).astype(job.dtype)


def read_part(checkpoint: Checkpoint, part: Part) -> dict[str, np.ndarray]:
    """A part's weights as the model has them, by path in the part."""
    paths = {path: part.path(path) for path, _, _ in part.shapes}
    if checkpoint.reads_together:
        values = checkpoint.read_many(list(paths.values()))
        return {path: values[whole] for path, whole in paths.items()}
    return {path: np.asarray(checkpoint.read(whole), order="C") for path, whole in paths.items()}


def check_finite(params: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Raises `JpruneError` for weights that are NaN or inf."""
    for path, value in params.items():
        if not _all_finite(value):
            raise JpruneError(f"{path} has weights that are NaN or inf; the checkpoint is damaged")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))
