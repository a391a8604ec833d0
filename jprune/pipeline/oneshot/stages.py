"""One part (a decoder block, or the head), stage by stage: calibrate, prune, go on with the pruned weights.

Micro-batches pass in their order, two at a time, and what they add to a statistic is added in that order: the same
part, weights, activations and layout give the same bits, whenever and wherever the activations lie.

On a mesh, the windows of a micro-batch are shared out. Each device adds up the statistics of what it sees, and they are
reduced over the devices once a stage; kernels are solved for with their outputs shared out.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel
from jprune.pipeline.forecast import learning, programs
from jprune.pipeline.forecast.programs import Spec
from jprune.pipeline.job import Job
from jprune.pipeline.oneshot.begin import Run
from jprune.pipeline.oneshot.flight import Flight
from jprune.pipeline.oneshot.reconstruct import reconstruct
from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.oneshot.solve import solve
from jprune.pipeline.oneshot.sums import ByInput, Sums
from jprune.runs import memory
from jprune.runs.activations import Arrays, Batches
from jprune.runs.report import Progress
from jprune.statistics import Statistic

Params = dict[str, jax.Array]  # by path in the part
Solve = Callable[
    [Job, Mapping[str, Kernel], Mapping[str, jax.Array], Statistic | None], tuple[Params, list[KernelReport]]
]
Inputs = Mapping[str, tuple[int, ...]]  # what each parameter of a stage reads, see `programs.inputs_of`


class PartRun:
    """One part of one run.

    Args:
      index: its number among the job's.
      job: what is to be done.
      run: where, and whom to tell.
      solve: what is done with kernels that read one input, once it is known: see `jprune.pipeline.oneshot.solve`.

    Attributes:
      wanted: its kernels to prune, by path in it.
      reports: on those that have been pruned.
    """

    def __init__(self, index: int, job: Job, run: Run, solve: Solve = solve) -> None:
        self.part = job.parts[index]
        self.wanted = {self.part.relative(kernel.path): kernel for kernel in job.kernels_of(self.part)}
        self.reports: list[KernelReport] = []
        self._beside: tuple[Params, ...] = ()  # the parameters of the dense model, if it is computed too
        self._index, self._job, self._run = index, job, run
        self._solve_for = solve
        self._trains = bool(job.recipe.reconstruct and self.part.prefix)  # not the head

    def without_data(self, params: Params) -> Params:
        """The part's parameters, pruned by a method that needs no statistic."""
        for i, (path, kernel) in enumerate(self.wanted.items()):
            self.progress(i / len(self.wanted), kernel.path)
            params = params | self._solve(params, {path: kernel}, None)
        self.progress(1.0, "done")
        return params

    def with_data(
        self,
        params: Params,
        hidden: Batches,
        make: Callable[[], Batches] | None,
        *,
        dense: Params | None = None,
        pruned: bool = False,
    ) -> tuple[Params, Batches | None]:
        """The part's parameters, pruned by what the calibration tokens say, and the hidden states after it.

        Args:
          params: its parameters; those that are pruned take the place of the old ones there, which are then freed.
          hidden: the hidden states before it; each is used up.
          make: makes what takes those after it; None if nobody needs them.
          dense: its parameters in the model that is pruned, if they are others.
          pruned: `params` have been pruned before, by the same run: only the hidden states are wanted. Every program
            runs as it did then, so that they are the same to the last bit.
        """
        streams = self._job.streams
        specs = [
            Spec(
                self.part.function,
                self.part.shapes,
                frozenset(self.wanted),
                (x.shape, x.dtype),
                self._job.mesh,
                streams,
            )
            for x, *_ in hidden.specs
        ]
        if dense is None:
            dense = dict(params) if streams > 1 or self._trains else {}
        self._beside = (dense,) if streams > 1 else ()
        if not self.wanted:
            return params, self._pass(params, specs, hidden, make)
        carries = hidden
        first = 0  # the first segment whose result has not been kept
        for stage, matmuls in enumerate(specs[0].stages().matmuls):
            inputs = programs.inputs_of(matmuls)
            kept = self._kept(specs, stage)
            with self._run.stopwatch.phase("calibration"):
                statistics = self._observe(params, specs, carries, (first, stage), inputs, kept)
            memory.trim()
            if kept is not None:
                if carries is not hidden:
                    carries.drop()
                carries, first = kept, stage + 1
            for ids in dict.fromkeys(inputs.values()):
                together = {path: self.wanted[path] for path in inputs if inputs[path] == ids}
                statistic = functools.reduce(lambda a, b: a.merge(b), (statistics.pop(k) for k in ids))
                if not pruned:
                    params.update(self._solve(params, together, statistic))
                del statistic
        if self._trains:
            if carries is not hidden:
                carries.drop()
            carries, first = hidden, 0
            if not pruned:
                params = self._reconstruct(params, dense, specs, hidden)
        after = self._finish(params, specs, carries, first, make)
        if carries is not hidden:
            carries.drop()
        self.progress(1.0, "done")
        return params, after

    def progress(self, done: float, text: str) -> None:
        """Tells how far the part is, with the loss of the kernel last solved for."""
        loss = self.reports[-1].loss if self.reports else None
        what = f"block {self._index}: {text}"
        self._run.tell(Progress(self._index + done, len(self._job.parts), what, loss=loss))

    def _pass(
        self, params: Params, specs: list[Spec], hidden: Batches, make: Callable[[], Batches] | None
    ) -> Batches | None:
        """The hidden states after a part of which nothing is pruned."""
        if make is None:
            return None
        after = make()
        with self._run.stopwatch.phase("calibration"), Flight(after) as flight:
            for j, spec in enumerate(specs):
                self.progress(j / len(hidden), "nothing to prune here")
                run = programs.forward(self.part.function, spec.sharding)
                flight.add(j, tuple(map(run, self._trees(params), hidden.take(j))))
        return after

    def _finish(
        self, params: Params, specs: list[Spec], carries: Batches, first: int, make: Callable[[], Batches] | None
    ) -> Batches | None:
        """The hidden states after the segments from `first` on."""
        if make is None:
            return None
        after, every = make(), self._trees(params)
        with self._run.stopwatch.phase("calibration"), Flight(after) as flight:
            for j, spec in enumerate(specs):
                flight.add(j, programs.finish(spec, first)(every, _carry(spec, carries.take(j), first)))
        return after

    def _kept(self, specs: list[Spec], stage: int) -> Batches | None:
        """Where what stage `stage` leaves for the next ones is kept; None if it is to be recomputed."""
        carries = [spec.stages().carries[stage + 1] for spec in specs]
        streams = self._job.streams
        arrays = [tuple(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in carry) * streams for carry in carries]
        batches = Batches(arrays, self._run.room, self._run.folder.spill / f"stage-{stage}.bin")
        return batches if self._run.layout.keeps(sum(map(batches.nbytes, range(len(specs))))) else None

    def _observe(
        self,
        params: Params,
        specs: list[Spec],
        carries: Batches,
        segments: tuple[int, int],
        inputs: Inputs,
        kept: Batches | None,
    ) -> ByInput:
        """Runs the segments for every micro-batch; returns the statistic of every distinct input of the last one."""
        first, stage = segments
        steps = len(specs[0].stages().matmuls) + 1
        text = ", ".join(path.removesuffix("/kernel") for path in inputs)
        every = self._trees(params)
        readers = {i: self.wanted[path] for path, ids in inputs.items() for i in ids}
        outputs = {i: addition.d_out for i, addition in specs[0].stages().added(stage).items()}
        sums = Sums(self._job.method.statistic, readers, outputs)
        uses_up = kept is not None and not (self._trains and first == 0)  # it is begun with again
        with Flight(kept) as flight:
            for j, spec in enumerate(specs):
                self.progress((stage + j / (len(specs) + 1)) / steps, text)
                carry = _carry(spec, (carries.take if uses_up else carries.get)(j), first)
                run = programs.observe(spec, first, stage, kept is not None)
                carry, seen = run(every, carry, sums.take(j, spec))
                sums.put(j, spec, seen)
                flight.add(j, carry)
        return sums.merged(self._job.mesh)

    def _reconstruct(self, params: Params, dense: Params, specs: list[Spec], hidden: Batches) -> Params:
        """Trains the kernels of the part, all of which have been pruned."""
        stages = len(specs[0].stages().matmuls)
        targets = Batches([(x,) for x, *_ in hidden.specs], self._run.room, self._run.folder.spill / "targets.bin")
        with self._run.stopwatch.phase("calibration"), Flight(targets) as flight:
            for j, spec in enumerate(specs):
                flight.add(j, (learning.wanted(spec)(dense, hidden.get(j)),))
        with self._run.stopwatch.phase("solve"):
            trained, left = reconstruct(
                specs,
                hidden,
                targets,
                params,
                self.wanted,
                passes=self._job.recipe.reconstruct,
                tell=lambda done: self.progress((stages + done) / (stages + 1), "training what is left"),
            )
        targets.drop()
        placed = {path: devices.moved(x, params[path].sharding) for path, x in trained.items()}
        zeros = {k.path: int(k.size - jnp.count_nonzero(k.part(placed[path]))) for path, k in self.wanted.items()}
        self.reports = [dataclasses.replace(r, reconstructed=left, zeros=zeros[r.path]) for r in self.reports]
        return params | placed

    def _trees(self, params: Params) -> tuple[trees.PyTree, ...]:
        """The parameters of every stream."""
        return tuple(map(trees.unflatten, (params, *self._beside)))

    def _solve(
        self, params: Mapping[str, jax.Array], kernels: Mapping[str, Kernel], statistic: Statistic | None
    ) -> Params:
        """Prunes kernels that read one input; reports on each."""
        with self._run.stopwatch.phase("solve"):
            pruned, reports = self._solve_for(self._job, kernels, params, statistic)
        self.reports += reports
        return pruned


def _carry(spec: Spec, arrays: Arrays, first: int) -> Arrays:
    """What segment `first` begins with, out of what was kept for it: for the first segment, the hidden states."""
    return spec.start(arrays) if first == 0 else arrays
