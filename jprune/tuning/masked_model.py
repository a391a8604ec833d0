"""A model on its way to a target shape: the masks it needs, what they do to it, and what is left of it.

A mask has a number for each unit of its kind, in rows of which equally many units are to stay:

    layer       [L]         whole layers
    hidden      [d_model]   shared by all layers, embedding and head
    attention   [L, K]      KV heads with their query heads
    query       [L, K, G]   query heads inside each KV head
    mlp         [L, d_ff]   feed-forward channels

Only the kinds that the target asks for have one. What a unit is, and that it may go, the trace says
(`jprune.structured.units`), for any family of decoders.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.anatomy.parts import parts
from jprune.anatomy.units import reading_axes, units_of_blocks, units_of_hidden
from jprune.annotations import Array, Float
from jprune.checkpoints import Checkpoint
from jprune.errors import JpruneError
from jprune.models import stacked
from jprune.models.config import DecoderConfig
from jprune.structured import masking
from jprune.structured import shape as shapes
from jprune.structured.shape import Shape
from jprune.structured.surgery import shrink
from jprune.structured.units import Kind, Units, merge
from jprune.trace.coupling.residual import Outlet, outlets

PyTree = Any
Masks = Mapping[str, Float[Array, "*rows n"]]
TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """Where masks act in a layer; paths are relative to it."""

    units: tuple[Units, ...]
    """Named by their kind."""
    hidden: Units | None
    outlets: tuple[Outlet, ...]
    in_axes: Mapping[str, tuple[int, ...]]

    def multiply(self, params: PyTree, masks: Mapping[str, Array]) -> PyTree:
        """The layer's parameters under the masks of this layer."""
        here = [(u, masks[u.kind].reshape(-1)) for u in self.units]
        if self.hidden is not None:
            here.append((self.hidden, masks["hidden"]))
        layer = (self.outlets, masks["layer"]) if "layer" in masks else None
        return masking.multiply(params, here, self.in_axes, layer=layer)


class MaskedModel:
    """A model under masks that lead to a target shape. Reads no weight.

    Args:
      checkpoint: the model.
      target: what is to be left of it.

    Attributes:
      targets: how many of each row are to stay, by kind of mask.
      shapes: of the masks.
      smaller: one of the models that may be left, as a view; they differ in what layers do not share, as windows.

    Raises:
      JpruneError: the target is no part of the model: a size is larger or does not fit, or what it asks to be pruned
        is frozen (the message says why).
    """

    def __init__(self, checkpoint: Checkpoint, target: Shape):
        self.checkpoint, self.target = checkpoint, target
        self.source = source = shape_of(checkpoint)
        shapes.check(target, source)
        self.targets, self.shapes = _rows(source, target)
        layers = range(source.layers)
        if "mlp" in self.targets and checkpoint.config.experts:
            raise JpruneError(f"{checkpoint.config.architecture}: the width of experts cannot be lowered by a target")
        in_axes = reading_axes(checkpoint)
        kinds: list[Kind] = [kind for kind in ("attention", "query", "mlp") if kind in self.targets]  # type: ignore[misc]
        found = units_of_blocks(checkpoint, kinds) if kinds else ()
        self._units = [tuple(u for u in found if u.layer == i) for i in layers]
        for units in self._units:
            if len(units) != len(kinds):
                raise JpruneError(
                    f"expected one set of units of each of {', '.join(kinds)} in a layer, found "
                    f"{', '.join(u.name for u in units)}; a model with a single attention head has such"
                )
        self._hidden = units_of_hidden(checkpoint) if "hidden" in self.targets else None
        self._ends = self._hidden and dataclasses.replace(
            self._hidden, members=tuple(m for m in self._hidden.members if not m.path.startswith("blocks/"))
        )
        self._in_axes = in_axes
        self._layers: dict[tuple, _Layer] = {}
        for i, part in enumerate(p for p in parts(checkpoint) if p.prefix):
            start = f"{part.prefix}/"
            key = _signature(part.abstract())
            if key in self._layers:
                continue
            x = jax.ShapeDtypeStruct((1, TOKENS, source.hidden), jnp.float32)
            self._layers[key] = _Layer(
                units=tuple(u.below(part.prefix) for u in self._units[i]),
                hidden=None if self._hidden is None else self._hidden.below(part.prefix),
                outlets=outlets(part.function, part.abstract(), x) if "layer" in self.targets else (),
                in_axes={p.removeprefix(start): axes for p, axes in in_axes.items() if p.startswith(start)},
            )
        first = {kind: np.arange(size[-1]) < self.targets[kind] for kind, size in self.shapes.items()}
        # Where the first units may stay and where the last may: nothing is to be refused when all the work is done.
        self.smaller, _ = (
            self.left(
                {k: jnp.asarray(np.broadcast_to(x[::way], self.shapes[k]), jnp.float32) for k, x in first.items()}
            )
            for way in (1, -1)
        )

    def left(self, masks: Masks) -> Checkpoint:
        """What masks leave of the model, as a view of it with its own weights; its paths are those of `sheared`.

        Raises:
          JpruneError: it is no model that a config can describe.
        """
        keeps = []
        for i, units in enumerate(self._units):
            keeps += [u.keep(np.flatnonzero(np.asarray(masks[u.kind][i]))) for u in units]
        if self._hidden is not None:
            keeps.append(self._hidden.keep(np.flatnonzero(np.asarray(masks["hidden"]))))
        return self.checkpoint.select(merge(keeps), self._kept_layers(masks))

    def operands(self, params: PyTree, masks: Masks) -> tuple[PyTree, dict[str, Any]]:
        """Parameters and the `aside` of `stacked.hidden`, to be used with `around`.

        Args:
          params: of the model, with blocks stacked or not.
          masks: numbers in [0, 1], in the shapes `shapes`.
        """
        aside: dict[str, Any] = {}
        for key in params["blocks"]:
            run = stacked.layers(key)
            here = {kind: x[run[0] : run[-1] + 1] for kind, x in masks.items() if kind != "hidden"}
            if "hidden" in masks:
                here["hidden"] = jnp.broadcast_to(masks["hidden"], (len(run), *masks["hidden"].shape))
            aside[key] = here if len(run) > 1 else {kind: x[0] for kind, x in here.items()}
        return {**self._masked_ends(params, masks), "blocks": params["blocks"]}, aside

    def around(self, dtype: Any) -> stacked.Around:
        """A block computed in `dtype` from parameters under its masks, which are its `aside`."""

        def masked(block: Callable) -> Callable:
            def f(params: PyTree, aside: Mapping[str, Array], x: Array) -> Array:
                under = self._layers[_signature(params)].multiply(params, aside)
                return block(jax.tree.map(lambda leaf: leaf.astype(dtype), under), x)

            return f

        return masked

    def sheared(self, params: PyTree, masks: Masks) -> Iterator[tuple[str, Array]]:
        """The parameters of what masks leave, with the masks multiplied in: (path in the smaller model, values).

        Args:
          params: of the model, with blocks not stacked.
          masks: 0 for what goes.
        """
        hidden = np.flatnonzero(np.asarray(masks.get("hidden", ())))
        ends = self._masked_ends(params, masks)
        yield from _written(shrink(ends, self._ends.keep(hidden) if self._ends else {}))
        for new, old in enumerate(self._kept_layers(masks)):
            block = params["blocks"][str(old)]
            layer = self._layers[_signature(block)]
            here = {kind: x if kind == "hidden" else x[old] for kind, x in masks.items()}
            keeps = [u.keep(np.flatnonzero(np.asarray(here[u.kind]).reshape(-1))) for u in layer.units]
            if layer.hidden is not None:
                keeps.append(layer.hidden.keep(hidden))
            for path, values in _written(shrink(layer.multiply(block, here), merge(keeps))):
                yield f"blocks/{new}/{path}", values

    def _masked_ends(self, params: PyTree, masks: Masks) -> dict[str, Any]:
        """What lies before and after the blocks."""
        ends = {name: tree for name, tree in params.items() if name != "blocks"}
        if self._ends is None:
            return ends
        return masking.multiply(ends, [(self._ends, masks["hidden"])], self._in_axes)

    def _kept_layers(self, masks: Masks) -> list[int]:
        if "layer" not in masks:
            return list(range(self.source.layers))
        return [int(i) for i in np.flatnonzero(np.asarray(masks["layer"]))]

    def shape(self, sizes: Mapping[str, float]) -> dict[str, float]:
        """The sizes of a model, of the numbers of units that stay in a row of each kind."""
        kv_heads = sizes.get("attention", self.source.kv_heads)
        group = sizes.get("query", self.source.heads // self.source.kv_heads)
        found = {
            "layers": sizes.get("layer", self.source.layers),
            "hidden": sizes.get("hidden", self.source.hidden),
            "heads": kv_heads * group,
            "kv_heads": kv_heads,
            "intermediate": sizes.get("mlp", self.source.intermediate),
        }
        return {name: float(size) for name, size in found.items()}


def shape_of(checkpoint: Checkpoint) -> Shape:
    """The shape of a model.

    Raises:
      JpruneError: its layers differ.
    """
    config = checkpoint.config
    if not config.uniform:
        raise JpruneError(
            f"{checkpoint.source}: its layers differ in size, and a target shape is for models whose layers are equal"
        )
    return shape_in(config)


def shape_in(config: DecoderConfig) -> Shape:
    """The sizes in a config, which are those of all layers if they are equal."""
    return Shape(
        layers=config.layers,
        hidden=config.d_model,
        heads=config.heads,
        kv_heads=config.kv_heads,
        intermediate=config.d_ff,
    )


def _rows(source: Shape, target: Shape) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """How many of a row stay, and the shape of the mask, of every kind that the target asks for."""
    group, left = source.heads // source.kv_heads, target.heads // target.kv_heads
    every = {
        "layer": ((), source.layers, target.layers),
        "hidden": ((), source.hidden, target.hidden),
        "attention": ((source.layers,), source.kv_heads, target.kv_heads),
        "query": ((source.layers, source.kv_heads), group, left),
        "mlp": ((source.layers,), source.intermediate, target.intermediate),
    }
    asked = {kind: row for kind, row in every.items() if row[1] != row[2]}
    return {kind: row[2] for kind, row in asked.items()}, {kind: (*row[0], row[1]) for kind, row in asked.items()}


def _signature(block: PyTree) -> tuple:
    return tuple((path, tuple(leaf.shape)) for path, leaf in sorted(trees.flatten(block).items()))


def _written(params: PyTree) -> Iterator[tuple[str, Array]]:
    for path, leaf in trees.flatten(params).items():
        if path.rsplit("/", 1)[-1] != masking.KEPT:
            yield path, leaf
