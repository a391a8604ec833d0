"""What every allocation is: a frozen config that says how important each block is, and what it must see for that."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jprune.allocations import spread
from jprune.annotations import Array, Float
from jprune.errors import JpruneError
from jprune.methods.base import ByScore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation(abc.ABC):
    """How the sparsity of a model is shared out over its blocks, so that its number of zeros stays the same.

    A new one defines `importance`; and `by` and `score`, if it needs to know more of a block than where it stands.
    """

    by: ClassVar[ByScore | None] = None
    """A method whose scores of all kernels of a block, while the model is dense, go into the block's score. They take
    one pass over the model before anything is pruned. None: there is no pass."""

    tries: ClassVar[bool] = False
    """Whether the score of a block is the damage that pruning it alone by `by` does to the model's predictions, which
    the pass then tries out, instead of what `score` makes of the scores."""

    band: float
    """How far the sparsity of a block may lie from that of the model: the most and the least important block are two
    bands apart."""

    def __post_init__(self) -> None:
        if not 0 <= self.band < 1:
            raise JpruneError(f"the band of an allocation is a difference of sparsities in [0, 1); got {self.band}")

    @property
    def uniform(self) -> bool:
        """Whether every block has the model's own sparsity, whatever the model."""
        return self.band == 0

    def score(self, scores: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
        """What is remembered of a block, of the scores of all its kernels; in a form that `jax.jit` can trace.

        Raises:
          JpruneError: an allocation has `by`, does not try blocks out, and does not define this.
        """
        raise JpruneError(f"{type(self).__name__} takes scores of {self.by}: it must define `score` too")

    @abc.abstractmethod
    def importance(self, scores: Float[np.ndarray, "blocks"]) -> Float[np.ndarray, "blocks"]:
        """How important every block is, from the scores of all (zeros where there is no pass); higher = denser."""

    def sparsities(
        self, scores: Float[np.ndarray, "blocks"], sizes: Float[np.ndarray, "blocks"], sparsity: float
    ) -> Float[np.ndarray, "blocks"]:
        """The sparsity of every block, of mean `sparsity` over all elements.

        Args:
          scores: of the blocks, in their order.
          sizes: numbers of elements of the blocks that are shared out.
          sparsity: of the model.
        """
        return spread.banded(self.importance(scores), sizes, sparsity, self.band)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """The same sparsity for every block."""

    band: float = 0.0

    def __post_init__(self) -> None:
        if self.band:
            raise JpruneError(f"the uniform allocation has no band; got {self.band}: use linear, owl, dlp or loss")

    def importance(self, scores):
        """All alike."""
        return np.zeros(len(scores))


@functools.partial(jax.jit, static_argnums=0)
def score_of_block(
    allocation: Allocation, kernels: Sequence[Float[Array, "_ _ _"]], statistics: Sequence[Any]
) -> Float[Array, ""]:
    """The score of a block, from stacks of its kernels and what is known of their inputs; compiled once for each kind.

    Args:
      allocation: says how.
      kernels: stacks of matrix views [stack, d_in, d_out], of a single kernel a stack of one.
      statistics: of their inputs, with one more axis in front.
    """
    assert allocation.by is not None
    return allocation.score([jax.vmap(allocation.by.score)(x, own) for x, own in zip(kernels, statistics, strict=True)])
