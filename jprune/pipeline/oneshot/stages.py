"""One unit (a decoder block, or the head), stage by stage: calibrate, prune, go on with the pruned weights.

Micro-batches pass in their order, two at a time, and what they add to a statistic is added in that order: the same
unit, weights, activations and layout give the same bits, whenever and wherever the activations lie.

On a mesh, the windows of a micro-batch are shared out. Each device adds up the statistics of what it sees, and they are
reduced over the devices once a stage; kernels are solved for with their outputs shared out.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune import devices, trees
from jprune.anatomy.kernels import Kernel, Unit
from jprune.errors import JpruneError
from jprune.methods import Method
from jprune.pipeline.forecast.layout import Layout
from jprune.pipeline.oneshot.experts import solve_stacks
from jprune.pipeline.oneshot.report import KernelReport
from jprune.runs import memory
from jprune.runs.activations import Arrays, Batches, Room
from jprune.runs.stopwatch import Stopwatch
from jprune.statistics import Statistic, merge_parts, update_in_parts, zeros
from jprune.trace import Stages, stages

PyTree = Any
Params = dict[str, jax.Array]  # by path in the unit


class UnitRun:
    """One unit of one run.

    Args:
      unit: which.
      kernels: of the unit, to be pruned.
      method: how.
      mesh: the devices.
      layout: how calibration is cut up.
      room: memory for activations.
      spill: folder for those that do not fit.
      stopwatch: gets the phases "calibration" and "solve".
      progress: called with the part of the unit that is done, what is at work, and the loss of the last kernel.
      expert_tokens: an expert that saw fewer tokens is pruned by magnitude, see `solve_stacks`.
      keep_zeros: weights that are zero count as pruned before: they stay zero, and are among those asked for.
    """

    def __init__(
        self,
        unit: Unit,
        kernels: Iterable[Kernel],
        method: Method,
        *,
        mesh: Mesh,
        layout: Layout,
        room: Room,
        spill: Any,
        stopwatch: Stopwatch,
        progress: Callable[[float, str, float | None], None],
        expert_tokens: int = 0,
        keep_zeros: bool = False,
    ) -> None:
        self.unit = unit
        self.wanted = {_relative(kernel, unit): kernel for kernel in kernels}
        self.method = method
        self.mesh = mesh
        self.reports: list[KernelReport] = []
        self._layout, self._room, self._spill = layout, room, spill
        self._stopwatch, self._progress = stopwatch, progress
        self._expert_tokens, self._keep_zeros = expert_tokens, keep_zeros

    def without_data(self, params: Params) -> Params:
        """The unit's parameters, pruned by a method that needs no statistic."""
        for i, (path, kernel) in enumerate(self.wanted.items()):
            self.progress(i / len(self.wanted), kernel.path)
            params = params | self._solve(params, {path: kernel}, None)
        self.progress(1.0, "done")
        return params

    def with_data(
        self, params: Params, hidden: Batches, make: Callable[[], Batches] | None, *, pruned: bool = False
    ) -> tuple[Params, Batches | None]:
        """The unit's parameters, pruned by what the calibration tokens say, and the hidden states after it.

        Args:
          params: its parameters.
          hidden: the hidden states before it; each is used up.
          make: makes what takes those after it; None if nobody needs them.
          pruned: `params` have been pruned before, by the same run: only the hidden states are wanted. Every program
            runs as it did then, so that they are the same to the last bit.
        """
        x = [(arrays[0].shape, arrays[0].dtype) for arrays in hidden.specs]
        specs = [Spec(self.unit.function, self.unit.shapes, frozenset(self.wanted), own, self.mesh) for own in x]
        if not self.wanted:
            after = make() if make else None
            with self._stopwatch.phase("calibration"), _Flight(after) as flight:
                for j, spec in enumerate(specs if make else ()):
                    self.progress(j / len(hidden), "nothing to prune here")
                    run = forward(self.unit.function, spec.sharding)
                    flight.add(j, (run(trees.unflatten(params), *hidden.take(j)),))
            return params, after
        plan = specs[0].stages()
        steps = len(plan.matmuls) + 1
        carries = hidden
        first = 0  # the first segment whose result has not been kept
        for stage, matmuls in enumerate(plan.matmuls):
            inputs = inputs_of(matmuls)
            text = ", ".join(m.path.removesuffix("/kernel") for m in matmuls)
            kept = self._kept(specs, stage)
            with self._stopwatch.phase("calibration"):
                statistics = self._observe(params, specs, carries, (first, stage), inputs, kept, (steps, text))
            memory.trim()
            if kept is not None:
                if carries is not hidden:
                    carries.drop()
                carries, first = kept, stage + 1
            for ids in dict.fromkeys(inputs.values()):
                together = {path: self.wanted[path] for path in inputs if inputs[path] == ids}
                statistic = functools.reduce(lambda a, b: a.merge(b), (statistics.pop(k) for k in ids))
                if not pruned:
                    params = params | self._solve(params, together, statistic)
                del statistic
        after = make() if make else None
        if after is not None:
            with self._stopwatch.phase("calibration"), _Flight(after) as flight:
                tree = trees.unflatten(params)
                for j, spec in enumerate(specs):
                    carry = carries.take(j)
                    flight.add(j, (finish(spec, first)(tree, _started(spec, carry) if first == 0 else carry),))
        if carries is not hidden:
            carries.drop()
        self.progress(1.0, "done")
        return params, after

    def progress(self, done: float, text: str) -> None:
        """Tells how far the unit is, with the loss of the kernel last solved for."""
        self._progress(done, text, self.reports[-1].loss if self.reports else None)

    def _kept(self, specs: list["Spec"], stage: int) -> Batches | None:
        """Where what stage `stage` leaves for the next ones is kept; None if it is to be recomputed."""
        carries = [spec.stages().carries[stage + 1] for spec in specs]
        arrays = [tuple(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in carry) for carry in carries]
        batches = Batches(arrays, self._room, self._spill / f"stage-{stage}.bin")
        return batches if self._layout.keeps(sum(map(batches.nbytes, range(len(specs))))) else None

    def _observe(
        self,
        params: Params,
        specs: list["Spec"],
        carries: Batches,
        segments: tuple[int, int],
        inputs: Mapping[str, tuple[int, ...]],
        kept: Batches | None,
        said: tuple[int, str],
    ) -> dict[int, Statistic]:
        """Runs the segments for every micro-batch; returns the statistic of every distinct input of the last one."""
        (first, stage), (steps, text) = segments, said
        tree = trees.unflatten(params)
        # Two sums, so that two micro-batches can be computed side by side; each in as many parts as tokens can be cut.
        sums: dict[tuple[int, int], dict[int, Statistic]] = {}
        with _Flight(kept) as flight:
            for j, spec in enumerate(specs):
                self.progress((stage + j / (len(specs) + 1)) / steps, text)
                arrays = carries.get(j) if kept is None else carries.take(j)
                carry = _started(spec, arrays) if first == 0 else arrays
                own = (spec.pieces, j % 2)
                sums[own] = sums.get(own) or self._zeros(inputs, spec)
                carry, sums[own] = observe(spec, first, stage, kept is not None)(tree, carry, sums[own])
                flight.add(j, carry)
        return jax.block_until_ready(_merged(self.mesh, sums.values()))

    def _solve(
        self, params: Mapping[str, jax.Array], kernels: Mapping[str, Kernel], statistic: Statistic | None
    ) -> Params:
        """Prunes kernels that read one input; reports on each."""
        few: tuple[int, ...] = ()
        with self._stopwatch.phase("solve"):
            if next(iter(kernels.values())).stack:
                results, few = solve_stacks(
                    self.method,
                    {k.path: (k, params[path]) for path, k in kernels.items()},
                    statistic,
                    self._expert_tokens,
                    self.mesh,
                    keep_zeros=self._keep_zeros,
                )
            else:
                matrices = {k.path: trees.to_matrix(params[path], k.in_axes) for path, k in kernels.items()}
                patterns = {k.path: k.pattern for k in kernels.values()}
                matrices = devices.spread_columns(self.mesh, matrices)
                keeps = {name: matrix != 0 for name, matrix in matrices.items()} if self._keep_zeros else {}
                solved = jax.block_until_ready(self.method.together(matrices, statistic, patterns, keeps))
                results = {
                    k.path: (trees.from_matrix(solved[k.path].kernel, k.shape, k.in_axes), solved[k.path].loss)
                    for k in kernels.values()
                }
        pruned = {}
        for path, kernel in kernels.items():
            values, loss = results[kernel.path]
            pruned[path] = jax.device_put(values, params[path].sharding)
            zeros = int(pruned[path].size - jnp.count_nonzero(pruned[path]))
            loss = None if loss is None else float(loss)
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
                    few_tokens=few,
                )
            )
        return pruned

    def _zeros(self, inputs: Mapping[str, tuple[int, ...]], spec: "Spec") -> dict[int, Statistic]:
        kernels = {i: self.wanted[path] for path, ids in inputs.items() for i in ids}
        sharding = devices.parts(self.mesh) if spec.pieces > 1 else devices.replicated(self.mesh)
        kind = self.method.statistic
        return {i: zero_parts(kind, spec.pieces, sharding, k.d_in, *k.stack)() for i, k in kernels.items()}


class _Flight:
    """Lets a few micro-batches run ahead, which keeps all cores busy; not all of them.

    Without waiting, the old and the new values of all micro-batches would be in memory together.
    """

    def __init__(self, batches: Batches | None, ahead: int = 2):
        self._batches = batches
        self._ahead = ahead
        self._flying: deque[tuple[int, Arrays]] = deque()

    def add(self, j: int, arrays: Arrays) -> None:
        """Stores a micro-batch, once it is computed; waits for the one that went a few before it."""
        self._flying.append((j, arrays))
        if len(self._flying) > self._ahead:
            self._land()

    def _land(self) -> None:
        j, arrays = self._flying.popleft()
        jax.block_until_ready(arrays)
        if self._batches is not None:
            self._batches.put(j, arrays)

    def __enter__(self) -> "_Flight":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        while kind is None and self._flying:
            self._land()


class Spec(NamedTuple):
    """What a unit's compiled functions depend on: equal units share them."""

    function: Callable
    shapes: tuple
    chosen: frozenset[str]
    x: tuple[tuple[int, ...], Any]
    mesh: Mesh

    @property
    def sharding(self) -> NamedSharding:
        """Where hidden states lie."""
        return devices.batch(self.mesh, self.x[0][0])

    def tokens(self, ndim: int) -> NamedSharding:
        """Where the tokens of hidden states lie, in arrays [*stack, tokens, d_in]."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * (ndim - 2), *self.sharding.spec))

    @property
    def pieces(self) -> int:
        """Into how many pieces the tokens are cut to be summed over."""
        return devices.pieces_of_rows(self.mesh, math.prod(self.x[0][:-1]))

    def stages(self) -> Stages:
        """The stages of the unit for micro-batches of shape and dtype `x`."""
        return _stages(self)


@functools.lru_cache(maxsize=64)
def _stages(spec: Spec) -> Stages:
    params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in spec.shapes})
    return stages(
        spec.function, params, jax.ShapeDtypeStruct(*spec.x), where=lambda path: path in spec.chosen, stacked=True
    )


@functools.lru_cache(maxsize=256)
def observe(spec: Spec, first: int, stage: int, keep: bool) -> Any:
    """Runs segments `first` to `stage` and adds the inputs of the stage's matmuls to the statistics."""
    cut = spec.stages()

    def observe(params: PyTree, carry: Any, statistics: dict[int, Statistic]) -> tuple[Any, dict[int, Statistic]]:
        for segment in cut.segments[first : stage + 1]:
            carry = segment(params, carry)
        # Said here, or XLA would cut the whole segment as the sums want their tokens cut.
        rows = {i: jnp.asarray(x) for i, x in cut.inputs(stage, carry).items()}
        inputs = {i: jax.lax.with_sharding_constraint(x, spec.tokens(x.ndim)) for i, x in rows.items()}
        ticket = (jnp.zeros(()),)  # what is not kept can still be waited for
        seen = {i: update_in_parts(s, inputs[i], spec.mesh) for i, s in statistics.items()}
        return carry if keep else ticket, seen

    return jax.jit(observe, donate_argnames="statistics")


@functools.lru_cache(maxsize=64)
def finish(spec: Spec, first: int) -> Any:
    """Runs the segments from `first` on: the unit's output."""
    cut = spec.stages()

    def finish(params: PyTree, carry: Any) -> jax.Array:
        for segment in cut.segments[first:]:
            carry = segment(params, carry)
        return cut.finish(carry)

    return jax.jit(finish, out_shardings=spec.sharding)


@functools.lru_cache(maxsize=64)
def forward(function: Callable, sharding: NamedSharding) -> Any:
    """A function compiled, and where its output lies; equal units have one function."""
    return jax.jit(function, out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def zero_parts(kind: Any, count: int, sharding: NamedSharding, d_in: int, *stack: int) -> Any:
    """Makes so many statistics that have seen nothing, with one more axis in front."""

    def make() -> Statistic:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), zeros(kind, d_in, *stack))

    return jax.jit(make, out_shardings=sharding)


def _merged(mesh: Mesh, sums: Iterable[dict[int, Statistic]]) -> dict[int, Statistic]:
    """All sums, each in parts, as one that every device has: reduced over the devices once."""
    alike: dict[int, dict[int, Statistic]] = {}
    for own in sums:
        count = len(jax.tree.leaves(own)[0])
        alike[count] = _merge_alike(alike[count], own) if count in alike else own
    return _merge_parts(mesh)(list(alike.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _merge_alike(a: dict[int, Statistic], b: dict[int, Statistic]) -> dict[int, Statistic]:
    return {i: jax.vmap(lambda a, b: a.merge(b))(a[i], b[i]) for i in a}


@functools.lru_cache(maxsize=8)
def _merge_parts(mesh: Mesh) -> Any:
    def merge(sums: list[dict[int, Statistic]]) -> dict[int, Statistic]:
        merged = [{i: merge_parts(parts) for i, parts in own.items()} for own in sums]
        return {i: functools.reduce(lambda a, b: a.merge(b), [own[i] for own in merged]) for i in merged[0]}

    return jax.jit(merge, out_shardings=devices.replicated(mesh))


def _started(spec: Spec, arrays: Arrays) -> Arrays:
    return spec.stages().start(*arrays)


def inputs_of(matmuls: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """What each parameter of a stage reads: one input, or several if it is used more than once."""
    inputs: dict[str, tuple[int, ...]] = {}
    for m in matmuls:
        inputs[m.path] = (*inputs.get(m.path, ()), m.input_id)
    return inputs


def _relative(kernel: Kernel, unit: Unit) -> str:
    return kernel.path.removeprefix(f"{unit.prefix}/") if unit.prefix else kernel.path


def check_finite(params: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Raises `JpruneError` for weights that are NaN or inf."""
    for path, value in params.items():
        if not _all_finite(value):
            raise JpruneError(f"{path} has weights that are NaN or inf; the checkpoint is damaged")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))
