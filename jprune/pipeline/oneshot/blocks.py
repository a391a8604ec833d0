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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel, Unit, units
from jprune.checkpoints import Checkpoint
from jprune.methods import Method
from jprune.models import decoder
from jprune.pipeline.forecast.layout import Layout
from jprune.pipeline.oneshot.journal import Journal, Step, route
from jprune.pipeline.oneshot.report import KernelReport
from jprune.pipeline.oneshot.stages import UnitRun, check_finite, forward
from jprune.runs import processes
from jprune.runs.activations import Batches, Specs
from jprune.runs.background import Background
from jprune.runs.report import Progress
from jprune.runs.stopwatch import Stopwatch


def prune_blocks(
    checkpoint: Checkpoint,
    kernels: Iterable[Kernel],
    method: Method,
    tokens: np.ndarray | None,
    journal: Journal,
    *,
    mesh: Mesh,
    layout: Layout,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[Progress], None] = lambda _: None,
    stopwatch: Stopwatch | None = None,
    expert_tokens: int = 0,
    keep_zeros: bool = False,
) -> list[KernelReport]:
    """Prunes `kernels` and writes every parameter of the model to the journal's result; goes on with what is done.

    Args:
      checkpoint: the model; its weights are read unit by unit and keep their dtype.
      kernels: what to prune and how, see `plan.choose_kernels`.
      method: how.
      tokens: calibration windows [n, length]; None if the method needs no statistic.
      journal: knows what is done, and takes what is.
      mesh: the devices, see `jprune.devices`.
      layout: how calibration is cut up.
      dtype: of the activations. Statistics and solvers are float32 in any case.
      progress: called often.
      stopwatch: gets the phases "calibration", "solve" and "io" (waiting for what runs in the background).
      expert_tokens: see `UnitRun`.
      keep_zeros: see `UnitRun`.

    Returns:
      One report per pruned kernel, in the order of the units; in process 0, the others get none.

    Raises:
      JpruneError: weights or activations that are not finite, a Gram matrix that cannot be factorised, a full disk.
    """
    stopwatch = stopwatch or Stopwatch()
    options = {"expert_tokens": expert_tokens, "keep_zeros": keep_zeros}
    run = _Blocks(checkpoint, kernels, method, tokens, journal, mesh, layout, dtype, progress, stopwatch, options)
    with jax.default_matmul_precision("highest"):  # float32 means float32: no TF32, no bfloat16 passes
        return run.all()


class _Blocks:
    """One pass over a model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Iterable[Kernel],
        method: Method,
        tokens: np.ndarray | None,
        journal: Journal,
        mesh: Mesh,
        layout: Layout,
        dtype: DTypeLike,
        progress: Callable[[Progress], None],
        stopwatch: Stopwatch,
        options: Mapping[str, Any],
    ):
        self.options = options
        self.checkpoint, self.method, self.tokens, self.journal = checkpoint, method, tokens, journal
        self.layout, self.dtype, self.progress, self.stopwatch = layout, dtype, progress, stopwatch
        self.mesh = mesh
        self.kernels: dict[str, list[Kernel]] = {}
        for kernel in kernels:
            self.kernels.setdefault(kernel.unit, []).append(kernel)
        todo = units(checkpoint)
        self.units = todo[: max(i for i, unit in enumerate(todo) if unit.name in self.kernels) + 1]
        """Those up to the last in which a kernel is pruned."""
        self.specs = (
            [] if tokens is None else hidden_specs(checkpoint.config.d_model, tokens.shape, layout, dtype, mesh)
        )

    def all(self) -> list[KernelReport]:
        """Does what is not done; returns the reports of all."""
        with self.stopwatch.phase("io"):
            done = processes.decided_by_first(
                lambda: [self.journal.done(unit.name, self._paths(unit)) for unit in self.units]
            )
        missing = [i for i, finished in enumerate(done) if not finished]
        largest = max(sum(math.prod(shape) * np.dtype(d).itemsize for _, shape, d in u.shapes) for u in self.units)
        with Background() as reading, Background(limit=largest) as writing:
            if self.method.statistic is None:
                steps = [Step(i, True, False) for i in missing]
            else:
                saved = self._load(missing)
                steps = route(missing, saved)
            self._walk(steps, saved if self.method.statistic else {}, reading, writing)
            self._rest(writing)
            with self.stopwatch.phase("io"):
                writing.wait()
        if not processes.is_first():
            return []
        return [report for unit in self.units for report in self.journal.reports(unit.name)]

    def _load(self, missing: Sequence[int]) -> dict[int, Batches]:
        """The saved activations from which some missing unit can start, in every process."""
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
                ahead[at] = reading.submit(functools.partial(self._read, self.units[steps[at].unit], steps[at].prune))

        read(0)
        for at, step in enumerate(steps):
            i, unit = step.unit, self.units[step.unit]
            where = unit.shardings(self.mesh, self.checkpoint.config.d_model)
            with self.stopwatch.phase("io"):
                values = ahead.pop(at).result()
                # Emptied on the way, so that no array is held twice.
                params = {path: devices.place(values.pop(path), where[path]) for path, _, _ in unit.shapes}
            read(at + 1)
            check_finite({unit.path(path): value for path, value in params.items()})
            run = UnitRun(
                unit,
                self.kernels.get(unit.name, []),
                self.method,
                mesh=self.mesh,
                layout=self.layout,
                room=self.journal.room,
                spill=self.journal.run.spill,
                stopwatch=self.stopwatch,
                progress=functools.partial(self._report, i),
                **self.options,
            )
            after = None
            if self.method.statistic is None:
                params = run.without_data(params)
            else:
                if step.load:
                    hidden = saved.pop(i) if i in saved else self._embed(writing)
                assert hidden is not None
                goes_on = at + 1 < len(steps) and not steps[at + 1].load
                make = functools.partial(self._after, i, writing) if goes_on else None
                params, after = run.with_data(params, hidden, make, pruned=not step.prune)
                if not hidden.saved:
                    hidden.drop()
            named = {unit.path(path): devices.readable(value, self.mesh) for path, value in params.items()}
            with self.stopwatch.phase("io"):
                self.journal.save(unit.name, i, named, run.reports, after, writing, written=not step.prune)
            del params, named, run
            hidden = after

    def _read(self, unit: Unit, prune: bool) -> dict[str, np.ndarray]:
        """A unit's weights: those of the model, or what has become of them."""
        if not prune:
            return {path: self.journal.read(unit.path(path)) for path, _, _ in unit.shapes}
        if self.checkpoint.reads_together:
            values = self.checkpoint.read_many(self._paths(unit))
            return {path: values[unit.path(path)] for path, _, _ in unit.shapes}
        return {path: np.ascontiguousarray(self.checkpoint.read(unit.path(path))) for path, _, _ in unit.shapes}

    def _paths(self, unit: Unit) -> list[str]:
        return [unit.path(path) for path, _, _ in unit.shapes]

    def _after(self, index: int, writing: Background) -> Batches:
        return self.journal.batches(index + 1, self.specs, writing, save=self.journal.due())

    def _rest(self, writing: Background) -> None:
        """Copies what belongs to no unit that was gone through, in parts; process 0 does."""
        if not processes.is_first():
            return
        seen = {path for unit in self.units for path in self._paths(unit)}
        parts: dict[str, list[str]] = {}
        for path in self.checkpoint.shapes:
            if path not in seen:
                parts.setdefault("/".join(path.split("/")[: 2 if path.startswith("blocks/") else 1]), []).append(path)
        with self.stopwatch.phase("io"):
            for name, paths in parts.items():
                if not self.journal.done(f"rest/{name}", paths):
                    values = {path: self.checkpoint.read(path) for path in paths}
                    self.journal.save(f"rest/{name}", len(self.units), values, (), None, writing)

    def _embed(self, writing: Background) -> Batches:
        """The hidden states of all windows before the first unit."""
        assert self.tokens is not None
        with self.stopwatch.phase("calibration"):
            everywhere = devices.replicated(self.mesh)
            read = self.checkpoint.params("embed")
            params = {"embed": jax.tree.map(lambda value: devices.place(value, everywhere), read)}
            check_finite(trees.flatten(params))
            embed = decoder.embed(self.checkpoint.config)
            batches = self.journal.batches(0, self.specs, writing, save=False)
            start = 0
            for j, (x,) in enumerate(self.specs):
                part = devices.place(self.tokens[start : start + x.shape[0]], x.sharding)
                start += x.shape[0]
                hidden = forward(embed, x.sharding)(params, part).astype(self.dtype)
                batches.put(j, (jax.block_until_ready(hidden),))
        return batches

    def _report(self, index: int, done: float, text: str, loss: float | None) -> None:
        self.progress(Progress(index + done, len(self.units), f"block {index}: {text}", loss=loss))


def hidden_specs(
    d_model: int, shape: tuple[int, ...], layout: Layout, dtype: DTypeLike, mesh: Mesh
) -> tuple[Specs, ...]:
    """The hidden states between blocks of token windows [n, length], and where they lie.

    Micro-batches are of at most two sizes that can be shared out evenly. The windows that are left over, fewer than
    there are devices, follow in smaller ones, which every device computes.
    """
    n, length = shape
    data = mesh.shape[devices.DATA]
    at_once = max(layout.windows // data, 1)  # on each device
    even = n // data
    size = math.ceil(even / math.ceil(even / at_once)) if even else 0
    counts = [min(size, even - start) * data for start in range(0, even, max(size, 1))]
    counts += [min(at_once, n - start) for start in range(even * data, n, at_once)]
    return tuple(
        (jax.ShapeDtypeStruct((count, length, d_model), jnp.dtype(dtype), sharding=devices.batch(mesh, count)),)
        for count in counts
    )
