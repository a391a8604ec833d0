"""Forms in which a length is written as a number: whether 0.0884 may be 1 / sqrt(128).

A family wide enough for what initialisers, attention, norms and depth scalings use: ``c w^p`` and ``(c w)^p`` with
small ratios c, roots and inverses of ``a w + b``, logarithms, and ``1 - 1 / w``. That a number has such a form proves
nothing. It is a reason to look closer, and to be careful where nobody can.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

COMMON = (
    *(2.0, 3.0, 0.5, math.sqrt(2), math.sqrt(0.5), math.log(2), 1 / math.log(2), 127.0, 255.0, 6.0, 1 / 6),
    *(math.sqrt(2 / math.pi), math.sqrt(1 / math.pi), 2 / math.sqrt(math.pi), 0.1, 0.01, 10.0, 100.0),
)
"""Numbers that activations, quantisation and halves are made of, whatever the lengths are."""

_POWERS = tuple(sign * Fraction(p) for p in ("1", "1/2", "1/4", "3/4", "3/2", "2", "1/3", "2/3") for sign in (-1, 1))
_SMALL = [Fraction(a, b) for a, b in itertools.product((1, 2, 3, 4), repeat=2) if math.gcd(a, b) == 1 and a != b]
_RATIOS = (*_SMALL, *(Fraction(n) ** sign for n in (5, 6, 8, 10, 12, 16) for sign in (1, -1)))
_PLAIN = tuple(sign * Fraction(p) for p in ("1/4", "1/2", "1", "3/2", "2") for sign in (-1, 1))
_COARSE = 1e-4  # relative precision below which nearly every number has one of the rarer forms


@dataclasses.dataclass(frozen=True)
class Form:
    """How a number may have been written."""

    words: str
    """As ``4 / w``."""
    rank: int
    """0: root of the length or its reciprocal; 1: another power of it; 2: a rarer form; 3: a rarer form of a number
    that is common anyway."""


def common(number: float, rounding: float = 1e-6) -> bool:
    """Whether a number is one that programs have anyway."""
    return any(abs(abs(number) / x - 1) <= rounding for x in COMMON)


@functools.lru_cache(maxsize=4096)
def form(number: float, length: int, rounding: float) -> Form | None:
    """The simplest form of a number in a length; None if it has none. The sign does not count.

    Args:
      number: as it stands in the program.
      length: at least 2.
      rounding: relative error that the number may have.
    """
    if length < 2 or not math.isfinite(number) or abs(number) in (0, 1):
        return None
    values, words, ranks = _table(length)
    near = np.abs(values / abs(number) - 1) <= rounding
    if rounding > _COARSE:
        near &= ranks < 2
    if not near.any():
        return None
    first = int(np.argmax(near))
    rank = int(ranks[first])
    if common(number, rounding) and words[first] not in _SIMPLEST:
        rank = 3
    return Form(words[first], rank)


def exponent(number: int, length: int) -> Form | None:
    """As `form`, of a whole exponent: the length itself."""
    return Form("w", 3 if number in (2, 3) else 1) if number == length else None


_SIMPLEST = ("sqrt(w)", "1 / sqrt(w)", "w", "1 / w")


@functools.lru_cache(maxsize=256)
def _table(length: int) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Values, words and ranks of all forms, the simplest first."""
    rows = sorted(_forms(length), key=lambda row: row[2])
    values = np.array([max(row[0], 1e-300) for row in rows])
    return values, tuple(row[1] for row in rows), np.array([row[2] for row in rows])


def _forms(w: int) -> Iterator[tuple[float, str, int]]:
    for p in _POWERS:
        yield w ** float(p), _power("w", p), 0 if abs(p) == Fraction(1, 2) else 1 if p in _PLAIN else 2
    for p, c in itertools.product(_POWERS, _RATIOS):
        yield float(c) * w ** float(p), _scaled(c, p), 2
        if abs(p) != 1:
            yield (float(c) * w) ** float(p), _power(f"({_scaled(c, Fraction(1))})", p), 2
    for name, value in (("log(w)", math.log(w)), ("log2(w)", math.log2(w)), ("log10(w)", math.log10(w))):
        for p, c in itertools.product(_POWERS[:4], (Fraction(1), *_SMALL)):
            yield float(c) * value ** float(p), _power(name, p) if c == 1 else f"{c} {_power(name, p)}", 2
    for a, b in itertools.product((1, 2, 3, 4), (-2, -1, 1, 2)):
        if a * w + b > 1:
            base = f"({'' if a == 1 else f'{a} '}w {'+' if b > 0 else '-'} {abs(b)})"
            for p in _POWERS[:4]:
                yield (a * w + b) ** float(p), _power(base, p), 2
    yield 1 - 1 / w, "1 - 1 / w", 2
    yield 1 + 1 / w, "1 + 1 / w", 2


def _power(base: str, p: Fraction) -> str:
    whole = {Fraction(1): base, Fraction(1, 2): f"sqrt({base.strip('()')})" if base[0] == "(" else f"sqrt({base})"}
    text = whole.get(abs(p)) or f"{base} ** {float(abs(p)):.4g}"
    return text if p > 0 else f"1 / {text}"


def _scaled(c: Fraction, p: Fraction) -> str:
    return f"{c} * {_power('w', p)}" if p > 0 else f"{c} / {_power('w', -p)}"
