"""The block pipeline: a whole model, one block at a time, stage by stage, each matmul computed once per token.

For every block: read its weights; for every stage of it (q, k, v; then o; then gate, up; then down) feed every
micro-batch of calibration tokens up to the inputs of the stage's matmuls, gather the method's statistic of each
distinct input, prune, and go on with the pruned weights. What leaves the last stage is the next block's input. The
originals run every block twice: once to gather statistics with its weights still dense, once more with them pruned.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune import trees
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.methods import Method
from jprune.models import decoder
from jprune.models.batching import windows_at_once
from jprune.pipeline.plan import Kernel, Unit, carry_allowance, units
from jprune.pipeline.report import KernelReport, Progress
from jprune.pipeline.stopwatch import Stopwatch
from jprune.statistics import Statistic
from jprune.trace import Stages, stages

PyTree = Any


def prune_blocks(
    checkpoint: Checkpoint,
    kernels: Iterable[Kernel],
    method: Method,
    tokens: np.ndarray | None,
    write: Callable[[str, np.ndarray], None],
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[Progress], None] = lambda _: None,
    stopwatch: Stopwatch | None = None,
) -> list[KernelReport]:
    """Prunes `kernels` and hands every parameter of the model to `write`, once, as (path, array).

    Args:
      checkpoint: the model; its weights are read unit by unit and keep their dtype.
      kernels: what to prune and how, see `plan.choose_kernels`.
      method: how.
      tokens: calibration windows [n, length]; None if the method needs no statistic.
      write: called with parameters in our layout; unpruned ones exactly as they were read.
      dtype: of the activations. Statistics and solvers are float32 in any case.
      progress: called often.
      stopwatch: gets the phases "calibration", "solve" and "io".

    Returns:
      One report per pruned kernel, in the order in which they were pruned.

    Raises:
      JpruneError: weights or activations that are not finite, a Gram matrix that cannot be factorised.
    """
    stopwatch = stopwatch or Stopwatch()
    with jax.default_matmul_precision("highest"):  # float32 means float32: no TF32, no bfloat16 passes
        return _prune_blocks(checkpoint, tuple(kernels), method, tokens, write, dtype, progress, stopwatch)


def _prune_blocks(
    checkpoint: Checkpoint,
    kernels: tuple[Kernel, ...],
    method: Method,
    tokens: np.ndarray | None,
    write: Callable[[str, np.ndarray], None],
    dtype: DTypeLike,
    progress: Callable[[Progress], None],
    stopwatch: Stopwatch,
) -> list[KernelReport]:
    by_unit: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_unit.setdefault(kernel.unit, []).append(kernel)
    todo = units(checkpoint)
    last = max(i for i, unit in enumerate(todo) if unit.name in by_unit)
    written: set[str] = set()
    reports: list[KernelReport] = []

    hidden: list[jax.Array] = []
    if method.statistic is not None:
        assert tokens is not None
        with stopwatch.phase("calibration"):
            hidden = _embed(checkpoint, tokens, dtype)
    for i, unit in enumerate(todo[: last + 1]):
        with stopwatch.phase("io"):
            stored = {path: checkpoint.read(unit.path(path)) for path, _, _ in unit.shapes}
            params = {path: jnp.asarray(value) for path, value in stored.items()}
            _check_finite({unit.path(path): value for path, value in params.items()})
        run = _Run(unit, method, stopwatch, functools.partial(_report, progress, i, last + 1))
        here = by_unit.get(unit.name, [])
        if method.statistic is None:
            pruned = run.without_data(params, here)
        else:
            pruned, hidden = run.with_data(params, here, hidden, go_on=i < last)
        reports += run.reports
        with stopwatch.phase("io"):
            for path, value in stored.items():
                write(unit.path(path), np.asarray(pruned[path]) if path in pruned else value)
                written.add(unit.path(path))
    with stopwatch.phase("io"):
        for path in checkpoint.shapes:
            if path not in written:
                write(path, checkpoint.read(path))
    return reports


def _report(
    progress: Callable[[Progress], None], unit: int, total: int, done: float, text: str, loss: float | None
) -> None:
    progress(Progress(unit + done, total, f"block {unit}: {text}", loss=loss))


class _Run:
    """One unit of one run."""

    def __init__(
        self, unit: Unit, method: Method, stopwatch: Stopwatch, progress: Callable[[float, str, float | None], None]
    ) -> None:
        self.unit = unit
        self.method = method
        self.stopwatch = stopwatch
        self._progress = progress
        self.reports: list[KernelReport] = []

    def without_data(self, params: dict[str, jax.Array], kernels: list[Kernel]) -> dict[str, jax.Array]:
        """The pruned kernels of the unit, by path in it."""
        pruned: dict[str, jax.Array] = {}
        for i, kernel in enumerate(kernels):
            self.progress(i / len(kernels), kernel.path)
            path = self._relative(kernel)
            pruned |= self._solve(params, {path: kernel}, None)
        self.progress(1.0, "done")
        return pruned

    def with_data(
        self, params: dict[str, jax.Array], kernels: list[Kernel], hidden: list[jax.Array], *, go_on: bool
    ) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        """The pruned kernels of the unit, by path in it, and the hidden states after it (if they are to go on).

        The list `hidden` is emptied on the way, so that no micro-batch is held twice.
        """
        wanted = {self._relative(kernel): kernel for kernel in kernels}
        specs = [_Spec(self.unit.function, self.unit.shapes, frozenset(wanted), (x.shape, x.dtype)) for x in hidden]
        if not wanted:
            with self.stopwatch.phase("calibration"):
                for j, x in enumerate(hidden):
                    hidden[j] = jax.block_until_ready(_forward(self.unit.function)(trees.unflatten(params), x))
                    self.progress(j / len(hidden), "nothing to prune here")
            return {}, hidden
        plan = specs[0].stages()
        carries: list[Any] = [spec.stages().start(x) for spec, x in zip(specs, hidden)]
        activation_bytes = sum(x.nbytes for x in hidden)
        hidden.clear()
        pruned: dict[str, jax.Array] = {}
        steps = len(plan.matmuls) + 1
        first = 0  # the first segment whose result has not been kept
        for stage, matmuls in enumerate(plan.matmuls):
            inputs = _inputs_of(matmuls, self.unit)
            text = ", ".join(m.path.removesuffix("/kernel") for m in matmuls)
            keep = _carry_bytes(plan, stage + 1) * len(carries) <= carry_allowance(activation_bytes)
            with self.stopwatch.phase("calibration"):
                tree = trees.unflatten(params)
                # Two sums, so that two micro-batches can be computed side by side.
                streams = [self._zeros(inputs, wanted) for _ in range(2)]
                for j, spec in enumerate(specs):
                    carry, streams[j % 2] = _observe(spec, first, stage, keep)(tree, carries[j], streams[j % 2])
                    if keep:
                        carries[j] = carry
                    _wait_for_all_but(2, carries[: j + 1])
                    self.progress((stage + (j + 1) / (len(specs) + 1)) / steps, text)
                statistics = {i: streams[0][i].merge(streams[1][i]) for i in streams[0]}
                jax.block_until_ready(statistics)
                first = stage + 1 if keep else first
            for ids in dict.fromkeys(inputs.values()):
                together = {path: wanted[path] for path in inputs if inputs[path] == ids}
                statistic = functools.reduce(lambda a, b: a.merge(b), (statistics[k] for k in ids))
                new = self._solve(params, together, statistic)
                params, pruned = params | new, pruned | new
            del statistics
        if not go_on:
            self.progress(1.0, "done")
            return pruned, []
        with self.stopwatch.phase("calibration"):
            tree = trees.unflatten(params)
            for j, spec in enumerate(specs):
                hidden.append(_finish(spec, first)(tree, carries[j]))
                carries[j] = None
                _wait_for_all_but(2, hidden)
            jax.block_until_ready(hidden)
        self.progress(1.0, "done")
        return pruned, hidden

    def progress(self, done: float, text: str) -> None:
        """Tells how far the unit is, with the loss of the kernel last solved for."""
        self._progress(done, text, self.reports[-1].loss if self.reports else None)

    def _solve(
        self, params: Mapping[str, jax.Array], kernels: Mapping[str, Kernel], statistic: Statistic | None
    ) -> dict[str, jax.Array]:
        """Prunes kernels that read one input; reports on each."""
        with self.stopwatch.phase("solve"):
            matrices = {k.path: trees.to_matrix(params[path], k.in_axes) for path, k in kernels.items()}
            patterns = {k.path: k.pattern for k in kernels.values()}
            results = jax.block_until_ready(self.method.together(matrices, statistic, patterns, {}))
        pruned = {}
        for path, kernel in kernels.items():
            result = results[kernel.path]
            zeros = int(result.kernel.size - jnp.count_nonzero(result.kernel))
            loss = None if result.loss is None else float(result.loss)
            if loss is not None and not math.isfinite(loss):
                raise JpruneError(f"{kernel.path}: pruning it gave weights that are not finite (loss {loss})")
            self.reports.append(
                KernelReport(
                    path=kernel.path,
                    shape=kernel.shape,
                    pattern=str(kernel.pattern),
                    zeros=zeros,
                    size=kernel.size,
                    loss=loss,
                )
            )
            pruned[path] = trees.from_matrix(result.kernel, kernel.shape, kernel.in_axes)
        return pruned

    def _zeros(self, inputs: Mapping[str, tuple[int, ...]], kernels: Mapping[str, Kernel]) -> dict[int, Statistic]:
        assert self.method.statistic is not None
        return {i: self.method.statistic.zeros(kernels[path].d_in) for path, ids in inputs.items() for i in ids}

    def _relative(self, kernel: Kernel) -> str:
        return kernel.path.removeprefix(f"{self.unit.prefix}/") if self.unit.prefix else kernel.path


class _Spec(NamedTuple):
    """What a unit's compiled functions depend on: equal units share them."""

    function: Callable
    shapes: tuple
    chosen: frozenset[str]
    x: tuple[tuple[int, ...], Any]

    def stages(self) -> Stages:
        """The stages of the unit for micro-batches of shape and dtype `x`."""
        return _stages(self)


@functools.lru_cache(maxsize=64)
def _stages(spec: _Spec) -> Stages:
    params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in spec.shapes})
    return stages(spec.function, params, jax.ShapeDtypeStruct(*spec.x), where=lambda path: path in spec.chosen)


@functools.lru_cache(maxsize=256)
def _observe(spec: _Spec, first: int, stage: int, keep: bool) -> Callable:
    """Runs segments `first` to `stage` and adds the inputs of the stage's matmuls to the statistics."""
    cut = spec.stages()

    def observe(params: PyTree, carry: Any, statistics: dict[int, Statistic]) -> tuple[Any, dict[int, Statistic]]:
        for segment in cut.segments[first : stage + 1]:
            carry = segment(params, carry)
        inputs = cut.inputs(stage, carry)
        return carry if keep else (), {i: s.update(jnp.asarray(inputs[i])) for i, s in statistics.items()}

    return jax.jit(observe, donate_argnames="statistics")


@functools.lru_cache(maxsize=64)
def _finish(spec: _Spec, first: int) -> Callable:
    """Runs the segments from `first` on: the unit's output."""
    cut = spec.stages()

    def finish(params: PyTree, carry: Any) -> jax.Array:
        for segment in cut.segments[first:]:
            carry = segment(params, carry)
        return cut.finish(carry)

    return jax.jit(finish)


@functools.lru_cache(maxsize=64)
def _forward(function: Callable) -> Callable:
    return jax.jit(function)


def _wait_for_all_but(last: int, results: list[Any]) -> None:
    """Lets a few micro-batches run ahead, which keeps all cores busy; not all of them.

    Without waiting, the old and the new carries of all micro-batches would be in memory together.
    """
    if len(results) > last:
        jax.block_until_ready(results[-1 - last])


def _inputs_of(matmuls: Iterable[Any], unit: Unit) -> dict[str, tuple[int, ...]]:
    """What each parameter of a stage reads: one input, or several if it is used more than once."""
    inputs: dict[str, tuple[int, ...]] = {}
    for m in matmuls:
        inputs[m.path] = (*inputs.get(m.path, ()), m.input_id)
    return inputs


def _carry_bytes(plan: Stages, segment: int) -> int:
    return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in plan.carries[segment])


def _embed(checkpoint: Checkpoint, tokens: np.ndarray, dtype: DTypeLike) -> list[jax.Array]:
    """The hidden states of all windows in micro-batches of at most two sizes."""
    n, length = tokens.shape
    count = math.ceil(n / windows_at_once(length))
    size = math.ceil(n / count)
    params = {"embed": jax.tree.map(jnp.asarray, checkpoint.params("embed"))}
    _check_finite(trees.flatten(params))
    embed = _forward(decoder.embed(checkpoint.config))
    parts = [jnp.asarray(tokens[i : i + size]) for i in range(0, n, size)]
    return [jax.block_until_ready(embed(params, part).astype(dtype)) for part in parts]


def _check_finite(params: Mapping[str, jax.Array]) -> None:
    for path, value in params.items():
        if not _all_finite(value):
            raise JpruneError(f"{path} has weights that are NaN or inf; the checkpoint is damaged")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))
