"""The groups of coupled axes of a whole model and its prunable units, from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jprune import trees
from jprune.anatomy.parts import parts
from jprune.checkpoints import Checkpoint
from jprune.checkpoints.select import SELECTABLE
from jprune.models import decoder, families
from jprune.models.config import DecoderConfig
from jprune.models.families import sizes
from jprune.models.parameters import parameters
from jprune.structured.kinds import block_units, hidden_units
from jprune.structured.units import Kind, Units
from jprune.trace import coupled_axes, matmuls
from jprune.trace.coupling.group import Groups

PyTree = Any
TOKENS = 8
"""Length of the sequence that is traced: as short as attention allows, since no group depends on it."""


def model_groups(checkpoint: Checkpoint) -> Groups:
    """The groups of the whole model, from tokens to logits."""
    return coupled_axes(_logits(checkpoint.config), _abstract(checkpoint), _tokens())


def units_of_blocks(checkpoint: Checkpoint, kinds: Sequence[Kind]) -> tuple[Units, ...]:
    """The units of these kinds in every block, block by block; equal blocks are traced once.

    Of experts the channels of each are units by themselves, of which equally many stay. What cannot be cut out of a
    checkpoint, such as the narrow vectors of latent attention, is left out.

    Raises:
      JpruneError: a block has none of a kind, or only frozen ones; the message says why.
    """
    blocks = [part for part in parts(checkpoint) if part.prefix]
    found = (
        units.at(part.prefix)
        for part in blocks
        for units in _units_of_block(part.function, part.shapes, checkpoint.config.d_model, tuple(kinds))
    )
    names, times = parameters(checkpoint.config), times_shared(checkpoint)
    sized = (dataclasses.replace(u, size=names[u.members[0].path][u.members[0].axis]) for u in found)
    return tuple(_in_sets(u, times) for u in sized if u.size in SELECTABLE)


def times_shared(checkpoint: Checkpoint) -> int | None:
    """How many times as wide as the others the expert is that sees every token, where a config.json has no number for
    it alone."""
    return sizes.times_shared(families.explicit(checkpoint.hf_config), checkpoint.config.layer(0))


def _in_sets(units: Units, times: int | None) -> Units:
    """Channels of experts expert by expert; those of the expert that sees every token in as many sets as it is times as
    wide as the others, which it stays."""
    if units.size == "d_expert":
        return units.of_each()
    return dataclasses.replace(units, sets=times or 1) if units.size == "d_shared" else units


def units_of_block(function: Callable, params: PyTree, d_model: int, kinds: Sequence[Kind]) -> tuple[Units, ...]:
    """The units of a block function; of its parameters only shapes and dtypes are read, so they may be traced.

    Raises:
      JpruneError: as `units_of_blocks`.
    """
    shapes = tuple((path, tuple(leaf.shape), leaf.dtype) for path, leaf in trees.flatten(params).items())
    return _units_of_block(function, shapes, d_model, tuple(kinds))


def units_of_hidden(checkpoint: Checkpoint) -> Units:
    """The hidden dimensions of the whole model.

    Raises:
      JpruneError: they are frozen; the message says why.
    """
    return _hidden(checkpoint.config, tuple((path, s.shape, s.dtype) for path, s in checkpoint.shapes.items()))


def reading_axes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The axes over which the model's matmuls sum, by the path of the kernel; a tied embedding is one, as the head."""
    found = matmuls(_logits(checkpoint.config), _abstract(checkpoint), _tokens(), partial=True)
    return {matmul.path: matmul.in_axes for matmul in found}


@functools.lru_cache(maxsize=64)
def _units_of_block(function: Callable, shapes: tuple, d_model: int, kinds: tuple[Kind, ...]) -> tuple[Units, ...]:
    params = _structs(shapes)
    x = jax.ShapeDtypeStruct((1, TOKENS, d_model), jnp.float32)
    return block_units(
        coupled_axes(function, params, x), params, matmuls(function, params, x, stacked=False), kinds=kinds
    )


@functools.lru_cache(maxsize=8)
def _hidden(config: DecoderConfig, shapes: tuple) -> Units:
    f, params = _logits(config), _structs(shapes)
    return hidden_units(
        coupled_axes(f, params, _tokens()), params, matmuls(f, params, _tokens(), stacked=False, partial=True)
    )


def _logits(config: DecoderConfig) -> Callable[[PyTree, jax.Array], jax.Array]:
    return lambda params, tokens: decoder.apply(config, params, tokens)


def _abstract(checkpoint: Checkpoint) -> PyTree:
    return trees.unflatten({p: jax.ShapeDtypeStruct(s.shape, s.dtype) for p, s in checkpoint.shapes.items()})


def _structs(shapes: tuple) -> PyTree:
    return trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in shapes})


def _tokens() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
