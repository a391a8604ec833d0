"""What LoRAPrune trains: adapters beside frozen kernels, and masks over what both compute together.

The masks lie beside the adapters, ``{"adapters": tree, "keep": tree}``, stacked along with them, so that they are
saved, sharded and resumed with the rest. The model with masks computes what the written one does.

There are two kinds of masks. A kind is a pair of classes, which alone know the form of its leaves: here what a block
computes under them and what is written in the end, in `jprune.train.loraprune`, which knows arrays only, how they are
chosen. Each `Masks` makes the `Criterion` that fits it.

    of         leaves below "keep"                     here          chosen by
    units      blocks/3/mlp ``[count]``, 1 = keep      UnitMasks     UnitCriterion
    weights    a kernel's path, bits (`keep_masked`)   WeightMasks   WeightCriterion
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune import counts, trees
from jprune.anatomy.units import units_of_block, units_of_blocks
from jprune.annotations import Array
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
    """The adapters, as both kinds of masks know them."""

    checkpoint: Checkpoint
    in_axes: Mapping[str, tuple[int, ...]]
    """Input axes of every kernel with an adapter, by path."""
    alpha: float
    dtype: Any
    """The dtype of the activations."""

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


class Masks(abc.ABC):
    """Masks over a model with adapters: how they begin, what they do to a block, and how they go in the end.

    Paths are the model's, but for those of `criterion`, whose trees are stacked. A choice is a row of units or weights
    of which equally many go: the units of a layer, or the inputs of an output.
    """

    @abc.abstractmethod
    def start(self) -> PyTree:
        """Masks that keep everything."""

    @abc.abstractmethod
    def around(self, block: Callable, dropout: float) -> Callable:
        """f(params, ({"adapters", "keep"}, key or None), x) of a block f(params, x), as `blockwise_loss` wants it."""

    @abc.abstractmethod
    def criterion(self, runs: stacked.Runs) -> Criterion:
        """How masks are chosen, for stacked trees."""

    @abc.abstractmethod
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Length and number of the choices of every mask; none where a mask may not lose anything."""

    @abc.abstractmethod
    def gone(self, keep: PyTree, path: str) -> np.ndarray:
        """Numbers of units or weights that are gone, of each choice of the mask at a path."""

    @abc.abstractmethod
    def planned(self, share: float) -> Checkpoint:
        """A model with the shapes of the result if a share of every choice goes."""

    @abc.abstractmethod
    def result(self, trainable: PyTree) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
        """A checkpoint with the shapes of the result, and its parameters by path."""

    def described(self, keep: PyTree) -> dict[str, Any]:
        """What the record of a result says of the masks."""
        del keep
        return {}

    def prunable(self) -> int:
        """The number of units or weights in all choices."""
        return sum(count * times for count, times in self.sizes().values())

    def pruned(self, keep: PyTree, share: float) -> tuple[int, int]:
        """Numbers of units or weights that are gone, and that there were, in all choices.

        Raises:
          JpruneError: a share of a choice should be gone, and is not.
        """
        gone = of = 0
        for path, (count, times) in self.sizes().items():
            expected = counts.floor(count, share)
            if times and not np.all(self.gone(keep, path) == expected):
                raise JpruneError(
                    f"{path}: {expected} of {count} should have gone by the end of the training, and have not: there "
                    "were too many batches without a token to learn"
                )
            gone, of = gone + times * expected, of + times * count
        return gone, of


class UnitMasks(Masks):
    """Masks of heads and feed-forward channels: ``blocks/3/attention`` ``[count]``, 1 = keep.

    A unit acts only through the kernels that read it (o, and down), so it is enough to hide it from them, and from
    norms over all units (`jprune.structured.masking`).

    Args:
      adapted: the adapters.
      first: number of the first layers that are left alone.
      last: number of the last layers that are left alone.

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
        """The number of the layer's units."""
        return np.array([np.count_nonzero(np.asarray(leaf(keep, path)) == 0)])

    def kept(self, keep: PyTree) -> dict[str, np.ndarray]:
        """The units that stay, by name, where units may go."""
        return {name: np.flatnonzero(np.asarray(leaf(keep, name))) for name in self._units if name in self._prunable}

    def described(self, keep: PyTree) -> dict[str, Any]:
        """The numbers of the units that stay."""
        return {"kept": {name: stay.tolist() for name, stay in self.kept(keep).items()}}

    def planned(self, share: float) -> Checkpoint:
        """The model without the first units of each layer: its shapes do not depend on which they are."""
        kept = {
            name: np.arange(counts.floor(count, share), count) for name, (count, times) in self.sizes().items() if times
        }
        return self._adapted.checkpoint.select(positions(self._units.values(), kept))

    def result(self, trainable: PyTree) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
        """The adapters merged, and all cut to the units that stay."""
        cuts = positions(self._units.values(), self.kept(trainable["keep"]))

        def read(path: str) -> np.ndarray:
            merged = self._adapted.merged(trainable["adapters"], path)
            return shrink({path: merged}, {path: cuts[path]} if path in cuts else {})[path]

        return self._adapted.checkpoint.select(cuts), read


class WeightMasks(Masks):
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
        """The numbers of each output's inputs."""
        return np.count_nonzero(~self._mask(keep, path), axis=self._adapted.in_axes[path]).reshape(-1)

    def planned(self, share: float) -> Checkpoint:
        """The model itself: zeros have their places."""
        del share
        return self._adapted.checkpoint

    def result(self, trainable: PyTree) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
        """The adapters merged, with zeros."""

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
