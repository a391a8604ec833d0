"""Bootstrap intervals: by enumeration, by the theory of normal means, and what they are said to hold."""

import re

import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.evaluate import intervals
from jprune.evaluate.flips import flips
from jprune.evaluate.intervals import FEW, few, mean


def test_by_enumeration():
    """Of two values a quarter of the resamples holds the lower one alone, and a quarter the higher one."""
    found = mean(np.array([1.0, 5.0]))
    assert (found.value, found.low, found.high) == (3, 1, 5)


def test_of_many_values_it_is_that_of_a_normal_mean(rng):
    values = 40 + 3 * rng.standard_normal(2000)
    found, deviation = mean(values), values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([found.low, found.high], values.mean() + 1.96 * deviation * np.array([-1, 1]), atol=0.01)
    shifted = mean(values + 1e6)
    np.testing.assert_allclose([shifted.low - 1e6, shifted.high - 1e6], [found.low, found.high], atol=1e-6)


def test_it_holds_the_truth_as_often_as_it_says(rng):
    """Of 60 values of a uniform distribution, whose mean is zero."""
    held = [found.high >= 0 and found.low <= 0 for found in (mean(rng.uniform(-1, 1, 60)) for _ in range(200))]
    assert 0.9 < np.mean(held) < 0.98


def test_of_few_values_it_holds_the_truth_less_often(rng, monkeypatch):
    """As often as is told of normal values; where nothing is told, about as often as it should."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    (told,) = few(2)
    said = {int(n): int(share) / 100 for n, share in re.findall(r"over (\d+) (?:about )?(\d+) %", told)}
    assert list(said) == [2, 5, FEW]
    for n, share in said.items():
        found = [mean(rng.standard_normal(n)) for _ in range(800)]
        assert np.mean([own.low <= 0 <= own.high for own in found]) == pytest.approx(share, abs=0.04)
    assert few(1)
    assert few(FEW - 1)
    assert not few(FEW)


def test_pairs_tell_what_two_means_do_not(rng):
    """The windows differ more from each other than the models do."""
    dense = 3 + rng.standard_normal(50)
    pruned = dense + 0.05 + 0.02 * rng.standard_normal(50)
    apart, one, other = mean(pruned - dense), mean(dense), mean(pruned)
    assert apart.tells
    assert one.high > other.low
    assert not mean(rng.permutation(pruned) - dense - 0.05).tells


def test_what_has_no_interval():
    assert np.isnan(mean(np.array([2.0])).low)
    assert not mean(np.array([2.0])).tells
    for values in (np.zeros(0), np.array([1.0, np.nan])):
        with pytest.raises(JpruneError, match="expected finite values"):
            mean(values)


def test_flips():
    """Equal accuracy, and four items that changed: counted by hand."""
    first = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool)
    other = np.array([0, 1, 0, 1, 1, 0, 0, 1], bool)
    found = flips(first, other)
    assert (found.lost, found.gained) == (2, 2)
    assert (found.accuracy.value, found.change.value) == (0.5, 0)
    assert not found.change.tells
    assert found.change.low < 0 < found.change.high
    same = flips(first, first)
    assert (same.lost, same.gained, same.change.low, same.change.high) == (0, 0, 0, 0)
