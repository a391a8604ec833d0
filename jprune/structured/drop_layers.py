"""Dropping layers: those go that turn the hidden states least (ShortGPT, Men et al. 2024, arXiv:2403.03853)."""

import dataclasses

import numpy as np

from jprune.annotations import Float
from jprune.errors import JpruneError
from jprune.structured.base import Needs, UnitMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropLayers(UnitMethod):
    """Remove the layers that turn the hidden states least: 1 - cosine similarity of input and output (ShortGPT)."""

    drop: int
    """How many layers go."""
    examples: int = 10
    """Calibration texts."""
    sequence_length: int = 512
    """Tokens of each calibration text."""
    seed: int = 0
    """Seed of the choice of texts."""

    def __post_init__(self):
        for name in ("drop", "examples", "sequence_length"):
            if getattr(self, name) < 1:
                raise JpruneError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def needs(self) -> Needs:
        """How much each layer turns the hidden states."""
        return "influence"

    def layers_left(self, layers: int, influences: Float[np.ndarray, " layers"] | None = None) -> tuple[int, ...]:
        """The layers that stay, ascending; of equal influence the first go first.

        Raises:
          JpruneError: no layer would stay.
        """
        if self.drop >= layers:
            raise JpruneError(f"cannot drop {self.drop} of {layers} layers: at least one must stay")
        if influences is None:
            influences = np.zeros(layers)
        if not np.all(np.isfinite(influences)):
            raise JpruneError("block influences must be finite numbers; do the hidden states overflow?")
        return tuple(int(i) for i in np.sort(np.argsort(influences, kind="stable")[self.drop :]))
