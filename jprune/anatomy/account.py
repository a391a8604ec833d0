"""What becomes of every parameter of a model: pruned, of other use, or not read; from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jprune.anatomy.parts import Part, parts
from jprune.checkpoints import Checkpoint
from jprune.trace.report import Leaf, report

TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A parameter of a model."""

    path: str
    share: float
    """Its elements / all parameters."""
    state: str
    """As in `jprune.report`: prunable, skipped, other or never read."""
    reason: str
    """Why it is not prunable; empty if it is."""


def account(checkpoint: Checkpoint) -> tuple[Entry, ...]:
    """Every parameter of a model, in its order; equal blocks are traced once."""
    model, total = checkpoint.model, checkpoint.parameters
    found: dict[str, list[Leaf]] = {path: [] for path in checkpoint.shapes}
    hidden = jax.ShapeDtypeStruct((1, TOKENS, model.d_model), jnp.float32)
    for part, x in [*((part, hidden) for part in parts(checkpoint)), *_ends(checkpoint, hidden)]:
        for leaf in _leaves(part.function, part.shapes, x):
            found[part.path(leaf.path)].append(leaf)
    entries = []
    for path, leaves in found.items():
        states = dict.fromkeys(leaf.state for leaf in leaves if leaf.state != "never read")
        state = next(iter(states), "never read") if len(states) <= 1 else "other"
        reasons = [reason for leaf in leaves for reason in _reasons(leaf)] if state != "prunable" else []
        size = checkpoint.shapes[path].size
        entries.append(Entry(path=path, share=size / total, state=state, reason="; ".join(dict.fromkeys(reasons))))
    return tuple(entries)


def _reasons(leaf: Leaf) -> list[str]:
    """Why a leaf is not prunable, without the lines of our own source."""
    if leaf.matmuls:
        return ["read by the head"]
    if leaf.skipped:
        return [skip.reason.split(" at /")[0] for skip in leaf.skipped]
    return [other.split(" at ")[0] for other in leaf.others] or ["never read"]


def _ends(checkpoint: Checkpoint, hidden: jax.ShapeDtypeStruct) -> list[tuple[Part, jax.ShapeDtypeStruct]]:
    """What comes before the blocks, and behind them if the embedding is the head too."""
    model = checkpoint.model

    def leaves(*names: str) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        here = [path for path in checkpoint.shapes if path.split("/")[0] in names]
        return tuple((path, checkpoint.shapes[path].shape, checkpoint.shapes[path].dtype) for path in here)

    ends = [(Part("", model.embed, leaves("embed")), jax.ShapeDtypeStruct((1, TOKENS), jnp.int32))]
    if model.tied:
        ends.append((Part("", model.head, leaves(*model.head_parts)), hidden))
    return ends


@functools.lru_cache(maxsize=64)
def _leaves(function: Callable, shapes: tuple, x: jax.ShapeDtypeStruct) -> tuple[Leaf, ...]:
    return report(function, Part("", function, shapes).abstract(), x).leaves
