"""Answers of two models to the same questions: how many each has right, and which go from right to wrong and back.

Two models of equal accuracy may be right on different items: what pruning changes shows in the flips (Dutta et al.
2024, "Accuracy is not all you need", arXiv:2407.09141). The difference of the accuracies is taken item by item, and its
interval is a bootstrap over items, so that questions that both find hard, or easy, do not widen it.

Deviation: the paper counts flips of all items together; here both directions stand apart, and their sum is theirs.
"""

import dataclasses

import numpy as np

from jprune.annotations import Bool
from jprune.evaluate import intervals
from jprune.evaluate.intervals import Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips:
    """A model's answers to n items, beside another's.

    Attributes:
        accuracy: share of its right answers, with its interval over items.
        change: accuracy less the other's, with its interval over items in pairs.
        lost: items that only the other has right.
        gained: items that only this one has right.
    """

    accuracy: Interval
    change: Interval
    lost: int
    gained: int


def flips(first: Bool[np.ndarray, " n"], other: Bool[np.ndarray, " n"]) -> Flips:
    """How the answers of a model differ from those of the first.

    Args:
        first: whether the first model has each item right.
        other: whether the model has it right.

    Raises:
        JpruneError: there are no items.
    """
    right = other.astype(np.float64)
    return Flips(
        accuracy=intervals.mean(right),
        change=intervals.mean(right - first.astype(np.float64)),
        lost=int((first & ~other).sum()),
        gained=int((other & ~first).sum()),
    )
