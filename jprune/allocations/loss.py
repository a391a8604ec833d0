"""Sparsities by what pruning each block alone costs the whole model: our own. EvoPress (Sieberling et al. 2024,
https://arxiv.org/abs/2410.14649) searches by the same measure; here every block is tried once.

The damage of block l is the Kullback-Leibler divergence of the next-token probabilities from those of the dense model
when block l alone is pruned to the sparsity of the model, by the scores below and without an update of weights. Around
that sparsity damage grows about exponentially, alike in all blocks, and damages of blocks add up as long as they are
small. The least sum for a number of zeros is then where one more zero costs as much in every block:

    s_l = s + (constant - log(damage_l / size_l)) / rate                            within a band on either side of s

No gradient is taken: beside the dense model's hidden states go those of the models with one block pruned, for few
tokens, so that a model is read once.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from jprune.allocations import spread
from jprune.allocations.base import Allocation
from jprune.annotations import Float
from jprune.errors import JpruneError
from jprune.methods.base import ByScore
from jprune.methods.wanda import Wanda
from jprune.patterns import SPARSEST

_TINY = 1e-3
"""Damages below this share of the mean are taken as this: where there is next to none, only noise is left of it."""


def equal_slopes(
    damages: Float[np.ndarray, "blocks"], sizes: Float[np.ndarray, "blocks"], sparsity: float, band: float, rate: float
) -> Float[np.ndarray, "blocks"]:
    """The sparsities, of mean `sparsity`, at which one more zero costs as much in every block.

    Args:
      damages: of the blocks at `sparsity`; those that the band leaves a choice grow with exp(rate x sparsity).
      sizes: numbers of elements of the blocks.
      sparsity: of the model.
      band: the farthest that a block may be from it.
      rate: of growth.
    """
    known = np.maximum(damages, max(_TINY * float(np.mean(damages)), np.finfo(np.float64).tiny))
    least = np.full(len(sizes), max(sparsity - band, 0.0))
    most = np.full(len(sizes), min(sparsity + band, max(SPARSEST, sparsity)))
    wanted = (np.log(sizes) - np.log(known)) / rate
    return spread.leveled(wanted, sizes, sparsity * float(np.sum(sizes)), least, most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Allocation):
    """Sparser where pruning costs the model less."""

    by: ClassVar[ByScore] = Wanda()
    tries: ClassVar[bool] = True

    band: float = 0.15
    rate: float = 8.0
    """Growth of a block's damage with its sparsity: by exp(rate / 10) for ten points."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < float("inf"):
            raise JpruneError(f"rate must be positive: how damage grows with sparsity; got {self.rate}")

    def importance(self, scores):
        """Damages as they are."""
        return scores

    def sparsities(self, scores, sizes, sparsity):
        """See `equal_slopes`."""
        return equal_slopes(scores, sizes, sparsity, self.band, self.rate)
