"""What a structured run will do, as far as shapes tell, and what is refused before it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jprune import paths
from jprune.checkpoints import Checkpoint, load
from jprune.checkpoints.dtypes import activation_dtype
from jprune.errors import JpruneError
from jprune.pipeline.forecast.forecast import Forecast, Plan
from jprune.pipeline.options import CalibrationText, Machine, sorted_into
from jprune.pipeline.registry import name_of
from jprune.pipeline.shrink.compensation import job_of, too_large
from jprune.pipeline.shrink.scores import Positions, chosen, experts_left, positions_of_experts, units_of
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
    refitting: Plan | None = None
    """What it takes to refit the kernels that lose inputs; None if none is refitted."""
    notices: tuple[str, ...] = ()
    """What the user should know, one sentence each."""


def plan_shrink(
    model: Checkpoint | str | Path,
    *,
    method: UnitMethod,
    target: Target | None = None,
    out: str | Path = ".",
    dtype: str | None = None,
    **options: Any,
) -> ShrinkPlan:
    """What `shrink_model` would do, without a weight or a text; a folder with a config.json is enough.

    Of the other options it takes those of `CalibrationText` and `Machine` in `jprune.pipeline.options`. Where kernels
    are refitted, it compiles what that takes, and measures this machine for two seconds.

    Raises:
      JpruneError: as `shrink_model`, for what can be known from shapes.
    """
    text, machine = sorted_into(options, CalibrationText, Machine)
    checkpoint = model if isinstance(model, Checkpoint) else load(model, weights=False)
    check_target(method, target)
    units = units_of(checkpoint, method) if target else ()
    keep = stays(checkpoint, method, target)
    smaller = planned(checkpoint, method, target)
    activations = activation_dtype(checkpoint, dtype)
    job = job_of(checkpoint, method, text=text, dtype=activations, keep=keep)
    why = None if job is None else too_large(job, machine, paths.given(out))
    return ShrinkPlan(
        parameters=(checkpoint.parameters, smaller.parameters if smaller else None),
        sizes=smaller.sizes if smaller else None,
        units=units,
        refitting=Forecast(job, machine).plan(paths.given(out)) if job is not None and why is None else None,
        notices=() if why is None else (why,),
    )


def check_target(method: UnitMethod, target: Target | None) -> None:
    """Raises `JpruneError` if a method lacks a target, or is given one that it has no use for."""
    wanted = bool(method.kinds)  # else the method says itself which layers or experts stay
    if wanted and target is None:
        raise JpruneError(
            "say how small the model is to be: a share of units (`units`), a share of parameters (`share`) "
            "or a number of parameters (`parameters`)"
        )
    if target is not None and not wanted:
        raise JpruneError(f"{name_of(method)}: the number of layers or experts is its target; leave out the ratio")


def planned(checkpoint: Checkpoint, method: UnitMethod, target: Target | None) -> Checkpoint | None:
    """The sizes of the result as a view; None where only importance can tell.

    Which units stay does not matter for sizes; how many do depends on importance only where all are ranked together.
    """
    if method.removes_experts:
        left = experts_left(checkpoint, method)
        return None if method.counts_follow_scores else checkpoint.select(positions_of_experts(checkpoint, left))
    if not method.kinds:
        return checkpoint.select({}, method.layers_left(checkpoint.config.layers))
    keep = stays(checkpoint, method, target)
    return None if keep is None else checkpoint.select(keep)


def stays(checkpoint: Checkpoint, method: UnitMethod, target: Target | None) -> Positions | None:
    """As many positions as stay, by path and axis, though perhaps others; None where only importance can tell."""
    if method.counts_follow_scores or not method.kinds:
        return None
    assert target is not None  # check_target
    units = units_of(checkpoint, method)
    alike = {u.name: np.zeros(u.count) for u in units}
    kept = chosen(checkpoint, units, alike, method, target, checkpoint.parameters, None)
    return positions(units, kept)
