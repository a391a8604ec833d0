"""LLM-Pruner (Ma, Fang and Wang 2023, https://arxiv.org/abs/2305.11627): units go that change the loss least.

The criteria and where they differ from the authors' program are in `importance`, the rankings in `selection`. The
authors leave all weights that stay as they are; here the kernels that read the heads and channels that are left are
refitted by default (see `compensation`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jprune.annotations import Float
from jprune.errors import JpruneError
from jprune.structured import importance, selection
from jprune.structured.base import Needs, UnitMethod
from jprune.structured.compensation import Compensation
from jprune.structured.importance import Criterion, Reduction, Vectors
from jprune.structured.units import Kind, Units

Heads = Literal["kv_head", "query_head", "none"]
Mode = Literal["block", "channel", "layer"]
Importance = Literal[Criterion, "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMPruner(UnitMethod):
    """Remove the heads and feed-forward channels that change the loss least (Ma, Fang and Wang 2023).

    Of a mixture of experts each expert loses its own channels, equally many as the others of its layer.
    """

    mode: Mode = "block"
    """What goes: block (heads and feed-forward channels of the layers that are not protected), channel (hidden
    dimensions, in the whole model) or layer (all but the first `layers`)."""
    importance: Importance = "param_second"
    """How units are scored: by the change of the loss to first order, second order or both (param_first, param_second,
    param_mix), to first order channel by channel (vectorize), by weights alone (l1, l2), or not at all (random). The
    authors take the first order; what the second leaves is better, most of all once it is refitted."""
    reduction: Reduction | None = None
    """How the kernels of a unit are put together. By default sum, and mean for l1 and l2."""
    heads: Heads = "kv_head"
    """What goes of attention: a KV head with its query heads (kv_head), one query head of every KV head (query_head),
    or nothing, so that feed-forward channels go alone (none)."""
    globally: bool = False
    """Rank heads and channels of all layers together, and not remove the same share of each."""
    normalise: Literal["none", "mean", "max", "sum"] = "none"
    """When all are ranked together: what the scores of heads, and those of channels, are divided by beforehand."""
    uniform: bool = False
    """The same sizes in every pruned layer; protects none unless asked to, so that a plain Hugging Face folder comes
    out."""
    round_to: int = 1
    """Feed-forward channels and hidden dimensions that stay are a multiple of this; heads are as wide as they are."""
    steps: int = 1
    """Number of equal steps to prune in, with new gradients for each."""
    protect_first: int | None = None
    """First layers that are left alone, of mode block. By default 4, or none with `uniform`."""
    protect_last: int | None = None
    """Last layers that are left alone, of mode block. By default 2, or none with `uniform`."""
    layers: int | None = None
    """Number of first layers that stay, in mode layer."""
    examples: int = 10
    """Calibration texts for gradients."""
    sequence_length: int = 64
    """Tokens of each calibration text."""
    seed: int = 42
    """Seed of the choice of texts, and of random importance."""
    compensate: bool = True
    """Refit by least squares the kernels that read the heads and channels that are left, in mode block, where there is
    text and memory for it. Hidden dimensions and layers have no kernel that could make up for them."""
    compensation_samples: int | None = None
    """Calibration windows to refit by. By default 128, or 16 for the demo model."""
    compensation_length: int | None = None
    """Tokens of such a window. By default 2048 or the model's context, or 512 for the demo model."""
    compensation_damping: float = 0.01
    """Share of the mean diagonal of a kernel's Gram matrix that is added to its diagonal when it is refitted."""

    def __post_init__(self):
        for name in ("round_to", "steps", "examples"):
            if getattr(self, name) < 1:
                raise JpruneError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("protect_first", "protect_last"):
            if (getattr(self, name) or 0) < 0:
                raise JpruneError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise JpruneError(f"a text needs 2 tokens to have a loss, got a sequence_length of {self.sequence_length}")
        if self.seed < 0:
            raise JpruneError(f"seed must not be negative, got {self.seed}")
        if (self.mode == "layer") != (self.layers is not None):
            raise JpruneError("give layers, how many stay, with mode layer and only there")
        if self.layers is not None and self.layers < 1:
            raise JpruneError(f"at least one layer must stay, got {self.layers}")
        if self.normalise != "none" and not self.globally:
            raise JpruneError(f"normalise {self.normalise} compares kinds of units; it goes with `globally`")
        self._compensation()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that go; none for mode layer."""
        attention: dict[Heads, tuple[Kind, ...]] = {"kv_head": ("attention",), "query_head": ("query",), "none": ()}
        kinds: dict[Mode, tuple[Kind, ...]] = {"block": (*attention[self.heads], "mlp"), "channel": ("hidden",)}
        return kinds.get(self.mode, ())

    @property
    def needs(self) -> Needs:
        """What scores are made of; nothing for random ones, and where whole layers go."""
        if self.mode == "layer" or self.importance == "random":
            return "nothing"
        needs = importance.CRITERIA[self.importance].needs
        return "squares" if "square" in needs else "gradients" if "gradient" in needs else "weights"

    @property
    def counts_follow_scores(self) -> bool:
        """Whether all layers are ranked together, so that scores tell how many units of each stay."""
        return self.globally and self.mode != "layer"

    @property
    def compensation(self) -> Compensation | None:
        """How kernels that lose inputs are refitted; None if none is to be, or what goes has no reader of its own."""
        return self._compensation() if self.compensate and self.mode == "block" else None

    def _compensation(self) -> Compensation:
        return Compensation(
            samples=self.compensation_samples,
            sequence_length=self.compensation_length,
            damping=self.compensation_damping,
        )

    def prunable(self, units: Sequence[Units], layers: int) -> tuple[Units, ...]:
        """The units that are not protected, of a model with a number of layers."""
        if self.mode != "block":
            return tuple(units)
        first, last = (
            default if given is None else given
            for given, default in zip((self.protect_first, self.protect_last), (0, 0) if self.uniform else (4, 2))
        )
        return selection.unprotected(units, layers, first=first, last=last)

    def layers_left(self, layers: int, influences: Float[np.ndarray, " layers"] | None = None) -> tuple[int, ...]:
        """The first layers, as many as are to stay; all of them unless whole layers go.

        Raises:
          JpruneError: the model has no more than are to stay.
        """
        if self.layers is not None and self.layers >= layers:
            raise JpruneError(f"the first {self.layers} layers are to stay of {layers}: nothing to prune")
        return tuple(range(layers if self.layers is None else self.layers))

    def vectors(self, units: Units, params: Any, gradients: Any | None, squares: Any | None, *, prefix: str) -> Vectors:
        """What the parameters at hand say of units, by the criterion of this method."""
        assert self.importance != "random"  # needs nothing
        return importance.vectors(units, self.importance, params, gradients, squares, prefix=prefix)

    def score(
        self, units: Units, vectors: Mapping[int, np.ndarray] | None = None, step: int = 1
    ) -> Float[np.ndarray, " count"]:
        """The importance of each unit, from what `importance.vectors` collected (nothing, for random)."""
        if self.importance == "random":
            return importance.random(units, self.seed + step - 1)
        reduction = self.reduction or importance.CRITERIA[self.importance].reduction
        return importance.combine(units, vectors or {}, reduction)

    def select(
        self,
        units: Sequence[Units],
        scores: Mapping[str, Float[np.ndarray, " count"]],
        ratio: float,
        *,
        initial: Mapping[str, int] | None = None,
    ) -> selection.Kept:
        """`selection.select` as configured here."""
        return selection.select(
            units,
            scores,
            ratio,
            ranking="global" if self.globally else "local",
            normalise=self.normalise,
            uniform=self.uniform,
            round_to=self.round_to,
            initial=initial,
        )
