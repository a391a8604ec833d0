"""What LoRAPrune trains: adapters beside frozen kernels, and masks over what both compute together.

The masks lie beside the adapters, ``{"adapters": tree, "keep": tree}``, stacked along with them, so that they are
saved, sharded and resumed with the rest. Two kinds of masks, of units and of weights, differ in what a block computes
and in what is written in the end; the model with masks computes what the written one does.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jprune import trees
from jprune.anatomy.units import units_of_block, units_of_blocks
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import stacked
from jprune.structured import masking, shrink
from jprune.structured.selection import unprotected
from jprune.structured.units import Kind, UnitMember, Units, positions
from jprune.train import lora
from jprune.train.keep_masked import pack, unpack
from jprune.train.loraprune import Criterion, Kernel, Part, UnitCriterion, WeightCriterion
from jprune.train.quantise import dequantise_tree
from jprune.tuning.weights import leaf, merge_adapter

PyTree = Any
KINDS: tuple[Kind, ...] = ("attention", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """What both kinds know of the adapters."""

    checkpoint: Checkpoint
    in_axes: Mapping[str, tuple[int, ...]]
    """Of every kernel with an adapter, by path."""
    alpha: float
    dtype: Any
    """Of the activations."""

    @functools.cached_property
    def in_block(self) -> dict[str, tuple[int, ...]]:
        """The input axes by path below a block."""
        return {path.split("/", 2)[2]: axes for path, axes in self.in_axes.items()}

    def kernel(self, stacked_path: str, path: str) -> Kernel:
        """The kernel at a path of the stacked trees, of which `path` is the first in the model."""
        return Kernel(path=stacked_path, in_axes=self.in_axes[path], stacked=_layers(stacked_path) > 1)

    def merged(self, adapters: PyTree, path: str) -> np.ndarray:
        """The kernel with its adapter, or another parameter as it is."""
        return merge_adapter(self.checkpoint.read(path), adapters, path, self.alpha, self.in_axes)


@runtime_checkable
class Masks(Protocol):
    """What is masked, and how it goes in the end."""

    def start(self) -> PyTree:
        """Masks that keep everything, by the model's paths."""
        ...

    def around(self, block: Callable, dropout: float) -> Callable:
        """f(params, ({"adapters", "keep"}, key or None), x) of a block f(params, x), as `blockwise_loss` wants it."""
        ...

    def criterion(self, runs: stacked.Runs) -> Criterion:
        """How masks are chosen, for stacked trees."""
        ...

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of every mask, by the model's paths: among how many one number is chosen, and how many such choices it has;
        none where it may not lose anything."""
        ...

    def gone(self, keep: PyTree, path: str) -> np.ndarray:
        """How many are gone, of each choice of the mask at a model's path."""
        ...

    def result(self, trainable: PyTree) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
        """A checkpoint with the shapes of the result, and its parameters by path."""
        ...


class UnitMasks:
    """Masks of heads and feed-forward channels: ``blocks/3/attention`` ``[count]``, 1 = keep.

    A unit acts only through the kernels that read it (o, and down), so it is enough to hide it from them, and from
    norms over all units (`jprune.structured.masking`).

    Args:
      adapted: the adapters.
      first: how many of the first layers are left alone; likewise
      last: of the last.

    Raises:
      JpruneError: there are no such units, or all layers are protected.
    """

    def __init__(self, adapted: Adapted, *, first: int, last: int):
        self._adapted = adapted
        config = adapted.checkpoint.config
        self._units = {u.name: u for u in units_of_blocks(adapted.checkpoint, KINDS)}
        self._prunable = {u.name for u in unprotected(self._units.values(), config.layers, first=first, last=last)}

    def start(self) -> PyTree:
        """One for every unit."""
        return trees.unflatten({name: np.ones(units.count, np.uint8) for name, units in self._units.items()})

    def around(self, block: Callable, dropout: float) -> Callable:
        """The block with adapters, in which the readers of a unit do not see it."""
        alpha, dtype = self._adapted.alpha, self._adapted.dtype
        adapted = lora.adapt(block, alpha=alpha, dropout=dropout)

        def run(params: PyTree, aside: tuple[PyTree, Any], x: Array) -> Array:
            own, key = aside
            params = dequantise_tree(params, dtype)
            units = units_of_block(block, params, self._adapted.checkpoint.config.d_model, KINDS)
            params, adapters = self._hidden(units, params, own["adapters"], own["keep"])
            return adapted(params, adapters, key, x)

        return run

    def _hidden(
        self, units: tuple[Units, ...], params: PyTree, adapters: PyTree, keep: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Kernels and adapters with zeros for what they would read of units that are gone."""
        stays = {name: mask.astype(jnp.float32) for name, mask in trees.flatten(keep).items()}
        in_axes = self._adapted.in_block
        factors = {f"{path}/a": tuple(range(len(axes))) for path, axes in in_axes.items()}
        params = masking.multiply(params, [(u, stays[u.name]) for u in units], in_axes)
        read = [(_read_by_adapters(u, in_axes), stays[u.name]) for u in units]
        return params, masking.multiply(adapters, read, factors)

    def criterion(self, runs: stacked.Runs) -> Criterion:
        """Scores from the kernels that units lie in."""
        masks = stacked.members(self._units, runs)

        def part(path: str, member: UnitMember) -> Part:
            run, below = path.split("/")[1], member.path.split("/", 2)[2]
            kernel = self._adapted.kernel(f"blocks/{run}/{below}", member.path)
            return Part(kernel=kernel, side=member.side, channels=member.channels)

        return UnitCriterion(
            parts={
                path: tuple(part(path, m) for m in self._units[names[0]].members if m.path in self._adapted.in_axes)
                for path, names in masks.items()
            },
            prunable={path: np.array([n in self._prunable for n in names]) for path, names in masks.items()},
            alpha=self._adapted.alpha,
        )

    def sizes(self) -> dict[str, tuple[int, int]]:
        """One choice among the units of each layer."""
        return {name: (units.count, int(name in self._prunable)) for name, units in self._units.items()}

    def gone(self, keep: PyTree, path: str) -> np.ndarray:
        """Of the layer."""
        return np.array([np.count_nonzero(np.asarray(leaf(keep, path)) == 0)])

    def kept(self, keep: PyTree) -> dict[str, np.ndarray]:
        """The units that stay, by name; of those that may go."""
        return {name: np.flatnonzero(np.asarray(leaf(keep, name))) for name in self._units if name in self._prunable}

    def result(self, trainable: PyTree) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
        """Merged, and cut to the units that stay."""
        cuts = positions(self._units.values(), self.kept(trainable["keep"]))

        def read(path: str) -> np.ndarray:
            merged = self._adapted.merged(trainable["adapters"], path)
            return shrink({path: merged}, {path: cuts[path]} if path in cuts else {})[path]

        return self._adapted.checkpoint.select(cuts), read


class WeightMasks:
    """Masks of single weights, packed, at the paths of their kernels.

    A mask goes over kernel and adapter as a whole, ``(W + s A B) * mask``, as it will in the result. The product A B of
    a block is therefore computed, and the gradients of A and B come from that of the masked whole, of one block at a
    time: through a mask of single weights there is no way with less.
    """

    def __init__(self, adapted: Adapted, *, first: int, last: int):
        self._adapted = adapted
        layers = adapted.checkpoint.config.layers
        self._prunable = {path for path in adapted.in_axes if first <= int(path.split("/")[1]) < layers - last}
        if not self._prunable:
            raise JpruneError(f"{first} and {last} protected layers leave none of {layers} to prune; protect fewer")

    def _shape(self, path: str) -> tuple[int, ...]:
        return tuple(self._adapted.checkpoint.shapes[path].shape)

    def start(self) -> PyTree:
        """All ones, packed."""
        paths = self._adapted.in_axes
        return trees.unflatten({path: np.asarray(pack(jnp.ones(self._shape(path), bool))) for path in paths})

    def around(self, block: Callable, dropout: float) -> Callable:
        """The block with merged and masked kernels; there is no place for a dropout between kernel and adapter."""
        del dropout
        alpha, dtype = self._adapted.alpha, self._adapted.dtype

        def run(params: PyTree, aside: tuple[PyTree, Any], x: Array) -> Array:
            own, _ = aside
            kernels, masks = trees.flatten(dequantise_tree(params, dtype)), trees.flatten(own["keep"])
            for path, (a, b) in lora.by_path(own["adapters"]).items():
                whole = kernels[path].astype(jnp.float32) + lora.delta(a, b, alpha, self._adapted.in_block[path])
                kernels[path] = jnp.where(unpack(masks[path], whole.shape), whole, 0).astype(dtype)
            return block(trees.unflatten(kernels), x)

        return run

    def criterion(self, runs: stacked.Runs) -> Criterion:
        """Scores of the weights themselves."""
        masks = stacked.members(self._adapted.in_axes, runs)
        return WeightCriterion(
            kernels={path: self._adapted.kernel(path, names[0]) for path, names in masks.items()},
            shapes={path: self._shape(names[0]) for path, names in masks.items()},
            prunable={path: np.array([n in self._prunable for n in names]) for path, names in masks.items()},
            alpha=self._adapted.alpha,
        )

    def sizes(self) -> dict[str, tuple[int, int]]:
        """A choice among the inputs of each output."""
        found = {}
        for path, axes in self._adapted.in_axes.items():
            shape = self._shape(path)
            inputs = int(np.prod([shape[axis] for axis in axes]))
            found[path] = inputs, int(np.prod(shape)) // inputs if path in self._prunable else 0
        return found

    def _mask(self, keep: PyTree, path: str) -> np.ndarray:
        return np.asarray(unpack(jnp.asarray(leaf(keep, path)), self._shape(path)))

    def gone(self, keep: PyTree, path: str) -> np.ndarray:
        """Of each output."""
        return np.count_nonzero(~self._mask(keep, path), axis=self._adapted.in_axes[path]).reshape(-1)

    def result(self, trainable: PyTree) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
        """Merged, with zeros."""

        def read(path: str) -> np.ndarray:
            merged = self._adapted.merged(trainable["adapters"], path)
            if path not in self._prunable:
                return merged
            return np.where(self._mask(trainable["keep"], path), merged, np.zeros_like(merged))

        return self._adapted.checkpoint, read


def _read_by_adapters(units: Units, in_axes: Mapping[str, tuple[int, ...]]) -> Units:
    """The units as they lie in the factors A ``[*d_in, r]`` of the kernels that read them."""
    members = [
        dataclasses.replace(m, path=f"{m.path}/a", axis=axes.index(m.axis), shape=(*(m.shape[i] for i in axes), 1))
        for m in units.members
        if m.axis in (axes := in_axes.get(m.path, ()))
    ]
    return dataclasses.replace(units, members=tuple(members), renormalised=False)


def _layers(stacked_path: str) -> int:
    return len(stacked.layers(stacked_path.split("/")[1]))
