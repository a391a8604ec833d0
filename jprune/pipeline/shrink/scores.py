"""What stays of a model: its units or layers scored as the method asks, with weights and gradients a block at a time.

The smaller model is a view of the larger one from the first step on (`Checkpoint.select`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jprune.anatomy.units import times_shared, units_of_blocks, units_of_hidden
from jprune.checkpoints import Checkpoint
from jprune.data.windows import Windows
from jprune.errors import JpruneError
from jprune.evaluate import gradients
from jprune.evaluate.influence import block_influences
from jprune.models.parameters import parameters
from jprune.pipeline.shrink.experts import ExpertsLeft, layers_with_experts, use_of_experts
from jprune.positions import of
from jprune.runs.folder import RunFolder
from jprune.runs.report import Progress
from jprune.structured.base import UnitMethod
from jprune.structured.importance import Vectors
from jprune.structured.selection import Kept, Target
from jprune.structured.units import Units, positions

Scores = Mapping[str, np.ndarray]
Positions = dict[str, dict[int, np.ndarray]]


class Smaller(NamedTuple):
    """What stays of a model, in which no weight has changed."""

    view: Checkpoint
    """The smaller model."""
    layers: tuple[int, ...]
    """Which layers of the original it has."""
    keep: Positions
    """The positions that stay in the original, by path and axis."""
    experts: tuple[ExpertsLeft, ...] = ()
    """Which experts stay, where experts go."""


def smaller_model(
    checkpoint: Checkpoint,
    method: UnitMethod,
    target: Target | None,
    examples: Windows | None,
    dtype: Any,
    progress: Callable[[Progress], None],
    folder: RunFolder | None = None,
) -> Smaller:
    """What stays of a model; `folder` keeps what is known of its experts, where that is asked for."""
    if method.removes_experts:
        return _fewer_experts(checkpoint, method, examples, dtype, progress, folder)
    count = checkpoint.config.layers
    influences = None
    if method.needs == "influence":
        assert examples is not None
        influences = block_influences(
            checkpoint,
            examples.tokens,
            dtype=dtype,
            progress=lambda done, total: progress(Progress(float(done), total, "influence of layers", "importance")),
        )
    layers = method.layers_left(count, influences)
    if not method.kinds:
        return Smaller(checkpoint.select({}, layers), layers, {})
    assert target is not None
    whole, view = checkpoint.parameters, checkpoint
    total: Positions = {}
    # Found once: in a smaller model the same trace may give units of other kinds (one KV head is no group).
    units = units_of(checkpoint, method)
    initial = {u.name: u.count for u in units}
    for step in range(1, method.steps + 1):
        scores = _scores(view, units, method, step, examples, functools.partial(_report, progress, step, method.steps))
        kept = chosen(view, units, scores, method, target.step(step, method.steps, whole), whole, initial)
        keep = positions(units, kept)
        view, units = view.select(keep), tuple(u.after(kept[u.name], keep) for u in units)
        for path, axes in keep.items():
            before = total.setdefault(path, {})
            before |= {axis: of(before[axis], now) if axis in before else now for axis, now in axes.items()}
    return Smaller(view, layers, total)


def _fewer_experts(
    checkpoint: Checkpoint,
    method: UnitMethod,
    examples: Windows | None,
    dtype: Any,
    progress: Callable[[Progress], None],
    folder: RunFolder | None,
) -> Smaller:
    seen = None
    counts = layers_with_experts(checkpoint)
    if method.needs == "experts" and counts:
        assert examples is not None
        assert folder is not None
        seen = use_of_experts(checkpoint, examples.tokens, dtype=dtype, folder=folder, tell=progress)
    left = experts_left(checkpoint, method, seen)
    keep = positions_of_experts(checkpoint, left)
    told = tuple(
        ExpertsLeft(
            layer=i,
            kept=tuple(kept.tolist()),
            scores=tuple(method.expert_scores(i, counts[i], seen).tolist()),
            tokens=None if seen is None else tuple(int(n) for n in seen[i].tokens),
        )
        for i, kept in left.items()
    )
    return Smaller(checkpoint.select(keep), tuple(range(checkpoint.config.layers)), keep, told)


def experts_left(checkpoint: Checkpoint, method: UnitMethod, seen: Any = None) -> dict[int, np.ndarray]:
    """The experts that stay, by layer, as the method says; without their use only how many."""
    config = checkpoint.config
    least = -(-config.experts_per_token // config.groups_per_token) * config.expert_groups
    return method.experts_left(layers_with_experts(checkpoint), least, config.expert_groups, seen)


def positions_of_experts(checkpoint: Checkpoint, left: Mapping[int, np.ndarray]) -> Positions:
    """Experts as positions of every parameter that has an axis of them: kernels, routers and what corrects these."""
    return {
        path: {axes.index("experts"): left[int(path.split("/")[1])]}
        for path, axes in parameters(checkpoint.config).items()
        if "experts" in axes
    }


def _report(progress: Callable[[Progress], None], step: int, steps: int, done: int, total: int) -> None:
    text = f"step {step} of {steps}" if steps > 1 else "gradients and weights"
    progress(Progress(float(done + (step - 1) * total), total * steps, text, "importance"))


def units_of(checkpoint: Checkpoint, method: UnitMethod) -> tuple[Units, ...]:
    """The units that may go; none where whole layers go.

    Raises:
      JpruneError: the model has none of a kind, or only frozen ones, or some that cannot go as the method wants it.
    """
    if not method.kinds:
        return ()
    config = checkpoint.config
    if config.kv_rank and {"attention", "query"} & set(method.kinds):
        raise JpruneError(
            f"{config.architecture}: the heads of latent attention cannot be removed yet, since those of queries, keys "
            "and values differ in width; with `heads` none feed-forward channels go alone"
        )
    if "hidden" in method.kinds:
        return method.prunable((units_of_hidden(checkpoint),), checkpoint.config.layers)
    if method.counts_follow_scores and times_shared(checkpoint):
        raise JpruneError(
            f"the shared expert of {config.architecture} is as wide as a number of the others together, which it would "
            "not stay if all units were ranked together; leave out `globally`"
        )
    return method.prunable(units_of_blocks(checkpoint, method.kinds), config.layers)


def chosen(
    view: Checkpoint,
    units: tuple[Units, ...],
    scores: Scores,
    method: UnitMethod,
    target: Target,
    whole: int,
    initial: Mapping[str, int] | None,
) -> Kept:
    """The units that the scores and the target leave, in one step."""

    def choose(ratio: float) -> Kept:
        return method.select(units, scores, ratio, initial=initial)

    now = view.parameters

    def count(kept: Kept) -> int:
        return now - sum((u.count - len(kept[u.name])) * u.parameters for u in units)

    return target.reach(choose, count, whole)


def _scores(
    view: Checkpoint,
    units: tuple[Units, ...],
    method: UnitMethod,
    step: int,
    examples: Windows | None,
    progress: Callable[[int, int], None],
) -> Scores:
    """The importance of every unit. Weights, and gradients where they are needed, come a block at a time and go."""
    if method.needs == "nothing":
        return {u.name: method.score(u, step=step) for u in units}
    collected: dict[str, Vectors] = {u.name: {} for u in units}

    def visit(prefix: str, params: Any, mean: Any = None, square: Any = None) -> None:
        for u in units:
            if u.layer is None or prefix == f"blocks/{u.layer}":
                collected[u.name] |= method.vectors(u, params, mean, square, prefix=prefix)

    ends = any(u.layer is None for u in units)
    if examples is None:
        prefixes = [f"blocks/{i}" for i in range(view.config.layers)]
        for i, prefix in enumerate(prefixes):
            visit(prefix, view.params(prefix))
            progress(i + 1, len(prefixes))
        if ends:
            names = dict.fromkeys(path.split("/")[0] for path in view.shapes if not path.startswith("blocks/"))
            visit("", {name: view.params(name) for name in names})
    else:
        gradients.stream(
            view,
            examples.tokens,
            visit=lambda g: visit(g.prefix, g.params, g.mean, g.square),
            squares=method.needs == "squares",
            ends=ends,
            progress=progress,
        )
    return {u.name: method.score(u, collected[u.name], step) for u in units}
