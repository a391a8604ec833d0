"""Confidence intervals of means by the bootstrap (Efron 1979): over windows of text, or items of a task.

Two models measured on the same windows are compared by the differences window by window: most of what makes one window
harder than another is the text, and is gone from them.
"""

import dataclasses

import numpy as np

from jprune.annotations import Float
from jprune.errors import JpruneError

LEVEL = 0.95
"""Share of intervals that hold the mean of the text that the windows are drawn from."""
RESAMPLES = 5000
FEW = 10
"""Windows below which an interval is told to be too narrow."""
SEED = 0
"""Of the draws: the same values give the same interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the ends of its interval, NaN where there is one value alone."""

    value: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether zero lies outside: a difference whose interval holds zero is not distinguishable from none."""
        return self.low > 0 or self.high < 0


def few(windows: int) -> tuple[str, ...]:
    """What is to be known of intervals over so few windows; nothing where there are `FEW` or more.

    The bootstrap knows no more of the text than the windows that it draws from. The shares are those of normal values.
    """
    if windows >= FEW:
        return ()
    if windows == 1:
        return ("one window has no interval, and tells no difference from chance; measure more windows",)
    return (
        f"intervals over {windows} windows are too narrow: of those over 2 about 50 % hold the mean, over 5 83 %, and "
        f"over {FEW} 90 %; measure more windows",
    )


def mean(values: Float[np.ndarray, " n"]) -> Interval:
    """The mean of the values, and the percentiles of the means of as many drawn from them with replacement.

    Raises:
      JpruneError: there is no value, or one is not finite.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise JpruneError(f"expected finite values to take the mean of, got {values!r}")
    value = float(values.mean())
    if len(values) == 1:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    rng = np.random.default_rng(SEED)
    away = values - value  # what all values have in common must not be lost to rounding
    # Some resamples at a time: [RESAMPLES, n] at once may be large.
    at_once = max(1, 2**20 // len(values))
    counts = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    means = np.concatenate([away[rng.integers(len(away), size=(count, len(away)))].mean(axis=1) for count in counts])
    low, high = value + np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value=value, low=float(low), high=float(high))
