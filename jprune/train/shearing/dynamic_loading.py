"""Dynamic batch loading: more of the domains whose loss lags behind, less of those that are recovered.

Xia et al., *Sheared LLaMA*, arXiv:2310.06694, section 2.2 and algorithm 1; the update is DoReMi's (arXiv:2305.10429).
Every so often the held-out loss of each domain is compared with a reference loss, and with step size s, smoothing c and
n domains

    difference = loss - reference                 clipped: at least 0
    a          = softmax(log(weight) + s difference)
    weight     = (1 - c) a + c / n

Two things differ between the paper and the authors' program, and here either can be had. Algorithm 1 clips the
differences at 0, and its program does not: a domain that is better than its reference then loses weight to those that
are exactly at theirs. And only the program smooths. The defaults are the program's, which made the published models.
"""

from dataclasses import dataclass

import numpy as np

from jprune.annotations import Float64
from jprune.errors import JpruneError


def reweigh(
    weights: Float64[np.ndarray, "n"],
    losses: Float64[np.ndarray, "n"],
    references: Float64[np.ndarray, "n"],
    *,
    step_size: float = 1.0,
    smoothing: float = 1e-4,
    clip: bool = False,
) -> Float64[np.ndarray, "n"]:
    """The domains' new weights, which sum to 1.

    Args:
      weights: those so far; they need not be normalised.
      losses: of the domains now, in nats.
      references: what the losses should be.
      step_size: how strongly a difference counts.
      smoothing: the share that is dealt out equally, so that no domain dies out.
      clip: losses below their references count as equal to them.
    """
    difference = losses - references
    if clip:
        difference = np.maximum(difference, 0.0)
    with np.errstate(divide="ignore"):  # a domain of weight 0 only gets its part of the smoothing
        logits = np.log(weights) + step_size * difference
    raised = np.exp(logits - logits.max())
    mixed = (1 - smoothing) * raised / raised.sum() + smoothing / len(weights)
    return mixed / mixed.sum()


@dataclass(frozen=True, kw_only=True)
class Reweighing:
    """How weights follow the losses; see the module."""

    step_size: float = 1.0
    """How strongly a difference of losses counts."""
    smoothing: float = 1e-4
    """The share of the weights that is dealt out equally."""
    clip: bool = False
    """Losses below their references count as equal to them, as in the paper; not so in its program."""

    def __post_init__(self) -> None:
        if not self.step_size >= 0:
            raise JpruneError(f"the step size of dynamic loading must not be negative, got {self.step_size}")
        if not 0 <= self.smoothing <= 1:
            raise JpruneError(f"the smoothing of dynamic loading must be in [0, 1], got {self.smoothing}")

    def __call__(
        self, weights: dict[str, float], losses: dict[str, float], references: dict[str, float]
    ) -> dict[str, float]:
        """The new weights by domain. Losses and references of all domains are needed.

        Raises:
          JpruneError: a loss that is not finite.
        """
        for name, loss in losses.items():
            if not np.isfinite(loss):
                raise JpruneError(f"the held-out loss of domain {name!r} is {loss}: no weights follow from it")
        now = [np.array([values[name] for name in weights], np.float64) for values in (weights, losses, references)]
        new = reweigh(*now, step_size=self.step_size, smoothing=self.smoothing, clip=self.clip)
        return {name: float(weight) for name, weight in zip(weights, new)}
