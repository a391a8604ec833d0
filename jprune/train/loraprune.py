"""LoRAPrune: masks chosen while adapters are trained, by what the adapters alone know of the loss.

Zhang et al., "LoRAPrune" (https://arxiv.org/abs/2305.18403). Beside a frozen kernel W, adapters A ``[d_in, r]`` and B
``[r, d_out]`` are trained, and ``W + s A B`` with s = alpha / r computes. One step of A and B along their gradients dA
and dB would change A B by -G, with

    G = dA B + A dB - dA dB,        since  (A - dA) (B - dB) = A B - G

which stands for the gradient of W, that is never formed. A weight's importance, to first order, is
``S = |G * (W + s A B)|``. Then, at every step,

    score        of a unit: the sum of S over its channels in a kernel, over the norm of this kernel's sums; these are
                 added over the kernels it lies in (q, k, v and o; gate, up and down). Of a weight: S over the norm of S
    importance   I <- 0.9 I + 0.1 score, from 0; left as it is where the score is not finite
    masks        when they are due, the lowest go, as many of each layer as the schedule says by then

Gradients are clipped before they are read, and the optimizer updates the adapters after: the order of the paper's
program. What differs from it, and why:

- A KV head is one unit with all of its query heads: the sums of q and o go over all of them. Theirs takes a fixed
  number of heads, and with grouped-query attention the heads that go do not belong together.
- The final ratio is reached. Theirs prunes only while the ratio is below it.
- A pruned unit is the lowest by rule, and not because its importance is 0, which others may have too.
- What is not finite is skipped for the layer that it comes from, and not for all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jprune import masks, trees
from jprune.annotations import Array, Bool, Float, Int, Shaped, UInt8
from jprune.errors import JpruneError
from jprune.train import lora
from jprune.train.keep_masked import pack, unpack
from jprune.train.quantise import dequantise_tree
from jprune.train.schedules import SparsitySchedule

PyTree = Any
DECAY = 0.9
"""Share of earlier importance that is left after a step."""


def salience(
    kernel: Float[Array, "..."],
    adapter: tuple[Float[Array, "*d_in r"], Float[Array, "r *d_out"]],
    gradients: tuple[Float[Array, "*d_in r"], Float[Array, "r *d_out"]],
    *,
    alpha: int | float,
    in_axes: tuple[int, ...],
) -> Float[Array, "..."]:
    """S, float32, in the kernel's layout; `adapter` and `gradients` are (A, B) and (dA, dB)."""
    (a, b), (da, db) = adapter, gradients
    # dA (B - dB) + A dB, as one product.
    left, right = jnp.concatenate([da, a], axis=-1), jnp.concatenate([b - db, db], axis=0)
    gradient = lora.product(left, right, in_axes)
    return jnp.abs(gradient * (kernel.astype(jnp.float32) + lora.delta(a, b, alpha, in_axes)))


def unit_sums(
    salience: Float[Array, "..."], side: tuple[int, ...], channels: Int[np.ndarray, "count width"]
) -> Float[Array, " count"]:
    """The sums over the channels of each unit, divided by their norm over the units.

    Args:
      salience: of a kernel.
      side: its axes that number the channels; flattened, they are what `channels` indexes.
      channels: of every unit.
    """
    sums = jnp.sum(trees.to_matrix(salience, side), axis=1)[channels].sum(axis=1)
    return sums / (jnp.linalg.norm(sums) + 1e-8)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """A kernel with an adapter, or equal ones of several layers stacked on a leading axis."""

    path: str
    """In the trees of frozen parameters and of adapters."""
    in_axes: tuple[int, ...]
    """Input axes of a single kernel."""
    stacked: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Where units lie in a kernel."""

    kernel: Kernel
    side: tuple[int, ...]
    """The axes of a single kernel that number its channels."""
    channels: Int[np.ndarray, "count width"]
    """The channels of every unit, in the flattened axes of `side`."""


@runtime_checkable
class Criterion(Protocol):
    """What is pruned: the leaves below "keep" of what is trained, by path, and how they are chosen."""

    def start(self, path: str, keep: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """Importance before the first step."""
        ...

    def follow(
        self, path: str, importance: Float[Array, "..."], frozen: PyTree, adapters: PyTree, gradients: PyTree
    ) -> Float[Array, "..."]:
        """Importance after a step."""
        ...

    def choose(
        self, path: str, importance: Float[Array, "..."], keep: UInt8[Array, "..."], count: Callable[[int], Array]
    ) -> UInt8[Array, "..."]:
        """The masks without the least important; `count` says how many of a number of units or weights go."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnitCriterion:
    """Heads and channels. A mask is ``[count]``, 1 = keep, or ``[layers, count]`` for stacked layers."""

    parts: Mapping[str, tuple[Part, ...]]
    """The kernels that units lie in, by the path of their mask."""
    prunable: Mapping[str, Bool[np.ndarray, " layers"]]
    """Which of the layers of a mask may lose units, by its path."""
    alpha: int | float

    def start(self, path: str, keep: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """Zeros, one a unit."""
        return jnp.zeros(keep.shape, jnp.float32)

    def follow(
        self, path: str, importance: Float[Array, "..."], frozen: PyTree, adapters: PyTree, gradients: PyTree
    ) -> Float[Array, "..."]:
        """One kernel of one layer at a time."""
        score: Any = 0.0
        for part in self.parts[path]:

            def of_layer(kernel: PyTree, adapter: Any, gradient: Any, part: Part = part) -> Float[Array, " count"]:
                kernel = dequantise_tree(kernel, jnp.float32)
                s = salience(kernel, adapter, gradient, alpha=self.alpha, in_axes=part.kernel.in_axes)
                return unit_sums(s, part.side, part.channels)

            score = score + _by_layer(of_layer, part.kernel, frozen, adapters, gradients)
        return _average(importance, score, axis=-1)

    def choose(
        self, path: str, importance: Float[Array, "..."], keep: UInt8[Array, "..."], count: Callable[[int], Array]
    ) -> UInt8[Array, "..."]:
        """The masks without the least important units: the same number from each layer that may lose units."""
        units = keep.shape[-1]
        columns = jnp.where(keep == 1, importance, -jnp.inf).reshape(-1, units).T
        gone = masks.smallest(columns, count(units)).T & self.prunable[path][:, None]
        return jnp.where(gone.reshape(keep.shape), jnp.uint8(0), keep)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WeightCriterion:
    """Single weights, equally many of each output. Masks are packed (`keep_masked.pack`), by the path of their kernel.

    Importance has the size of the kernels: four bytes a weight.
    """

    kernels: Mapping[str, Kernel]
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the single kernels, by path."""
    prunable: Mapping[str, Bool[np.ndarray, " layers"]]
    """Which of the layers of a kernel may lose weights."""
    alpha: int | float

    def start(self, path: str, keep: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """Zeros, one a weight."""
        layers = keep.shape[:1] if self.kernels[path].stacked else ()
        return jnp.zeros((*layers, *self.shapes[path]), jnp.float32)

    def follow(
        self, path: str, importance: Float[Array, "..."], frozen: PyTree, adapters: PyTree, gradients: PyTree
    ) -> Float[Array, "..."]:
        """One layer at a time."""
        known = self.kernels[path]

        def of_layer(kernel: PyTree, adapter: Any, gradient: Any, before: Array) -> Array:
            kernel = dequantise_tree(kernel, jnp.float32)
            s = salience(kernel, adapter, gradient, alpha=self.alpha, in_axes=known.in_axes)
            return _average(before, s / (jnp.linalg.norm(s.reshape(-1)) + 1e-8), axis=None)

        return _by_layer(of_layer, known, frozen, adapters, gradients, importance)

    def choose(
        self, path: str, importance: Float[Array, "..."], keep: UInt8[Array, "..."], count: Callable[[int], Array]
    ) -> UInt8[Array, "..."]:
        """One layer at a time; exact counts."""
        shape, axes = self.shapes[path], self.kernels[path].in_axes

        def of_layer(operands: tuple[Array, Array, Array]) -> Array:
            importance, packed, prunable = operands
            scores = trees.to_matrix(importance, axes)
            before = trees.to_matrix(unpack(packed, shape), axes)
            mask = masks.without_lowest(scores, count(len(scores)), per="output", keep=before)
            return jnp.where(prunable, pack(trees.from_matrix(mask, shape, axes)), packed)

        prunable = jnp.asarray(self.prunable[path])
        if self.kernels[path].stacked:
            return lax.map(of_layer, (importance, keep, prunable))
        return of_layer((importance, keep, prunable[0]))


class LoRAPruneState(NamedTuple):
    """What `loraprune` knows between two steps."""

    step: Int[Array, ""]
    """Updates made."""
    importance: dict[str, Float[Array, "..."]]
    """By the path of the mask."""


def loraprune(
    criterion: Criterion, schedule: SparsitySchedule, *, every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Follows the importance of what may be pruned, and prunes when it is due; for a chain between clipping and AdamW.

    What is trained is ``{"adapters": tree, "keep": tree of uint8 masks}``. The updates of masks are their changes,
    which wrap around where a mask falls; those of adapters pass through. Masks have no gradients, so whatever else is
    in the chain must leave them alone (`optax.masked`).

    Args:
      criterion: `UnitCriterion` or `WeightCriterion`.
      schedule: which share is gone after how many updates.
      every: updates between two choices of masks; there is one more at the schedule's end.

    Returns:
      A transformation whose ``update(updates, state, params, frozen=...)`` needs what is trained and what is not.

    Raises:
      JpruneError: `every` is below 1; in ``update``, parameters are missing.
    """
    if every < 1:
        raise JpruneError(f"masks are chosen anew every 1 or more steps, got {every}")

    def init(params: PyTree) -> LoRAPruneState:
        keep = trees.flatten(params["keep"])
        return LoRAPruneState(jnp.int32(0), {path: criterion.start(path, leaf) for path, leaf in keep.items()})

    def update(
        updates: PyTree, state: LoRAPruneState, params: PyTree | None = None, *, frozen: PyTree = None, **others: Any
    ) -> tuple[PyTree, LoRAPruneState]:
        del others  # of other transformations in the chain
        if params is None or frozen is None:
            raise JpruneError("loraprune reads adapters and kernels: call update(updates, state, params, frozen=...)")
        step = optax.safe_increment(state.step)
        importance = {
            path: criterion.follow(path, before, frozen, params["adapters"], updates["adapters"])
            for path, before in state.importance.items()
        }
        keep = trees.flatten(params["keep"])
        count = functools.partial(schedule.zeros, step)
        chosen = lax.cond(
            schedule.due(step, every),
            lambda: {path: criterion.choose(path, importance[path], leaf, count) for path, leaf in keep.items()},
            lambda: keep,
        )
        changes = trees.replace(params["keep"], {path: chosen[path] - leaf for path, leaf in keep.items()})
        return {**updates, "keep": changes}, LoRAPruneState(step, importance)

    return optax.GradientTransformationExtraArgs(init, update)


def kept(keep: PyTree) -> Float[Array, ""]:
    """How many units or weights the masks keep."""
    rows = (jnp.sum(lax.population_count(x), axis=-1, dtype=jnp.int32) for x in jax.tree.leaves(keep))
    return sum((jnp.sum(x.astype(jnp.float32)) for x in rows), jnp.float32(0))  # whole numbers might overflow


def _by_layer(
    f: Callable[..., Array], kernel: Kernel, frozen: PyTree, adapters: PyTree, gradients: PyTree, *more: Array
) -> Array:
    """f(kernel, (A, B), (dA, dB), *more) of every layer, one after the other."""

    def pair(tree: PyTree) -> tuple[Array, Array]:
        leaf = _at(tree, kernel.path)
        return leaf["a"], leaf["b"]

    operands = (_at(frozen, kernel.path), pair(adapters), pair(gradients), *more)
    return lax.map(lambda layer: f(*layer), operands) if kernel.stacked else f(*operands)


def _at(tree: PyTree, path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def _average(before: Float[Array, "..."], score: Shaped[Array, "..."], *, axis: int | None) -> Float[Array, "..."]:
    """The moving average, where the score is finite all along the axis."""
    finite = jnp.all(jnp.isfinite(score), axis=axis, keepdims=axis is not None)
    return jnp.where(finite, DECAY * before + (1 - DECAY) * score, before)


__all__ = ["Kernel", "LoRAPruneState", "Part", "UnitCriterion", "WeightCriterion", "kept", "loraprune", "salience"]
