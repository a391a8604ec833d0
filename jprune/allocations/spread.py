"""Sparsities and whole numbers of zeros, of importances: plain NumPy in float64, the same bits on every machine.

What is shared out is never more or less than what was asked for. Blocks may differ in size: means weigh every element
alike. What a block may not take, because it would be sparser or denser than allowed, the others take.
"""

import numpy as np

from jprune.annotations import Float, Int
from jprune.patterns import SPARSEST

_HALVINGS = 100


def banded(
    importance: Float[np.ndarray, "blocks"], sizes: Float[np.ndarray, "blocks"], sparsity: float, band: float
) -> Float[np.ndarray, "blocks"]:
    """Sparsities that fall from the least to the most important block by two bands, of mean `sparsity`.

    Densities are (importance - lowest) / (highest - lowest) 2 band, moved together to the mean (OWL, DLP), and kept
    within [0, 0.95]; where all blocks are as important they are all alike.
    """
    span = np.ptp(importance)
    places = (importance - importance.min()) / span if span > 0 else np.zeros(len(importance))
    most = np.full(len(sizes), max(SPARSEST, sparsity))
    return leveled(-2 * band * places, sizes, sparsity * float(np.sum(sizes)), np.zeros(len(sizes)), most)


def leveled(
    shares: Float[np.ndarray, "n"],
    sizes: Float[np.ndarray, "n"],
    total: float,
    least: Float[np.ndarray, "n"],
    most: Float[np.ndarray, "n"],
) -> Float[np.ndarray, "n"]:
    """Shares, moved up or down together and kept within bounds, so that they are of `total` elements.

    Args:
      shares: as wanted, but for a number that is added to all.
      sizes: elements that each is a share of.
      total: sum of shares times sizes; the bounds allow it.
      least: the lowest shares.
      most: the highest shares.
    """
    low, high = np.min(least - shares), np.max(most - shares)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if np.sum(sizes * np.clip(shares + middle, least, most)) < total:
            low = middle
        else:
            high = middle
    return np.clip(shares + high, least, most)


def apportion(
    shares: Float[np.ndarray, "n"],
    sizes: Int[np.ndarray, "n"],
    total: int,
    least: Int[np.ndarray, "n"],
    most: Int[np.ndarray, "n"],
) -> Int[np.ndarray, "n"]:
    """Whole numbers that add up to `total`, and are of `sizes` as nearly what `shares` say as they can be.

    Shares are leveled first; then the largest remainders are rounded up, of equal ones those that come first.

    Args:
      shares: as wanted, but for a number that is added to all.
      sizes: what each is a share of.
      total: between the sums of `least` and of `most`.
      least: the lowest numbers.
      most: the highest numbers.
    """
    exact = sizes * leveled(shares, sizes.astype(np.float64), float(total), least / sizes, most / sizes)
    counts = np.clip(np.floor(exact).astype(np.int64), least, most)
    order = np.argsort(counts - exact, kind="stable")
    while (left := total - int(counts.sum())) != 0:
        step = 1 if left > 0 else -1
        free = (counts < most) if left > 0 else (counts > least)
        chosen = [i for i in order[::step] if free[i]][: abs(left)]
        counts[chosen] += step
    return counts
