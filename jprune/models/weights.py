"""What passes over a model ask of its weights, whoever holds them."""

from typing import Any, Protocol, runtime_checkable

from jprune.models.blocks import InBlocks
from jprune.models.config import DecoderConfig


@runtime_checkable
class Weights(Protocol):
    """A model read part by part, such as a `jprune.checkpoints.Checkpoint`."""

    @property
    def model(self) -> InBlocks:
        """The model's functions."""
        ...

    def params(self, prefix: str) -> dict[str, Any]:
        """The subtree of parameters at a path such as `blocks/3`."""
        ...


@runtime_checkable
class NativeWeights(Weights, Protocol):
    """Those of a native model."""

    @property
    def config(self) -> DecoderConfig:
        """The decoder's configuration."""
        ...
