"""What a structured run will do, as far as shapes tell, and what is refused before it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoints import Checkpoint, load
from jprune.errors import JpruneError
from jprune.pipeline.registry import name_of
from jprune.pipeline.shrink.scores import chosen, units_of
from jprune.structured.base import UnitMethod
from jprune.structured.selection import Target
from jprune.structured.units import Units, positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """What a structured run would do, as far as shapes tell."""

    parameters: tuple[int, int | None]
    """Numbers of parameters before and after; None where only importance can tell."""
    sizes: tuple[dict[str, int], ...] | None
    """The sizes of every layer of the result; None where only importance can tell."""
    units: tuple[Units, ...]
    """What could be removed."""


def plan_shrink(
    model: Checkpoint | str | Path, *, method: UnitMethod, target: Target | None = None, **options: Any
) -> ShrinkPlan:
    """What `shrink_model` would do, without a weight or a text; a folder with a config.json is enough.

    Raises:
      JpruneError: as `shrink_model`, for what can be known from shapes.
    """
    del options
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    check_target(method, target)
    units = units_of(checkpoint, method) if target else ()
    smaller = planned(checkpoint, method, target)
    return ShrinkPlan(
        parameters=(checkpoint.parameters, smaller.parameters if smaller else None),
        sizes=smaller.sizes if smaller else None,
        units=units,
    )


def check_target(method: UnitMethod, target: Target | None) -> None:
    """Raises `JpruneError` if a method lacks a target, or is given one that it has no use for."""
    wanted = bool(method.kinds)  # else the method says itself which layers stay
    if wanted and target is None:
        raise JpruneError(
            "say how small the model is to be: a share of units (`units`), a share of parameters (`share`) "
            "or a number of parameters (`parameters`)"
        )
    if target is not None and not wanted:
        raise JpruneError(f"{name_of(method)}: the number of layers is its target; leave out the ratio")


def planned(checkpoint: Checkpoint, method: UnitMethod, target: Target | None) -> Checkpoint | None:
    """The sizes of the result as a view; None where only importance can tell.

    Which units stay does not matter for sizes; how many do depends on importance only where all are ranked together.
    """
    if not method.kinds:
        return checkpoint.select({}, method.layers_left(checkpoint.config.layers))
    if method.counts_follow_scores:
        return None
    assert target is not None  # check_target
    units = units_of(checkpoint, method)
    alike = {u.name: np.zeros(u.count) for u in units}
    kept = chosen(checkpoint, units, alike, method, target, checkpoint.parameters, None)
    return checkpoint.select(positions(units, kept))
