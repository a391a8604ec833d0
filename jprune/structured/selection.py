"""Which units stay: counts, ranking, sizes that hardware likes, and the ratio that makes a wanted size. NumPy.

Counts are those of LLM-Pruner's program. Of a group with n units, each w channels wide where it is narrowest, a ratio r
takes c = n w - int(n w (1 - r)) channels, and of these whole units only, c // w. So channels kept are rounded down, and
heads kept are rounded up. Of equal importance the first go first.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from jprune import counts
from jprune.annotations import Float, Int
from jprune.errors import JpruneError
from jprune.structured.units import Units

Kept = dict[str, np.ndarray]
"""By the name of the units: which stay, ascending."""
Normalise = Literal["none", "mean", "max", "sum"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """How small: exactly one of three."""

    units: float | None = None
    """Share of the units to remove, in (0, 1); of each group, or of all together if they are ranked together."""
    share: float | None = None
    """Share of all parameters of the model to remove, in (0, 1)."""
    parameters: int | None = None
    """Parameters to stay at most."""

    def __post_init__(self):
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) != 1:
            raise JpruneError(f"give one target: a share of units, a share of parameters, or a count; got {given}")
        ((name, value),) = given.items()
        if name == "parameters" and value < 1:
            raise JpruneError(f"parameters to stay must be positive, got {value}")
        if name != "parameters" and not 0 < value < 1:
            what = "units" if name == "units" else "parameters"
            raise JpruneError(f"the share of {what} to remove lies between 0 and 1, got {value}")

    def described(self) -> dict[str, float | int | None]:
        """By the names of the command line's options."""
        return {"ratio": self.units, "parameter_ratio": self.share, "parameters": self.parameters}

    def step(self, step: int, steps: int, whole: int) -> "Target":
        """The target of the step-th of some equal steps, counted from 1, for a model that had `whole` parameters."""
        if self.units is not None:
            return Target(units=self.units * step / steps)
        return Target(parameters=whole - (whole - self.most(whole)) * step // steps)

    def most(self, whole: int) -> int:
        """The most parameters to stay of a model with `whole`; for targets that are not shares of units."""
        return counts.floor(whole, 1 - counts.exact(self.share or 0)) if self.parameters is None else self.parameters

    def reach(self, choose: Callable[[float], Kept], count: Callable[[Kept], int], whole: int) -> Kept:
        """What stays; arguments as for `fit`, and the parameters that the model had before the first step."""
        if self.units is not None:
            return choose(self.units)
        if (most := self.most(whole)) >= whole:
            raise JpruneError(f"the model has {whole} parameters, no more than the {most} asked for: nothing to prune")
        return fit(choose, count, most)


def unprotected(units: Iterable[Units], layers: int, *, first: int = 0, last: int = 0) -> tuple[Units, ...]:
    """The units that are in neither the `first` nor the `last` of the model's `layers`, or in no layer.

    Raises:
      JpruneError: none are left.
    """
    found = tuple(u for u in units if u.layer is None or first <= u.layer < layers - last)
    if not found:
        raise JpruneError(
            f"the first {first} and last {last} of {layers} layers are protected, which leaves none to prune; "
            "protect fewer (`protect_first`, `protect_last`)"
        )
    return found


def select(
    units: Sequence[Units],
    scores: Mapping[str, Float[np.ndarray, " count"]],
    ratio: float,
    *,
    ranking: Literal["local", "global"] = "local",
    normalise: Normalise = "none",
    uniform: bool = False,
    round_to: int = 1,
    initial: Mapping[str, int] | None = None,
) -> Kept:
    """The units that stay.

    Args:
      units: those that may be pruned.
      scores: importance by the name of the units; higher stays.
      ratio: share of the units to remove, in [0, 1).
      ranking: "local" removes the same share of each group. "global" ranks all units together, a head and a channel
        each as one unit; equally many query heads of every KV head go, so these count by ranks, with their sum.
      normalise: what the scores of a kind (attention, mlp, ...) are divided by before they are ranked together: their
        own mean, maximum or sum over the model. The authors do not.
      uniform: the same number in every group of a kind and a size: the mean of what would stay, rounded.
      round_to: makes the channels that stay a multiple of it, the nearest and at least one. Of units one channel wide
        only: a head is as wide as it is.
      initial: how many units there were before the first of several steps, by name; the ratio is a share of these.

    Raises:
      JpruneError: a group would be left without a unit, or `round_to` is more than it has.
    """
    if not 0 <= ratio < 1:
        raise JpruneError(f"the share of units to remove must lie in [0, 1), got {ratio}")
    before = {u.name: u.count if initial is None else initial[u.name] for u in units}
    order = {u.name: _order(u, scores[u.name]) for u in units}
    if ranking == "local":
        left = {u.name: min(u.count // u.sets, _kept(before[u.name] // u.sets, u.width, ratio)) for u in units}
    else:
        left = _ranked(units, scores, order, ratio, sum(before[u.name] // u.sets for u in units), normalise)
    if uniform:
        left = _uniform(units, left)
    kept = {}
    for u in units:
        stay = _rounded(u, left[u.name], round_to)
        if stay < 1:
            raise JpruneError(
                f"{u.name}: nothing of its {u.count} units would stay at a ratio of {ratio:.4g}; lower the ratio, "
                "protect this layer, or normalise scores if all kinds of units are ranked together"
            )
        kept[u.name] = np.sort(order[u.name][:, order[u.name].shape[1] - stay :].reshape(-1))
    return kept


def fit(choose: Callable[[float], Kept], count: Callable[[Kept], int], parameters: int) -> Kept:
    """What stays at the lowest ratio that leaves at most `parameters`.

    Args:
      choose: from a ratio of units to what stays; a higher ratio never leaves more.
      count: the parameters of the whole model with only these units.
      parameters: the most that may stay; what comes back is the closest below, by steps of whole units.

    Raises:
      JpruneError: the model already is that small, or no ratio makes it so small.
    """
    if (whole := count(choose(0.0))) <= parameters:
        raise JpruneError(
            f"the model has {whole} parameters, no more than the {parameters} asked for: nothing to prune"
        )
    low, high = 0.0, 1.0
    best, refused = None, ""
    for _ in range(50):
        ratio = (low + high) / 2
        try:
            kept = choose(ratio)
        except JpruneError as error:
            high, refused = ratio, f" ({error})"
            continue
        if count(kept) <= parameters:
            high, best = ratio, kept
        else:
            low = ratio
    if best is None:
        raise JpruneError(
            f"expected {parameters} parameters at most, but units can only go down to {count(choose(low))} of "
            f"{whole}{refused}; protect fewer layers, or prune more kinds of units"
        )
    return best


def _order(units: Units, scores: Float[np.ndarray, " count"]) -> Int[np.ndarray, "sets rank"]:
    """The units of each set, from the one to go first to the one to stay longest."""
    if scores.shape != (units.count,):
        raise JpruneError(f"{units.name}: expected {units.count} scores, got an array of shape {scores.shape}")
    if not np.all(np.isfinite(scores)):
        raise JpruneError(f"{units.name}: scores must be finite numbers; do weights or gradients overflow?")
    by_set = scores.reshape(units.sets, -1)
    return np.argsort(by_set, axis=1, kind="stable") + np.arange(units.sets)[:, None] * by_set.shape[1]


def _kept(count: int, width: int, ratio: float) -> int:
    return -(-counts.floor(count * width, 1 - counts.exact(ratio)) // width)


def _ranked(
    units: Sequence[Units],
    scores: Mapping[str, np.ndarray],
    order: Mapping[str, np.ndarray],
    ratio: float,
    before: int,
    normalise: Normalise,
) -> dict[str, int]:
    """How many ranks of each set stay, if all are ranked together."""
    divisor: dict[str, float] = defaultdict(lambda: 1.0)
    if normalise != "none":
        for kind in {u.kind for u in units}:
            together = np.concatenate([scores[u.name] for u in units if u.kind == kind])
            divisor[kind] = float(getattr(together, normalise)()) or 1.0
    ranks = [scores[u.name][order[u.name]].sum(0) / divisor[u.kind] for u in units]
    owner = np.repeat(np.arange(len(units)), [len(r) for r in ranks])
    gone = np.argsort(np.concatenate(ranks), kind="stable")[
        : max(len(owner) - counts.floor(before, 1 - counts.exact(ratio)), 0)
    ]
    lost = np.bincount(owner[gone], minlength=len(units))
    return {u.name: len(r) - int(n) for u, r, n in zip(units, ranks, lost)}


def _uniform(units: Sequence[Units], left: Mapping[str, int]) -> dict[str, int]:
    alike: dict[tuple[str, str], list[Units]] = defaultdict(list)
    for u in units:
        alike[u.kind, u.size].append(u)
    same = {
        key: min(round(sum(left[u.name] for u in group) / len(group)), min(u.count // u.sets for u in group))
        for key, group in alike.items()
    }
    return {u.name: same[u.kind, u.size] for u in units}


def _rounded(units: Units, left: int, multiple: int) -> int:
    if multiple == 1 or units.width > 1:
        return left
    if (count := units.count // units.sets) < multiple:
        raise JpruneError(f"{units.name}: {count} channels hold no multiple of {multiple}; lower `round_to`")
    if left in (0, count):
        return left
    return min(max((left + multiple // 2) // multiple, 1), count // multiple) * multiple
