"""Counts from shares are those of whole-number arithmetic, wherever they are made."""

from fractions import Fraction

import numpy as np
import pytest

from jprune import counts, schedules
from jprune.patterns import Unstructured
from jprune.structured.selection import Target


def test_every_percentage_of_every_count():
    for n in range(1, 300):
        for percent in range(100):
            assert counts.floor(n, percent / 100) == n * percent // 100
            assert counts.floor(n, 1 - counts.exact(percent / 100)) == n * (100 - percent) // 100


def test_shares_that_are_no_decimals():
    for n, (a, b) in ((3, (1, 3)), (24, (2, 3)), (7 * 11, (5, 7)), (10**13, (1, 10))):
        assert counts.floor(n, a / b) == n * a // b
    assert counts.exact(0.1234567891) == Fraction(1234567891, 10**10)
    assert counts.exact(np.float32(0.29)) == counts.exact(np.float64(0.29)) == Fraction(29, 100)
    assert counts.exact(0) == 0
    assert counts.exact(Fraction(1, 7**9)) == Fraction(1, 7**9)


@pytest.mark.parametrize(
    ("size", "share", "count"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.0029, 2), (50, 0.58, 29)]
)
def test_patterns_and_schedules(size, share, count):
    assert Unstructured(share, "output").zeros(size, 3) == 3 * count
    assert Unstructured(share, "kernel").zeros(size, 1) == count
    assert sum(Unstructured(share, "block").schedule(size, 1, 16).zeros) == count
    mask = Unstructured(share, "output").select(np.arange(2.0 * size, dtype=np.float32).reshape(size, 2))
    assert (~np.asarray(mask)).sum(0).tolist() == [count, count]
    growth = schedules.linear(share, end=4)
    assert int(growth.zeros(4, size)) == count
    assert Target(share=share).most(size) == size - -(-size * counts.exact(share) // 1)
