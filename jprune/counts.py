"""Counts, in words and of shares: by exact arithmetic, 0.29 of 100 are 29, though ``100 * 0.29`` is a little less."""

import functools
from fractions import Fraction

_SIMPLE = 10**6
"""Denominators up to here are what somebody can have meant: decimals of six digits, thirds, shares of a small count."""


@functools.lru_cache(maxsize=1024)
def exact(share: float | Fraction) -> Fraction:
    """The number that a float stands for: the simplest fraction that rounds to it, or else the decimal as written.

    0.29 is 29/100 and not the nearest multiple of 2^-54, and 1 / 3 is a third.
    """
    if isinstance(share, Fraction):
        return share
    written = Fraction(str(share))
    simple = written.limit_denominator(_SIMPLE)
    return simple if float(simple) == float(written) else written


def floor(count: int, share: float | Fraction) -> int:
    """The highest whole number that is at most `share` of `count`."""
    return int(int(count) * exact(share) // 1)


def share(part: int, count: int) -> float:
    """The shortest decimal of which `floor` makes `part` of `count` again."""
    for digits in range(1, 18):
        found = round((part + 0.5) / count, digits) if part else 0.0
        if 0 <= found < 1 and floor(count, found) == part:
            return found
    raise ValueError(f"no float is {part} of {count}")


def windows(count: int, length: int) -> str:
    """So many windows of so many tokens, in words."""
    return f"{count} window{'' if count == 1 else 's'} of {length} tokens"
