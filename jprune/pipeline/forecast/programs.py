"""The compiled programs of a part, stage by stage: equal parts, for equal micro-batches, share them.

A forecast asks the compiler what they take; a run runs them.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune import devices, trees
from jprune.cross_gram import beside
from jprune.statistics import Statistic, update_in_parts, zeros
from jprune.trace import Stages, stages
from jprune.trace.reading import sorting

PyTree = Any
Arrays = tuple[Any, ...]


class Spec(NamedTuple):
    """What a part's compiled functions depend on: equal parts share them."""

    function: Callable
    shapes: tuple
    chosen: frozenset[str]
    x: tuple[tuple[int, ...], Any]
    mesh: Mesh
    streams: int = 1
    """1, or 2 if the dense model is computed beside the pruned one: then there are parameters, hidden states and
    carries of both, the pruned model's first."""
    spread: bool = False
    """The run has several devices, though `mesh` is one: for a forecast of what one of them takes."""

    @property
    def sharding(self) -> NamedSharding:
        """Where hidden states lie."""
        return devices.batch(self.mesh, self.x[0][0])

    def tokens(self, ndim: int) -> NamedSharding:
        """Where the tokens of hidden states lie, in arrays [*stack, tokens, d_in]."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * (ndim - 2), *self.sharding.spec))

    @property
    def sorts(self) -> bool:
        """Whether experts compute, and statistics see, the tokens they are sent, and no zeros for others.

        Sorted tokens cannot be shared out by XLA, and those of two models are not sent to the same experts.
        """
        return self.mesh.size == 1 and self.streams == 1 and not self.spread

    @property
    def pieces(self) -> int:
        """Into how many pieces the tokens are cut to be summed over."""
        return devices.pieces_of_rows(self.mesh, math.prod(self.x[0][:-1]))

    def stages(self) -> Stages:
        """The stages of the part for micro-batches of shape and dtype `x`."""
        return _stages(self)

    def apart(self, arrays: Arrays) -> list[Arrays]:
        """The arrays of each stream."""
        each = len(arrays) // self.streams
        return [arrays[i * each : (i + 1) * each] for i in range(self.streams)]

    def start(self, hidden: Arrays) -> Arrays:
        """What segment 0 takes of the hidden states of all streams."""
        return tuple(x for own in self.apart(hidden) for x in self.stages().start(*own))


@functools.lru_cache(maxsize=64)
def _stages(spec: Spec) -> Stages:
    params = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in spec.shapes})
    with sorting(spec.sorts):
        return stages(
            spec.function,
            params,
            jax.ShapeDtypeStruct(*spec.x),
            where=lambda path: path in spec.chosen,
            stacked=True,
            added=spec.streams > 1,
        )


@functools.lru_cache(maxsize=256)
def observe(spec: Spec, first: int, stage: int, keep: bool) -> Any:
    """Runs segments `first` to `stage` and adds the inputs of the stage's matmuls to the statistics."""
    cut = spec.stages()

    def observe(
        params: tuple[PyTree, ...], carry: Arrays, statistics: dict[int, Statistic]
    ) -> tuple[Arrays, dict[int, Statistic]]:
        carries = [
            _through(cut.segments[first : stage + 1], *own) for own in zip(params, spec.apart(carry), strict=True)
        ]
        inputs = cut.sorted_inputs(stage, carries[0]) if spec.sorts else _spread(spec, stage, carries)
        ticket = (jnp.zeros(()),)  # what is not kept can still be waited for
        seen = {i: update_in_parts(s, inputs[i], spec.mesh) for i, s in statistics.items()}
        return tuple(x for own in carries for x in own) if keep else ticket, seen

    return jax.jit(observe, donate_argnames="statistics")


@functools.lru_cache(maxsize=64)
def finish(spec: Spec, first: int) -> Any:
    """Runs the segments from `first` on: the part's output in every stream."""
    cut = spec.stages()

    def finish(params: tuple[PyTree, ...], carry: Arrays) -> tuple[jax.Array, ...]:
        each = zip(params, spec.apart(carry), strict=True)
        return tuple(cut.finish(_through(cut.segments[first:], *own)) for own in each)

    return jax.jit(finish, out_shardings=spec.sharding)


def _spread(spec: Spec, stage: int, carries: list[Arrays]) -> dict[int, jax.Array]:
    """What a stage's matmuls read in every stream, with the tokens shared out."""
    cut = spec.stages()
    read = [cut.inputs(stage, own) for own in carries]
    residuals = [cut.residuals(stage, own) for own in carries]
    rows = {i: _seen([own[i] for own in read], [own[i] for own in residuals if i in own]) for i in read[0]}
    # Said here, or XLA would cut the whole segment as the sums want their tokens cut.
    return {i: jax.lax.with_sharding_constraint(x, spec.tokens(x.ndim)) for i, x in rows.items()}


def _through(segments: Iterable[Callable], params: PyTree, carry: Arrays) -> Arrays:
    for segment in segments:
        carry = segment(params, carry)
    return carry


def _seen(inputs: list[Any], residuals: list[Any]) -> jax.Array:
    """What a statistic sees of the inputs of one matmul, and of what its outputs are added to, in every stream."""
    x, *dense = map(jnp.asarray, inputs)
    if not dense:
        return x
    now, *before = residuals or [None]
    return beside(x, *dense, *(y.astype(jnp.float32) - now for y in before))


@functools.lru_cache(maxsize=64)
def forward(function: Callable, sharding: NamedSharding) -> Any:
    """A function compiled, and where its output lies; equal parts have one function."""
    return jax.jit(devices.within(sharding.mesh, function), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def zero_parts(kind: Any, count: int, sharding: NamedSharding, d_in: int, *stack: int, d_out: int = 0) -> Any:
    """Makes so many statistics that have seen nothing, with one more axis in front.

    Of two models that are computed side by side, `d_out` asks for what so many outputs are added to, too.
    """

    def make() -> Statistic:
        own = kind.zeros(d_in, d_out) if d_out else zeros(kind, d_in, *stack)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), own)

    return jax.jit(make, out_shardings=sharding)


def inputs_of(matmuls: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """What each parameter of a stage reads: one input, or several if it is used more than once."""
    inputs: dict[str, tuple[int, ...]] = {}
    for m in matmuls:
        inputs[m.path] = (*inputs.get(m.path, ()), m.input_id)
    return inputs
