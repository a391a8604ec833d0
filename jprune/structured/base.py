"""What a run asks of a structured method: which units go, what they are told by, and which of them stay.

A method is a frozen dataclass below `UnitMethod`, with examples, sequence_length and seed for its calibration texts,
in a file of its own; a line in `jprune.pipeline.registry` names it. It holds what is decided before a model is seen.
How small the model is to be is no part of it: see `selection.Target`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jprune.annotations import Float
from jprune.structured.compensation import Compensation
from jprune.structured.importance import Vectors
from jprune.structured.selection import Kept
from jprune.structured.units import Kind, Units

PyTree = Any
Needs = Literal["nothing", "weights", "gradients", "squares", "influence", "experts"]
"""What scores are made of: no weight at all; weights; the gradient of the mean loss too; the mean of the examples'
squared gradients too; how much each layer turns the hidden states; or what experts do with the tokens they are sent."""


class UnitMethod:
    """A structured method that trains nothing. Whole layers go (`layers_left`), experts, or units of some kinds."""

    examples: int
    """Calibration texts."""
    sequence_length: int
    """Tokens of each calibration text."""
    seed: int
    """Seed of the choice of calibration texts."""
    steps: int = 1
    """Equal steps to prune in, with new scores for each."""

    def described(self) -> dict[str, Any]:
        """The options by name, as the record of a result has them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # methods are dataclasses

    @property
    def needs(self) -> Needs:
        """What its scores are made of."""
        raise NotImplementedError

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that go; none where whole layers go."""
        return ()

    @property
    def counts_follow_scores(self) -> bool:
        """Whether not even the number of units that stay is known before their scores are."""
        return False

    @property
    def compensation(self) -> Compensation | None:
        """How the kernels that lose inputs make up for them; None if nothing is refitted."""
        return None

    def layers_left(self, layers: int, influences: Float[np.ndarray, " layers"] | None = None) -> tuple[int, ...]:
        """The layers that stay of a number of layers, ascending. All of them where units go instead.

        Args:
          layers: how many there are.
          influences: how much each turns the hidden states, where that is needed; without them only the number of
            layers that stay is meant.
        """
        return tuple(range(layers))

    @property
    def removes_experts(self) -> bool:
        """Whether experts go, as `experts_left` says."""
        return False

    def experts_left(
        self, counts: Mapping[int, int], least: int, groups: int, seen: Mapping[int, Any] | None = None
    ) -> dict[int, np.ndarray]:
        """The experts that stay of layers that lose some, by the number of the layer.

        Args:
          counts: how many there are in every layer that has experts.
          least: how many must stay, for each token to be sent to as many as before.
          groups: into how many groups the router divides them.
          seen: what they did with text, `experts.Use`, where that is needed; without it only their number is meant.
        """
        return {}

    def expert_scores(self, layer: int, count: int, seen: Mapping[int, Any] | None) -> Float[np.ndarray, " count"]:
        """The scores of a layer's experts; `seen` is that of `experts_left`."""
        raise NotImplementedError

    def prunable(self, units: Sequence[Units], layers: int) -> tuple[Units, ...]:
        """The units that may go, of a model with a number of layers."""
        return tuple(units)

    def vectors(
        self, units: Units, params: PyTree, gradients: PyTree | None, squares: PyTree | None, *, prefix: str
    ) -> Vectors:
        """What the parameters at hand say of units; see `importance.vectors`."""
        raise NotImplementedError

    def score(
        self, units: Units, vectors: Mapping[int, np.ndarray] | None = None, step: int = 1
    ) -> Float[np.ndarray, " count"]:
        """The importance of each unit, from the vectors of all of its members."""
        raise NotImplementedError

    def select(
        self,
        units: Sequence[Units],
        scores: Mapping[str, Float[np.ndarray, " count"]],
        ratio: float,
        *,
        initial: Mapping[str, int] | None = None,
    ) -> Kept:
        """The units that stay when a share of them goes; arguments are those of `selection.select`."""
        raise NotImplementedError
