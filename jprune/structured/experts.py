"""Removing experts: those go whose outputs add least (REAP, Lasby et al. 2025, arXiv:2510.13999).

The saliency of expert j is the mean over the tokens that the router sends to it of g_j ||f_j||: the norm of what it
gives, times the weight with which it is added, after the weights of a token's experts are normalised where the model
does so (equation 9). An expert that no token is sent to has none. As in the authors' program one pass of the whole
model tells of all layers, and nothing is merged or trained.

The other scores are what REAP is compared with: how many tokens an expert is sent (`frequency`), the mean norm of what
it gives, without the weight (`ean`), and chance (`random`). With `globally` experts of all layers are ranked together,
by their scores as shares of their layer's mean, for outputs grow from layer to layer; the authors rank layer by layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Float, Float64, Int
from jprune.errors import JpruneError
from jprune.structured.base import Needs, UnitMethod

Score = Literal["reap", "frequency", "ean", "random"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Use:
    """What the experts of a layer did with some text: sums over the tokens that each was sent, [experts]."""

    tokens: Any
    """Number of tokens."""
    norms: Any
    """||f_j||."""
    weighted: Any
    """g_j ||f_j||."""

    def merge(self, other: "Use") -> "Use":
        """Having seen both texts."""
        return jax.tree.map(lambda a, b: a + b, self, other)


def use(
    experts: Int[Array, "tokens k"], weights: Float[Array, "tokens k"], norms: Float[Array, "tokens k"], count: int
) -> Use:
    """The use of `count` experts.

    Args:
      experts: the numbers of each token's experts.
      weights: with which their outputs are added.
      norms: of their outputs, before they are weighted.
      count: how many experts there are.
    """

    def summed(values: Float[Array, "tokens k"]) -> Float[Array, " experts"]:
        zeros = jnp.zeros(count, jnp.float32)
        return zeros.at[experts.reshape(-1)].add(values.reshape(-1).astype(jnp.float32))

    weights = weights.astype(jnp.float32)
    return Use(summed(jnp.ones(experts.shape)), summed(norms), summed(weights * norms.astype(jnp.float32)))


def score(seen: Use, by: Score = "reap", *, seed: int = 0) -> Float64[np.ndarray, " experts"]:
    """The score of every expert of a layer; higher stays.

    Args:
      seen: their use.
      by: which score.
      seed: of `random`.
    """
    tokens = np.asarray(seen.tokens, np.float64)
    if by == "random":
        return np.random.default_rng(seed).random(len(tokens))
    if by == "frequency":
        return tokens
    total = np.asarray(seen.weighted if by == "reap" else seen.norms, np.float64)
    return total / np.maximum(tokens, 1)


def keep_best(scores: Float[np.ndarray, " experts"], keep: int, *, groups: int = 1) -> Int[np.ndarray, " keep"]:
    """The numbers of the experts that stay, ascending; of equal score the first go first.

    Args:
      scores: of a layer's experts.
      keep: how many stay.
      groups: into how many groups of neighbours the router divides them; equally many of each stay.

    Raises:
      JpruneError: the groups cannot keep equally many, or a score is no number.
    """
    if not np.isfinite(scores).all():
        raise JpruneError("scores of experts must be finite numbers; do activations overflow?")
    if keep % groups:
        raise JpruneError(f"the router has {groups} groups of experts, and {keep} cannot be equally many of each")
    by_group = np.asarray(scores).reshape(groups, -1)
    order = np.argsort(by_group, axis=1, kind="stable")[:, by_group.shape[1] - keep // groups :]
    return np.sort((order + np.arange(groups)[:, None] * by_group.shape[1]).reshape(-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoveExperts(UnitMethod):
    """Remove the experts that add least to what their layer gives (REAP)."""

    remove: int | None = None
    """How many experts go from each layer."""
    keep: int | None = None
    """How many experts of each layer stay; instead of `remove`."""
    by: Score = "reap"
    """How experts are scored: by the mean norm of their output times the router's weight (reap), by how many tokens
    they are sent (frequency), by the mean norm alone (ean), or not at all (random)."""
    globally: bool = False
    """Rank the experts of all layers together, by their scores as shares of their layer's mean; as many go in all, but
    layers end up with different numbers, which only jprune loads."""
    examples: int = 64
    """Calibration texts."""
    sequence_length: int = 2048
    """Tokens of each calibration text."""
    seed: int = 0
    """Seed of the choice of texts, and of random scores."""

    def __post_init__(self):
        if (self.remove is None) == (self.keep is None):
            raise JpruneError("say how many experts of each layer go (`remove`), or how many stay (`keep`)")
        for name in ("remove", "keep", "examples", "sequence_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise JpruneError(f"{name} must be at least 1, got {value}")

    @property
    def needs(self) -> Needs:
        """What the experts do with the text."""
        return "nothing" if self.by == "random" else "experts"

    @property
    def removes_experts(self) -> bool:
        """Experts go, and nothing else."""
        return True

    @property
    def counts_follow_scores(self) -> bool:
        """Ranked together, layers keep as many as their scores say."""
        return self.globally

    def experts_left(
        self, counts: Mapping[int, int], least: int, groups: int, seen: Mapping[int, Use] | None = None
    ) -> dict[int, Int[np.ndarray, " keep"]]:
        """The experts that stay of every layer that has some, ascending.

        Args:
          counts: how many there are, by the number of the layer.
          least: how many must stay, for each token to be sent to as many as before.
          groups: into how many groups the router divides them; equally many of each stay.
          seen: their use, where that is needed; without it only the numbers that stay are meant.

        Raises:
          JpruneError: no layer has experts, too few would stay, or none would go.
        """
        if not counts:
            raise JpruneError("the model has no experts; other methods remove heads, channels and layers")
        kept = {layer: self._kept(count, layer) for layer, count in counts.items()}
        for layer, stay in kept.items():
            if stay < least:
                raise JpruneError(
                    f"layer {layer}: {max(stay, 0)} of {counts[layer]} experts would stay, but the router needs "
                    f"{least} to send each token to as many as before; remove {counts[layer] - least} at most"
                )
        scores = {layer: self.expert_scores(layer, count, seen) for layer, count in counts.items()}
        if self.globally and seen is not None:
            kept = _shared_out(scores, sum(kept.values()), least, groups)
        return {layer: keep_best(scores[layer], stay, groups=groups) for layer, stay in kept.items()}

    def expert_scores(self, layer: int, count: int, seen: Mapping[int, Use] | None) -> Float64[np.ndarray, " experts"]:
        """The scores of a layer's experts; zeros where nothing has been seen."""
        if self.by == "random":
            return np.random.default_rng((self.seed, layer)).random(count)
        return np.zeros(count) if seen is None else score(seen[layer], self.by)

    def _kept(self, count: int, layer: int) -> int:
        if self.keep is not None:
            if self.keep >= count:
                raise JpruneError(f"layer {layer} has {count} experts, no more than the {self.keep} to keep")
            return self.keep
        assert self.remove is not None
        return count - self.remove


def _shared_out(scores: Mapping[int, np.ndarray], keep: int, least: int, groups: int) -> dict[int, int]:
    """How many experts of each layer stay if all are ranked together; of each at least `least`, in whole rounds of its
    groups, each round being worth the sum of its experts."""
    rounds = {}
    for layer, own in scores.items():
        ranked = np.sort(own.reshape(groups, -1), axis=1)[:, ::-1].sum(axis=0)
        rounds[layer] = ranked / (own.mean() or 1.0)
    first = -(-least // groups)
    free = sorted(
        ((value, -layer) for layer, own in rounds.items() for value in own[first:]),
        reverse=True,
    )
    kept = dict.fromkeys(scores, first)
    for _, layer in free[: keep // groups - first * len(scores)]:
        kept[-layer] += 1
    return {layer: count * groups for layer, count in kept.items()}
